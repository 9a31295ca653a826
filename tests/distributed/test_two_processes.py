"""Two real processes (gloo) against one: sharded initialization, FSDP2 and DDP training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import worker
from tests.distributed.launch import processes

pytestmark = pytest.mark.xdist_group("two processes")  # with --dist loadgroup: one launch, not one per worker


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return processes("tests.distributed.worker", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return worker.train_with_trainer(tmp_path_factory.mktemp("alone"), processes=1)


@pytest.mark.parametrize("layout", ["dim0", "dim1", "dim2", "fully_shard"])
def test_a_shard_is_a_slice_of_the_full_tensor(ranks: list[dict[str, Any]], layout: str) -> None:
    assert [rank["sharded"][layout] for rank in ranks] == [[], []]


def test_the_shards_were_uneven_and_real(ranks: list[dict[str, Any]]) -> None:
    assert [rank["sharded"]["uneven"] for rank in ranks] == [
        [[5, 64, 40], [5, 80, 64]],
        [[4, 64, 40], [4, 80, 64]],
    ]


def test_parameters_that_transformers_draws_itself_are_sharded_too(ranks: list[dict[str, Any]]) -> None:
    assert [rank["sharded"]["special"] for rank in ranks] == [[], []]


def test_a_plain_seeded_normal_gives_every_rank_the_same_numbers(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["sharded"]["plain normal_ repeats itself"]
        assert not rank["sharded"]["ours repeats itself"]


def test_ranks_start_alike_with_a_seed_and_only_with_one(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert ranks[0]["ddp"]["start"] == ranks[1]["ddp"]["start"] == alone["start"]
    assert ranks[0]["unseeded"] != ranks[1]["unseeded"]


def test_ddp_trains_as_one_process_does(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for rank in ranks:
        assert rank["ddp"]["wrapped"].startswith("module.")
        assert rank["ddp"]["groups under the wrapper"]
        assert rank["ddp"]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert rank["ddp"]["end"] == pytest.approx(alone["end"], rel=1e-3, abs=1e-4)
    assert ranks[0]["ddp"]["end"] == ranks[1]["ddp"]["end"]
    assert not alone["wrapped"].startswith("module.")
    assert len(set(alone["losses"])) == worker.STEPS
    assert alone["end"] != pytest.approx(alone["start"], rel=1e-3, abs=1e-4)


def train(groups: list[dict[str, Any]], model: Any) -> list[float]:
    return steps(torch.optim.AdamW(groups, betas=(0.9, 0.95)), model)  # as the factory does


def steps(optimizer: torch.optim.Optimizer, model: Any) -> list[float]:
    losses = []
    for batch in worker.batches():
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_fsdp2_trains_as_one_process_does(ranks: list[dict[str, Any]]) -> None:
    model, parameterization = worker.parameterized(worker.SMALL)
    groups = parameterization.param_groups(model, lr=worker.LR, eps=worker.EPS, weight_decay=worker.DECAY)
    losses = train(groups, model)
    for rank in ranks:
        assert rank["fsdp"]["losses"] == pytest.approx(losses, rel=1e-5)
        assert rank["fsdp"]["groups"] == [[g["names"], g["lr"]] for g in groups]
    model, parameterization = worker.parameterized(worker.SMALL)  # the comparison sees one group gone wrong
    groups = parameterization.param_groups(model, lr=worker.LR, eps=worker.EPS, weight_decay=worker.DECAY)
    next(g for g in groups if "lm_head.weight" in g["names"])["lr"] *= 2
    wrong = train(groups, model)
    assert wrong[0] == pytest.approx(losses[0], rel=1e-6)
    assert wrong != pytest.approx(losses, rel=1e-5)


def test_matrices_are_trained_as_by_one_process(ranks: list[dict[str, Any]]) -> None:
    """FSDP2: shards of a matrix are put together before it is made orthogonal; those of experts lie unevenly on two
    ranks. DDP: every rank makes the same of the same gradient, to the last bit."""
    numbers: dict[str, Any] = {"lr": worker.LR, "eps": worker.EPS, "weight_decay": worker.DECAY}
    model, parameterization = worker.parameterized(worker.SMALL)
    optimizer = parameterization.optimizer(model, optimizer="muon", **numbers)
    losses = steps(optimizer, model)
    for rank in ranks:
        assert rank["fsdp_muon"]["losses"] == pytest.approx(losses, rel=1e-5)
        assert rank["ddp_muon"]["losses"] == pytest.approx(losses, rel=1e-5)
    assert ranks[0]["ddp_muon"]["end"] == ranks[1]["ddp_muon"]["end"]
    assert ranks[0]["fsdp_muon"]["losses"] != pytest.approx(ranks[0]["fsdp"]["losses"], rel=1e-3)


def test_fsdp2_clips_as_one_process_does(ranks: list[dict[str, Any]]) -> None:
    alone = worker.clipped(None, 0)
    assert alone["norm"] > 2 * worker.THRESHOLD
    for rank in ranks:
        assert rank["clipped"]["norm"] == pytest.approx(alone["norm"], rel=1e-5)
        assert rank["clipped"]["left"] == pytest.approx(alone["left"], rel=1e-4)
