"""`moe-param explain`, in this process and once as a real one."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import moe_param
from moe_param.explain import rich_table
from tests.cli import program
from tests.cli.program import Result
from tests.models import build, classes, tiny_config

BASE = "width=32,depth=2"
SIZES: dict[str, Any] = {"width": 32, "depth": 2}


def run(*arguments: str | Path) -> Result:
    return program.run("explain", *arguments)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A mixtral config, four times as wide and twice as deep as BASE."""
    config = moe_param.scale_config(tiny_config("mixtral"), width=128, depth=4)
    config.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def planned(folder: Path, **options: Any) -> moe_param.Parameterization:
    model_class, config_class = classes("mixtral")
    config = config_class.from_pretrained(folder)
    return moe_param.plan(model_class, config, moe_param.scale_config(config, **SIZES), **options)


def test_table_names_roles_and_factors(target: Path) -> None:
    result = run(target, "--base", BASE)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("moe-completep: width 32 → 128, depth 2 → 4, num_experts 8, top_k 2")
    by_role = {line.split()[0]: line for line in lines[4:] if line.strip()}
    assert {"embedding", "attention_in", "attention_out", "router", "expert_up", "expert_down"} <= set(by_role)
    down = planned(target).rules["model.layers.0.mlp.experts.down_proj"]
    for value in (down.init_std, down.lr, down.eps, down.weight_decay, down.multiplier):
        assert value is not None and f"{value:.4g}" in by_role["expert_down"].split()
    assert "×".join(map(str, down.shape)) in by_role["expert_down"]
    assert "residual branch" in by_role["expert_down"] and "residual branch" not in by_role["expert_up"]


@pytest.mark.parametrize("options", [{}, {"spec": "mup"}, {"init_std": 0.1}])
def test_json_is_the_plan(target: Path, options: dict[str, Any]) -> None:
    arguments = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    result = run(target, "--base", BASE, "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    document, expected = json.loads(result.stdout), planned(target, **options)
    assert document["rows"] == expected.rows()
    assert document["spec"] == expected.spec.name
    assert document["base_shape"]["width"] == 32 and document["shape"]["width"] == 128
    assert not document["recorded"]


def test_full_lists_every_parameter(target: Path) -> None:
    result = run(target, "--base", BASE, "--full", "--json")
    assert [row["parameter"] for row in json.loads(result.stdout)["rows"]] == list(planned(target).rules)
    text = run(target, "--base", BASE, "--full").stdout
    assert all(name in text for name in planned(target).rules)


def test_target_and_configs_as_base(target: Path, tmp_path: Path) -> None:
    """Sizes, a folder and a config.json say the same; the target can be given beside the config."""
    small, config = tmp_path / "small", classes("mixtral")[1].from_pretrained(target)
    moe_param.scale_config(config, **SIZES).save_pretrained(small)
    expected = planned(target).rows()
    for model, base, more in (
        (target, small, []),
        (target / "config.json", small / "config.json", []),
        (small, BASE, ["--target", "width=128,depth=4"]),
        (small, BASE, ["--target", target]),
    ):
        result = run(model, "--base", base, "--json", *more)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["rows"] == expected


def test_recorded_parameterization_is_shown(tmp_path: Path) -> None:
    model = build("mixtral")
    base = moe_param.scale_config(model.config, width=32)
    parameterization = moe_param.apply(model, base, spec="mup", seed=0, experts=None)
    model.config.save_pretrained(tmp_path)
    result = run(tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["recorded"] and document["spec"] == "mup"
    assert document["rows"] == parameterization.rows()
    assert run(tmp_path).stdout.startswith("mup: width 32 → ")
    refused = run(tmp_path, "--spec", "standard")
    assert refused.exit_code == 2 and "--spec needs --base" in refused.stderr
    other = run(tmp_path, "--base", "width=32", "--spec", "standard", "--json")  # what it would be under another
    assert json.loads(other.stdout)["spec"] == "standard"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{target}",), "not parameterized yet"),
        (("mixtrall", "--base", BASE), "did you mean 'mixtral'?"),
        (("{target}", "--base", "widht=32"), "--base: unknown size 'widht' (did you mean 'width'?)"),
        (("{target}", "--base", "head_dim=8"), "unknown size 'head_dim'"),
        (("{target}", "--base", "width=wide"), "width must be a whole number"),
        (("{target}", "--base", "width=0"), "a whole number above 0"),
        (("{target}", "--base", "width=32,width=64"), "given twice"),
        (("{target}", "--base", "width=33"), "the nearest that divide are width = 32 and 64"),
        (("{target}", "--base", BASE, "--target", "depht=4"), "--target: unknown size 'depht'"),
        (("{target}", "--base", BASE, "--spec", "moe-complete"), "did you mean 'moe-completep'?"),
        (("{target}", "--base", BASE, "--init-std", "-1"), "init_std must be a positive number"),
        (("{target}", "--base", "num_experts=8,top_k=4"), "fixed sparsity"),
        (("{target}", "--base", "qwen3_moe"), "different architectures"),
        (("{tmp}", "--base", BASE), "holds no config.json"),
        (("{tmp}/broken.json", "--base", BASE), "no config can be read"),
        (("{tmp}/untyped.json", "--base", BASE), "no config can be read"),
        (("{tmp}/missing.json", "--base", BASE), "no file, folder or model type"),
        (("gpt2", "--base", "width=384,num_experts=8"), "size 'num_experts' is of experts, and a dense model has none"),
    ],
)
def test_errors_are_one_line(target: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "untyped.json").write_text("{}")
    result = run(*(argument.format(target=target, tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith("moe-param explain: error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_sparsity_change_warns_in_one_line(target: Path) -> None:
    result = run(target, "--base", "num_experts=8,top_k=4", "--allow-sparsity-change", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["base_shape"]["num_experts"] == 8
    assert result.stderr.startswith("moe-param explain: warning: ") and result.stderr.count("\n") == 1


def test_narrow_terminals_get_whole_numbers(target: Path) -> None:
    """At 80 columns nothing is cut; only the names of the parameters are left out."""
    output = io.StringIO()
    Console(width=80, file=output).print(rich_table(planned(target), narrow=True))
    assert "…" not in output.getvalue()
    line = next(line for line in output.getvalue().splitlines() if line.strip().startswith("expert_down"))
    assert f"{planned(target).rules['model.layers.0.mlp.experts.down_proj'].init_std:.4g}" in line.split()


def test_process_explains_a_full_size_model() -> None:
    """The default mixtral (47 billion parameters), from its configuration alone."""
    command = [sys.executable, "-m", "moe_param.cli.main", "explain", "mixtral", "--base", "width=1024,depth=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "8×28672×4096" in done.stdout and not done.stderr
    failed = subprocess.run([*command[:4], "mixtral"], capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr and failed.stderr.count("\n") == 1
