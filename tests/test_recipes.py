"""The recipes, run for real at their smallest: what they write, resuming, and errors in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_param
from recipes import demo, pretrain
from recipes.data import InputError
from recipes.report import MetricsFile, read_lines
from recipes.short_run import ShortRun, factor, train

TINY = str(Path(pretrain.__file__).parent / "configs" / "tiny.yaml")
OVERRIDES = {
    "vocab_size": 256,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 16,
}


def run(output: Path, *extra: str, steps: int = 24) -> dict[str, Any]:
    """`tiny.yaml` made tinier: JSON on the command line takes the place of the file's mapping."""
    arguments = {
        "overrides": json.dumps(OVERRIDES),
        "target_shape": json.dumps({"width": 32}),
        "seq_len": 32,
        "validation_blocks": 8,
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "warmup_steps": 4,
        "lr_scheduler_type": "constant_with_warmup",
        "logging_steps": 4,
        "eval_steps": 8,
        "save_steps": 8,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    flags = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    return pretrain.main(["--config", TINY, "--output_dir", str(output), *flags, *extra])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run slower on many threads, and exact repetition needs one count throughout."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


# -- pretrain --------------------------------------------------------------------------------------------------------
def test_pretrain_learns_and_leaves_its_files(whole_run: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = whole_run
    lines = read_lines(folder / MetricsFile.name)
    losses = [line["loss"] for line in lines if "loss" in line]
    validation = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.5 and abs(losses[0] - math.log(256)) < 0.5
    assert [step for step, _ in validation] == [8, 16, 24]
    assert lines[0]["tokens"] == 4 * 4 * 32
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["validation_loss"] == validation[-1][1]
    assert summary["parameters"] > summary["active_parameters"] > 0
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-16", "checkpoint-24"}


def test_pretrain_uses_the_rules(whole_run: tuple[Path, dict[str, Any]]) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole_run[0])
    parameterization = moe_param.Parameterization.from_model(model)
    assert (parameterization.base_shape.width, parameterization.shape.width) == (16, 32)
    state = torch.load(whole_run[0] / "checkpoint-24" / "optimizer.pt")
    wanted = parameterization.param_groups(model, lr=2**-7, eps=1e-12)
    assert len(wanted) > 1
    for group, saved in zip(wanted, state["param_groups"], strict=True):
        assert (saved["names"], saved["lr"], saved["eps"]) == (group["names"], group["lr"], group["eps"])
        assert (saved["betas"], saved["weight_decay"]) == ((0.9, 0.95), 0.0)


def test_resumed_run_ends_exactly_like_a_whole_one(
    whole_run: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    class DiesAt13(MetricsFile):  # between checkpoints, so that steps are computed twice
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 13:
                raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pretrain, "MetricsFile", DiesAt13)
        run(tmp_path)
    assert read_lines(tmp_path / MetricsFile.name)[-1]["step"] == 12
    summary = run(tmp_path, "--resume")
    assert summary["resumed_from"].endswith("checkpoint-8")

    def timeless(folder: Path) -> list[dict[str, Any]]:
        kept = ("step", "tokens", "loss", "eval_loss", "grad_norm", "learning_rate")
        lines = [{k: line[k] for k in kept if k in line} for line in read_lines(folder / MetricsFile.name)]
        return [line for line in lines if len(line) > 2]

    whole, whole_summary = whole_run
    assert summary["validation_loss"] == whole_summary["validation_loss"]
    assert timeless(tmp_path) == timeless(whole)  # every step once, and the same to the last bit


def test_a_second_run_in_the_same_folder_is_refused(whole_run: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="holds a run already: --resume"):
        run(whole_run[0])


def test_torn_last_line_of_metrics_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_lines(tmp_path / "m.jsonl") == [{"step": 1}]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("learning_rte: 1e-3\n", "unknown key 'learning_rte', did you mean 'learning_rate'"),
        ("- a\n", "expected a mapping"),
        ("a: [\n", "not YAML"),
    ],
)
def test_wrong_yaml(tmp_path: Path, yaml: str, message: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml)
    with pytest.raises(InputError, match=message) as raised:
        pretrain.parse(["--config", str(path)])
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (
            ["--overrides", json.dumps(OVERRIDES | {"vocab_size": 100})],
            InputError,
            "256 ids, the model 100: set overrides.vocab_size",
        ),
        (["--overrides", "{hidden: 1}"], InputError, "not JSON"),
        (["--overrides", '{"hiden_size": 1}'], InputError, "have no hiden_size"),
        (["--target_shape", '{"wide": 1}'], InputError, "no axis 'wide', expected any of width"),
        (["--target_shape", '{"width": 17}'], moe_param.ShapeError, "width"),
        (["--model_type", "mixtrall"], InputError, "no config for 'mixtrall'"),
        (["--model", "some/id"], InputError, "set one of model"),
        (["--spec", "moe-complete"], moe_param.SpecError, "moe-completep"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], moe_param.OptimizerError, "reduce_lr_on_plateau"),
        (["--optim", "sgd"], InputError, "AdamW only"),
    ],
)
def test_wrong_arguments(tmp_path: Path, flags: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path, *flags)
    assert issubclass(error, pretrain.USER_ERRORS)  # told without a traceback


def test_unknown_argument_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'--learning_rte', did you mean 'learning_rate'"):
        run(tmp_path, "--learning_rte", "1")


def test_command_line_overrides_yaml_and_clipping_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, data, args = pretrain.parse(["--config", TINY, "--seq_len", "64", "--output_dir", str(tmp_path)])
    assert (model.model_type, data.seq_len, args.learning_rate, args.max_grad_norm) == ("mixtral", 64, 2**-7, 0.0)
    pretrain.check(args)
    assert "max_grad_norm" not in caplog.text
    args.max_grad_norm = 1.0
    pretrain.check(args)
    assert caplog.text.count("does not transfer") == 1


@pytest.mark.parametrize("path", sorted(Path(TINY).parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_parse_and_plan(path: Path) -> None:
    model, _, _ = pretrain.parse(["--config", str(path), "--use_cpu", "--bf16", "false"])
    base, target = pretrain.build_configs(model)
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(target))
    assert moe_param.plan(model_class, target, base, spec=model.spec).rules


# -- the short loop and the demo -------------------------------------------------------------------------------------
def short_run(lr: float, **changes: Any) -> ShortRun:
    base = demo.base_config(16)
    config = moe_param.scale_config(base, width=32)
    settings: dict[str, Any] = {"steps": 6, "batch_size": 4, "seq_len": 32, "validation_blocks": 8, **changes}
    return ShortRun(config.to_dict(), base.to_dict(), "moe-completep", lr, **settings)


def test_short_run_is_reproducible_and_divergence_is_a_result() -> None:
    first, second = train(short_run(2**-7)), train(short_run(2**-7))
    assert first.validation_loss == second.validation_loss < math.log(256)
    gone = train(short_run(1e30, warmup=0.0))
    assert gone.diverged and gone.validation_loss == math.inf


def test_schedule_of_the_short_run() -> None:
    factors = [factor(short_run(1.0, steps=8), step) for step in range(8)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_optimum_of_a_parabola_a_cliff_and_an_edge() -> None:
    xs = [-9, -8, -7, -6, -5]
    found = demo.find_optimum(xs, [(x + 7.3) ** 2 for x in xs])
    assert (found.log2_lr, found.at_edge) == (-7, False) and found.fitted == pytest.approx(-7.3)
    assert demo.find_optimum(xs, [3.0, 2.0, 1.0, math.inf, math.inf]).fitted == -7
    assert demo.find_optimum(xs, [1.0, 2.0, 3.0, 4.0, 5.0]).at_edge
    assert math.isnan(demo.find_optimum(xs, [math.inf] * 5).fitted)


def test_the_two_parameterizations_are_one_at_the_base() -> None:
    assert demo.same_training(demo.base_config(16))


def test_demo_smallest(tmp_path: Path) -> None:
    record = demo.main(["--smallest", "--output_dir", str(tmp_path), "--workers", "1"])
    assert json.loads((tmp_path / "demo.json").read_text())["summary"] == record["summary"]
    assert len(record["runs"]) == 8 and not any(run["diverged"] for run in record["runs"])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_survives_runs_that_all_diverge(tmp_path: Path) -> None:
    args = demo.DemoArguments(smallest=True, output_dir=str(tmp_path))
    lost = demo.Outcome(math.inf, math.nan, 1.0)
    results = {(spec, m, x, 0): lost for spec in demo.SPECS for m in demo.MODELS for x in args.log2_lrs}
    summary = demo.summarize(args, results)
    assert "diverged" in demo.verdict(summary["standard"])
    demo.tables(args, summary)
    demo.plot(args, summary, tmp_path / "a.png")
