"""Published models, from their configs alone: they are what they are called, and they are explained from a base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_param.structure.trace import model_class_for
from moe_param.tuned import read_tuned
from recipes.bench import explain
from tests.cli.program import run

ROOT = Path(__file__).parents[2]
PUBLISHED = {path.stem: path for path in sorted(explain.PUBLISHED.glob("*.yaml"))}

SHAPES = {
    # width, depth, experts, experts per token, expert size, head_dim
    "dbrx": (6144, 40, 16, 4, 10752, 128),
    "deepseek-v3": (7168, 61, 256, 8, 2048, 192),
    "glm-4.5": (5120, 92, 160, 8, 1536, 128),
    "gpt-oss-120b": (2880, 36, 128, 4, 2880, 64),
    "kimi-k2": (7168, 61, 384, 8, 2048, 192),
    "llama-4-maverick": (5120, 48, 128, 1, 8192, 128),
    "mixtral-8x22b": (6144, 56, 8, 2, 16384, 128),
    "olmoe-1b-7b": (2048, 16, 64, 8, 1024, 128),
    "qwen3-235b-a22b": (4096, 94, 128, 8, 1536, 128),
}


def test_all_are_tested() -> None:
    assert set(PUBLISHED) == set(SHAPES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_published_number_of_parameters(name: str) -> None:
    config = read_tuned(PUBLISHED[name]).target
    with torch.device("meta"):
        model = model_class_for(config)(config)
    published = yaml.safe_load(PUBLISHED[name].read_text())["parameters"]
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.01)
    text = PUBLISHED[name].read_text()
    assert text.startswith("# ") and "huggingface.co/" in text, "where its numbers are from"


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_explained_from_a_suggested_base(name: str) -> None:
    suggested = said("base", PUBLISHED[name])
    best = suggested["bases"][suggested["best"]]
    assert tuple(suggested["target"]["shape"].values()) == SHAPES[name]
    assert best["share"] < 0.02  # 8 heads of keys let some widths fall to an eighth only
    sizes = ",".join(f"{size}={value}" for size, value in best["shape"].items() if size != "head_dim")
    explained = said("explain", PUBLISHED[name], "--base", sizes)
    assert tuple(explained["shape"].values()) == SHAPES[name]
    assert explained["base_shape"] == best["shape"]
    roles = {row["role"] for row in explained["rows"]}
    assert {"embedding", "unembedding", "router", "expert_up", "expert_down", "final_norm"} <= roles
    assert all(row["lr"] is None or row["lr"] > 0 for row in explained["rows"])


def said(command: str, *arguments: str | Path) -> dict[str, Any]:
    result = run(command, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_the_benchmark_runs(tmp_path: Path) -> None:
    # From a small process: the peak memory that the system reports of a child includes what its parent had.
    command = [sys.executable, "-m", "recipes.bench.explain", "--smallest", "--out", str(tmp_path / "explain.json")]
    subprocess.run(command, cwd=ROOT, check=True)
    (result,) = json.loads((tmp_path / "explain.json").read_text())["results"]
    assert result["name"] == "olmoe-1b-7b" and result["base"].startswith("width=")
    needed = result["moe-param explain"]
    assert needed["cpu"] > result["import"]["cpu"] > 0 and needed["memory_gib"] < explain.MEMORY / 2**30
    assert result["passed"] == (needed["cpu"] <= explain.SECONDS)
