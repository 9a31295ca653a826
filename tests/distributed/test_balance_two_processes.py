"""Two real processes (gloo) with different data: one bias everywhere, moved by the load of all tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.balance_worker import FAMILIES, RATE, STEPS
from tests.distributed.launch import two_processes

pytestmark = pytest.mark.xdist_group("two processes, balance")  # one launch, not one per worker


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_processes("tests.distributed.balance_worker", tmp_path_factory.mktemp("ranks"))


def update(indices: list[list[list[int]]], num_experts: int) -> torch.Tensor:
    """-rate·(Load − κ), eq. 2, from the recorded choices of some tokens, per layer."""
    rows = []
    for layer in indices:
        load = [sum(row.count(e) for row in layer) / len(layer) for e in range(num_experts)]
        rows.append([-RATE * (x - len(layer[0]) / num_experts) for x in load])
    return torch.tensor(rows, dtype=torch.float64)


def right(runs: list[dict[str, Any]]) -> bool:
    """Whether both ranks hold, after every step, the biases that eq. 2 gives for the tokens of both."""
    before = torch.zeros(len(runs[0]["steps"][0]["bias"]), len(runs[0]["steps"][0]["bias"][0]), dtype=torch.float64)
    for first, second in zip(runs[0]["steps"], runs[1]["steps"], strict=True):
        if first["bias"] != second["bias"]:
            return False
        merged = [a + b for a, b in zip(first["indices"], second["indices"], strict=True)]
        bias = torch.tensor(first["bias"], dtype=torch.float64)
        if not torch.allclose(bias, before + update(merged, bias.shape[-1]), rtol=0, atol=1e-7):
            return False
        before = bias
    return True


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_ranks_follow_the_load_of_all_tokens(ranks: list[dict[str, Any]], family: str, layout: str) -> None:
    runs = [rank[f"{family} {layout}"] for rank in ranks]
    assert len(runs[0]["steps"]) == STEPS
    assert right(runs)
    for run in runs:
        for step in run["steps"]:
            assert step["collectives"] == 1, "one for all layers, sharded or not"
            assert all(n is None or n == b for n, b in zip(step["native"], step["bias"], strict=True))
            assert all((n is None) == (family == "qwen3_moe") for n in step["native"])
        assert all(run["sharded"]) == (layout == "fsdp" and family in ("afmoe", "ernie4_5_moe"))


def test_a_reduction_on_one_rank_would_be_seen(ranks: list[dict[str, Any]]) -> None:
    runs = [rank["control"] for rank in ranks]
    assert not right(runs)
    assert runs[0]["steps"][0]["indices"] != runs[1]["steps"][0]["indices"], "different data"
