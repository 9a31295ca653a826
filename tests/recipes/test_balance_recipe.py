"""`recipes.evidence.balance.run` at its smallest, and the committed results against what they claim."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_param import LoadBalancer
from recipes.evidence.balance import run as recipe
from tests.models import build, tokens

RESULTS = Path(recipe.__file__).parent / "results" / "balance.json"


def test_what_is_counted_is_what_the_experts_get() -> None:
    """Also in evaluation, and with the injected bias: a large one sends every token to its expert."""
    model = build("qwen3_moe").eval()
    balancer = LoadBalancer(model, rate=0.1, inject=True)
    load = recipe.Load(model)
    balancer.bias[:, 3] = 1e4
    balancer.write()
    ids = tokens()
    with load.counting() as counts:
        model(input_ids=ids)
        first = counts.clone()
        model(input_ids=ids)
    assert (first[:, 3] == ids.numel()).all() and (first.sum(-1) == 2 * ids.numel()).all()
    assert torch.equal(counts, 2 * first)
    assert recipe.max_over_mean(first).tolist() == [first.shape[1] / 2] * len(first)  # half of all, of 8 experts
    with load.counting() as counts:
        assert not counts.any()


def test_the_auxiliary_loss_is_that_of_transformers() -> None:
    model = build("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5)
    load = recipe.Load(model)
    ids = tokens()
    theirs = model(input_ids=ids, labels=ids).aux_loss
    assert torch.allclose(load.auxiliary_loss(), theirs, rtol=1e-6)


@pytest.mark.slow
def test_smallest(tmp_path: Path) -> None:
    command = ["--families", "qwen3_moe", "--smallest", "--workers", "1", "--output_dir", str(tmp_path)]
    record = recipe.main(command)
    assert json.loads((tmp_path / "balance.json").read_text())["summary"] == record["summary"]
    assert (tmp_path / "qwen3_moe.png").stat().st_size > 10_000
    arms = record["summary"]["qwen3_moe"]
    assert set(arms) == set(recipe.ARMS)
    ranges = {run["arm"]: run["bias_range"] for run in record["runs"]}
    assert ranges["selection biases"] > 0 == ranges["nothing"] == ranges["auxiliary loss"]
    losses = {run["arm"]: run["validation_loss"] for run in record["runs"]}
    assert len(set(losses.values())) == 3, "each arm does something"


def test_the_committed_results_are_complete() -> None:
    record = json.loads(RESULTS.read_text())
    assert not record["settings"]["smallest"] and record["hardware"]
    assert {(run["family"], run["arm"]) for run in record["runs"]} == {
        (f, a) for f in recipe.CASES for a in recipe.ARMS
    }
    assert {run["seed"] for run in record["runs"]} == {0, 1, 2}
