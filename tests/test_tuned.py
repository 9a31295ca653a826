"""`apply(model, "best.yaml")`: the file stands for base, spec, init_std and constants."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import moe_param
from moe_param import (
    Parameterization,
    ParameterizationError,
    ScalingSpec,
    TunedError,
    TunedNumbers,
    read_tuned,
    scale_config,
)
from moe_param.training.arguments import build_configs, parse
from tests.cli import program
from tests.models import build, tiny_config

SIZES = {"width": 64, "depth": 4, "num_experts": 8, "top_k": 2, "expert_size": 96}
CONSTANTS = {"router": {"lr": 0.25}, "expert_down": {"init": 0.5}}


def write(path: Path, **changes: Any) -> Path:
    config = tiny_config("mixtral")
    values = {
        "model_type": "mixtral",
        "overrides": {key: value for key, value in config.to_diff_dict().items() if key != "model_type"},
        "spec": "moe-completep",
        "init_std": 0.05,
        "constants": CONSTANTS,
        "learning_rate": 0.01,
        "tuned_at": SIZES,
        "max_steps": 100,  # the trainer's
    }
    path.write_text(yaml.safe_dump({k: v for k, v in (values | changes).items() if v is not None}))
    return path


def target() -> Any:
    return build("mixtral", config=scale_config(tiny_config("mixtral"), width=128, depth=6))


def test_a_file_is_the_same_as_its_numbers(tmp_path: Path) -> None:
    ours, theirs = target(), target()
    found = moe_param.apply(ours, write(tmp_path / "best.yaml"), seed=1)
    wanted = moe_param.apply(theirs, tiny_config("mixtral"), init_std=0.05, constants=CONSTANTS, seed=1)
    assert found.rules == wanted.rules
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    plain = moe_param.plan(type(ours), ours.config, tiny_config("mixtral"))  # control: without the numbers
    assert plain.rules != found.rules


NUMBERS = {"adam_epsilon": "1e-12", "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1, "decay": "independent"}


def test_what_the_file_says_of_the_optimizer_stays_with_the_model(tmp_path: Path) -> None:
    model = target()
    found = moe_param.apply(model, write(tmp_path / "best.yaml", **NUMBERS), seed=1)
    wanted = TunedNumbers(0.01, 1e-12, 0.9, 0.95, 0.1, "independent")
    assert found.tuned == read_tuned(tmp_path / "best.yaml").numbers == wanted
    model.save_pretrained(tmp_path)
    loaded = Parameterization.from_model(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert loaded == found and loaded.tuned == wanted
    partial = moe_param.plan(type(model), model.config, write(tmp_path / "rate.yaml"))
    assert Parameterization.from_dict(partial.to_dict()).tuned == TunedNumbers(learning_rate=0.01)
    without = moe_param.plan(type(model), model.config, tiny_config("mixtral"))
    assert without.tuned is None and "tuned" not in without.to_dict()
    assert Parameterization.from_dict(without.to_dict()) == without  # as versions before 0.2 wrote it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"learning_rate": 0.0}, "learning_rate must be at least"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least .* got nan"),
        ({"adam_epsilon": -1e-8}, "adam_epsilon must be at least 0 .* got -1e-08"),
        ({"adam_beta2": 1.0}, "adam_beta2 must be at least 0 and below 1, got 1"),
        ({"decay": "emma"}, "'emma' is not a convention: choose one of independent, ema, none"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TunedError, match=f"best.yaml: .*{message}"):
        read_tuned(write(tmp_path / "best.yaml", **changes))


def test_explain_and_train_read_one_file_alike(tmp_path: Path) -> None:
    """base_shape and shape both change the config of the file; a shape beside the file takes its place."""
    path = write(tmp_path / "best.yaml", base_shape={"width": 32}, shape="depth=6", tuned_at=SIZES | {"width": 32})
    arguments, _, _ = parse(["--config", str(path)])
    base, config = build_configs(arguments)
    assert (base.hidden_size, base.num_hidden_layers) == (32, 4)
    assert (config.hidden_size, config.num_hidden_layers) == (64, 6)
    plan = moe_param.plan(type(target()), config, base, init_std=0.05, constants=CONSTANTS)
    found = program.run("explain", str(path), "--json", "--full")
    assert json.loads(found.stdout)["rows"] == json.loads(json.dumps(plan.rows(full=True)))
    arguments, _, _ = parse(["--config", str(path), "--shape", "width=128"])
    base, config = build_configs(arguments)
    assert (config.hidden_size, config.num_hidden_layers) == (128, 4)
    plan = moe_param.plan(type(target()), config, base, init_std=0.05, constants=CONSTANTS)
    found = program.run("explain", str(path), "--target", "width=128", "--json", "--full")
    assert json.loads(found.stdout)["rows"] == json.loads(json.dumps(plan.rows(full=True)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "one of model and model_type"),
        (
            {"model_type": "qwen3_moe", "overrides": {"num_hidden_layers": 1}, "tuned_at": None},
            "different architectures: qwen3_moe and mixtral",
        ),
        ({"tuned_at": {"width": 32}}, "another base .*width 32, not 64; depth not named"),
        ({"tuned_at": SIZES | {"widht": 64}}, "another base .*widht 64, not unknown"),
        ({"base_shape": {"width": 7}}, "best.yaml: .*width"),
        ({"base_shape": 5}, "best.yaml: base_shape is 5: expected sizes like width=64"),
        ({"tuned_at": "width"}, "best.yaml: tuned_at is 'width': expected a mapping of sizes"),
        ({"base_shape": {"depth": 2}}, "another base .*depth 4, not 2"),
        ({"overrides": {"hiden_size": 64}}, "best.yaml: overrides: mixtral configs have no hiden_size"),
    ],
)
def test_a_file_for_another_base_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = target()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((TunedError, ParameterizationError), match=message):
        moe_param.apply(model, write(tmp_path / "best.yaml", **changes))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "best.yaml")
    config = target().config
    with pytest.raises(ParameterizationError, match=r"init_std is 0\.02 here and 0\.05 in"):
        moe_param.plan(type(target()), config, path, init_std=0.02)
    with pytest.raises(ParameterizationError, match="spec is 'standard' here"):
        moe_param.plan(type(target()), config, path, spec="standard")
    with pytest.raises(ParameterizationError, match="spec is 'moe-completep' here and 'standard' in"):  # no default
        moe_param.plan(type(target()), config, write(tmp_path / "standard.yaml", spec="standard"), spec="moe-completep")
    same = moe_param.plan(type(target()), config, path, spec=ScalingSpec.load("moe-completep"), init_std=0.05)
    assert same == moe_param.plan(type(target()), config, path)
    with pytest.raises(TunedError, match="No such file"):
        moe_param.plan(type(target()), config, tmp_path / "none.yaml")


def test_the_command_line_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path / "best.yaml")
    found = program.run("explain", str(path), "--target", "width=128,depth=6", "--json", "--full")
    assert found.exit_code == 0, found.stderr
    document = json.loads(found.stdout)
    plan = moe_param.plan(type(target()), target().config, path)
    assert document["rows"] == json.loads(json.dumps(plan.rows(full=True)))
    assert document["init_std"] == 0.05 and not document["recorded"]
    wrong = program.run("explain", str(write(path, tuned_at={"width": 32})), "--target", "width=128")
    assert wrong.exit_code == 2 and "width 32, not 64" in wrong.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"model_type: mixtral # \xe9\n", "not YAML"),
        (b"model_type: mixtral\noverrides: {hidden_size: wide}\n", "hidden_size.*expected int"),
        (b"model_type: mixtral\ninit_std: small\n", "init_std must be a number"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_bytes(text)
    with pytest.raises(TunedError, match=rf"tuned\.yaml: .*{message}"):
        read_tuned(tmp_path / "tuned.yaml")


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 takes 2e-2, without a dot, for text."""
    path = write(tmp_path / "tuned.yaml", init_std=None)
    path.write_text(path.read_text() + "init_std: 2e-2\n")
    assert yaml.safe_load(path.read_text())["init_std"] == "2e-2"
    assert read_tuned(path).init_std == 0.02


OWN = """
from transformers import AutoConfig, MixtralConfig


class OwnConfig(MixtralConfig):
    model_type = "imported_first"


AutoConfig.register("imported_first", OwnConfig)
"""


def test_a_module_that_registers_a_model_is_imported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the current folder, by whoever reads the file; the console script has no such folder on its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [folder for folder in sys.path if folder])
    (tmp_path / "registers_a_model.py").write_text(OWN)
    path = tmp_path / "tuned.yaml"
    path.write_text("model_type: imported_first\n")
    with pytest.raises(TunedError, match="no config for 'imported_first'"):
        read_tuned(path)
    path.write_text("imports: registers_a_model\nmodel_type: imported_first\n")
    assert parse([str(path)])[2].imports == ["registers_a_model"]
    assert read_tuned(path).base.model_type == "imported_first"
    path.write_text("imports:\nmodel_type: imported_first\n")
    assert parse([str(path)])[2].imports == []
    path.write_text("imports: 5\nmodel_type: imported_first\n")
    for reads in (lambda: parse([str(path)]), lambda: read_tuned(path)):
        with pytest.raises(TunedError, match=r"imports: expected names of modules, like package\.module, found 5"):
            reads()
    path.write_text("imports: [registers_a_modle]\nmodel_type: imported_first\n")
    for read in (read_tuned, lambda path: parse([str(path)])):
        with pytest.raises(TunedError, match="imports: 'registers_a_modle' cannot be imported.*in " + str(tmp_path)):
            read(path)
