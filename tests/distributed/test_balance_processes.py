"""Two and four real processes (gloo) with different data: one bias everywhere, moved by the load of all tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_param import LoadBalancer, load_selection_biases
from tests.distributed.balance_worker import FAMILIES, RATE, STEPS
from tests.distributed.launch import processes

pytestmark = pytest.mark.xdist_group("processes, balance")  # one launch, not one per worker


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes("tests.distributed.balance_worker", tmp_path_factory.mktemp("ranks"), request.param)


def update(indices: list[list[list[int]]], num_experts: int) -> torch.Tensor:
    """-rate·(Load − κ), eq. 2, from the recorded choices of some tokens, per layer."""
    rows = []
    for layer in indices:
        load = [sum(row.count(e) for row in layer) / len(layer) for e in range(num_experts)]
        rows.append([-RATE * (x - len(layer[0]) / num_experts) for x in load])
    return torch.tensor(rows, dtype=torch.float64)


def right(runs: list[dict[str, Any]]) -> bool:
    """Whether all ranks hold, after every step, the biases that eq. 2 gives for the tokens of all."""
    before = torch.zeros(len(runs[0]["steps"][0]["bias"]), len(runs[0]["steps"][0]["bias"][0]), dtype=torch.float64)
    for steps in zip(*(run["steps"] for run in runs), strict=True):
        if any(step["bias"] != steps[0]["bias"] for step in steps):
            return False
        layers = zip(*(step["indices"] for step in steps), strict=True)
        merged = [[row for part in layer for row in part] for layer in layers]
        bias = torch.tensor(steps[0]["bias"], dtype=torch.float64)
        if not torch.allclose(bias, before + update(merged, bias.shape[-1]), rtol=0, atol=1e-7):
            return False
        before = bias
    return True


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_all_ranks_follow_the_load_of_all_tokens(ranks: list[dict[str, Any]], layout: str) -> None:
    """All kinds of bias on two ranks; a native and an injected one on four."""
    families = [name.split()[0] for name in ranks[0] if name.endswith(layout)]
    assert families == list(FAMILIES if len(ranks) == 2 else FAMILIES[::3])
    for family in families:
        follows([rank[f"{family} {layout}"] for rank in ranks], family, layout)


def follows(runs: list[dict[str, Any]], family: str, layout: str) -> None:
    assert len(runs[0]["steps"]) == STEPS
    assert right(runs)
    for run in runs:
        for step in run["steps"]:
            assert step["collectives"] == 1, "one for all layers, sharded or not"
            assert step["native"] == step["bias"]
        assert all(run["sharded"]) == (layout == "fsdp" and family in ("afmoe", "ernie4_5_moe"))


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_injected_biases_are_in_what_several_processes_save(ranks: list[dict[str, Any]], layout: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(Path(ranks[0]["folder"]) / layout)
    load_selection_biases(model)
    assert LoadBalancer(model, rate=0).bias.tolist() == ranks[0][f"qwen3_moe {layout}"]["steps"][-1]["bias"]


def test_a_reduction_on_one_rank_would_be_seen(ranks: list[dict[str, Any]]) -> None:
    runs = [rank["control"] for rank in ranks]
    assert not right(runs)
    assert runs[0]["steps"][0]["indices"] != runs[1]["steps"][0]["indices"], "different data"
