"""recipes/evidence/coord_check and `moe-param coord-check` at their smallest setting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.cli.program import run as moe_param
from tests.models import tiny_config

SMALLEST = ["--factors", "1", "2", "--steps", "1", "--seeds", "1", "--processes", "1"]
RUN = [sys.executable, "-m", "recipes.evidence.coord_check.run"]


def recipe(out: Path, *options: str) -> list[dict[str, Any]]:
    subprocess.run([*RUN, "--out", str(out), *options, *SMALLEST], check=True, capture_output=True, timeout=300)
    found: list[dict[str, Any]] = json.loads((out / "families.json").read_text())["rows"]
    return found


def test_families_recipe_checks_mixtures(tmp_path: Path) -> None:
    [row] = recipe(tmp_path, "--families", "phimoe")
    table = (tmp_path / "families.md").read_text()
    assert "| phimoe |" in table and "sparsemixer" in table
    assert set(row["checks"]["width/moe-completep"]["slopes"]) >= {"residual", "router_logits", "logits"}


def test_families_recipe_checks_dense_families_and_resumes(tmp_path: Path) -> None:
    recipe(tmp_path, "--dense", "--families", "gpt2")  # as if it had been stopped after the first
    first = (tmp_path / "finished.jsonl").read_text().splitlines()
    rows = recipe(tmp_path, "--dense", "--families", "gpt2", "gpt_neo")
    both = (tmp_path / "finished.jsonl").read_text().splitlines()
    assert both[:1] == first and len(both) == 2  # seconds included: it was not run again
    assert "| family | width | depth |" in (tmp_path / "families.md").read_text()
    assert [row["family"] for row in rows] == ["gpt2", "gpt_neo"]
    assert set(rows[0]["checks"]["depth/standard"]["slopes"]) >= {"residual", "mlp_output", "logits"}


def test_families_recipe_names_unknown_families(tmp_path: Path) -> None:
    done = subprocess.run(
        [*RUN, "--out", str(tmp_path), "--families", "mixtrall"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "mixtrall" in done.stderr


def test_pictures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.evidence.coord_check.pictures", "--smallest", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    assert (tmp_path / "coord_good.png").stat().st_size > 1000
    assert (tmp_path / "coord_bad.png").stat().st_size > 1000


@pytest.fixture
def config(tmp_path: Path) -> Path:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    tiny_config("mixtral", **small, head_dim=16, intermediate_size=16).save_pretrained(tmp_path / "config")
    return tmp_path / "config"


def check(config: Path, out: Path, *options: str) -> tuple[int, str]:
    base = ["--base", "width=32", "--factors", "1,2", "--steps", "2", "--seeds", "1"]
    result = moe_param("coord-check", config, "--out", out, *base, *options)
    return result.exit_code, result.stdout + result.stderr


def test_command_writes_and_exits_by_the_verdict(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    enough = ["--axis", "width", "--factors", "1,4", "--steps", "5"]
    code, text = check(config, out, *enough, "--seeds", "3")
    found = json.loads((out / "width.json").read_text())
    assert code == {"passed": 0, "undecided": 3}[found["status"]], text
    assert (out / "width.png").exists()
    code, text = check(config, out, *enough, "--seeds", "3", "--spec", "standard", "--lr", "0.02")
    assert code == 1 and "FAILED" in text


def test_command_takes_the_users_tokens(config: Path, tmp_path: Path) -> None:
    numpy.save(tmp_path / "ids.npy", numpy.arange(64).reshape(2, 32) % 128)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    for name in ("ids.npy", "text.txt"):
        code, _ = check(config, tmp_path / "out", "--axis", "num_experts", "--tokens", str(tmp_path / name))
        assert code in (0, 1)
    assert len((tmp_path / "out" / "finished.jsonl").read_text().splitlines()) == 4  # two runs on each


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("flat.npy", numpy.arange(64), "(batch, length)"),
        ("outside.npy", numpy.arange(256).reshape(4, 64), "holds id 255, and the model has ids 0 to 127"),
        ("floats.npy", numpy.ones((2, 8)), "no plain array of whole numbers"),
        ("objects.npy", numpy.array([[1, None]]), "no plain array of whole numbers"),
        ("renamed.npy", "some text\n" * 20, "no plain array of whole numbers"),
        ("empty.npy", "", "no plain array of whole numbers"),
        ("short.txt", "short", "no text of"),
        ("ids.json", "[[1, 2]]", "neither a .npy file of ids"),
        ("missing.npy", None, "no file"),
    ],
)
def test_command_names_tokens_it_cannot_use(
    config: Path, tmp_path: Path, name: str, content: object, message: str
) -> None:
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    elif content is not None:
        numpy.save(tmp_path / name, content)
    code, text = check(config, tmp_path / "out", "--axis", "width", "--tokens", str(tmp_path / name))
    assert code == 2 and message in text and len(text.splitlines()) == 1, text
    assert "pickle" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--axis", "widht"], "did you mean 'width'"),
        (["--axis", "width", "--factors", "1,x"], "--factors"),
        (["--axis", "width", "--factors", "1,1.25"], "width × 1.25"),
        (["--axis", "width", "--base", "widht=32"], "did you mean 'width'"),
        (["--axis", "width", "--steps", "0"], "steps is 0"),
        (["--axis", "width", "--seeds", "0"], "seeds is 0"),
    ],
)
def test_command_bad_input(config: Path, tmp_path: Path, options: list[str], message: str) -> None:
    code, text = check(config, tmp_path / "out", *options)
    assert code == 2 and message in text and len(text.splitlines()) == 1, text
