"""One expert per token, its gate normalized over itself, leaves the router no gradient: every command refuses it."""

from pathlib import Path

import pytest
import yaml

from tests.cli.program import run

DEMO = Path(__file__).parents[2] / "recipes" / "configs" / "demo.yaml"
COMMANDS = {
    "explain": (),
    "base": (),
    "tune": ("--output_dir",),
    "transfer": ("--output_dir",),
    "train": ("--max_steps", "1", "--output_dir"),
    "coord-check": ("--base", "width=16", "--out"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_one_normalized_expert_per_token_is_one_line(command: str, tmp_path: Path) -> None:
    values = yaml.safe_load(DEMO.read_text("utf-8"))
    values["overrides"]["num_experts_per_tok"] = 1
    config, out = tmp_path / "degenerate.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(values), "utf-8")
    options = COMMANDS[command]
    result = run(command, config, *options, *([out] if options else []))
    assert result.exit_code == 2
    which = "target" if command == "base" else "base"  # `base` is asked for bases of this target
    assert f"error: the {which} has top_k = 1" in result.stderr and "choose top_k >= 2" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not [path for path in out.rglob("*") if not path.name.startswith(".lock")]  # nothing was begun


def test_two_experts_pass() -> None:
    assert run("explain", DEMO).exit_code == 0
