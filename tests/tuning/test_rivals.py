"""`moe_param.tuning.rivals` and `costs`: a search's best so far and its costs, against what can be counted by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from transformers import MixtralConfig

import moe_param
from moe_param.structure.trace import model_class_for
from moe_param.tuning.costs import BaseRuns, Costs, base_runs, draw, run_flops, table
from moe_param.tuning.rivals import Search, Trial, best_so_far, conclude, init_ladder, longer

DEMO = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 32,
    "tie_word_embeddings": False,
}
"""The model of recipes/configs/demo.yaml."""


def search(octaves: tuple[float, ...] = (-1.0, 0.0, 1.0), stds: tuple[float, ...] = (0.02, 0.04)) -> Search:
    return Search("standard", "width=4", True, octaves, stds, (0, 1))


def bowl(found: Search, octave: float, log2_std: float) -> dict[Trial, float]:
    return {t: 2 + 0.1 * (t.octave - octave) ** 2 + 0.1 * (math.log2(t.init_std) - log2_std) ** 2 for t in found.trials}


def test_best_so_far_is_that_of_all_orders() -> None:
    losses = [2.0, 3.0, 5.0, math.inf]
    for quantile in (0.1, 0.5, 0.9):
        for k, found in enumerate(best_so_far(losses, quantile), 1):
            lowest = sorted(min(order[:k]) for order in itertools.permutations(losses))
            assert found == lowest[math.ceil(quantile * len(lowest)) - 1], (quantile, k)


def test_a_search_grows_while_its_best_is_at_an_edge() -> None:
    asked = found = search()
    for _ in range(6):
        found = found.grown(bowl(found, 5.0, -3.0), asked.octaves, asked.init_stds, 2)
    assert found.octaves == (-1.0, 0.0, 1.0, 2.0, 3.0)  # two rungs more at most
    assert found.init_stds == pytest.approx((0.02, 0.04, 0.08, 0.16))  # 2^-3 = 0.125 is no edge any more
    assert conclude(found, bowl(found, 5.0, -3.0)).at_edge == ("learning rate", "init std")
    inside = search((-1.0, 0.0, 1.0), (0.01, 0.02, 0.04))
    assert inside.grown(bowl(inside, 0.0, math.log2(0.02)), inside.octaves, inside.init_stds, 2) == inside
    diverged = dict.fromkeys(inside.trials, math.inf)
    assert inside.grown(diverged, inside.octaves, inside.init_stds, 2) == inside
    one = search(stds=(0.02,))  # what is not searched has no edge
    assert one.grown(bowl(one, 0.0, 0.0), one.octaves, one.init_stds, 2) == one
    assert longer((-1, -0.5, 0), -1, (-1, -0.5, 0), 1) == (-1.5, -1, -0.5, 0)


def test_knowing_the_bases_std_costs_the_search_nothing() -> None:
    assert init_ladder((0.01, 0.02, 0.04, 0.08), 0.06) == (0.01, 0.02, 0.04, 0.06)
    assert init_ladder((0.08, 0.02), None) == (0.02, 0.08)


def test_every_seed_is_a_search_of_its_own() -> None:
    losses = {t: 2.0 + 0.1 * abs(t.octave - (t.seed * 2 - 1)) + t.init_std for t in search().trials}  # other optima
    found = conclude(search(), losses)
    assert found.of_seeds == (2.02, 2.02)
    assert found.so_far[0.5][-1] == found.loss and found.so_far[0.5][0] > found.loss
    assert found.runs_to(2.02) == next(k for k, x in enumerate(found.so_far[0.5], 1) if x <= 2.02)
    assert found.runs_to(2.0) is None
    gain, half = found.gain({0: 1.919, 1: 1.919})
    assert gain == pytest.approx(0.05) and half == pytest.approx(0.0)


def flops_by_hand(width: int, expert: int, seq_len: int) -> float:
    """Of a token of the demo's model: 6 per weight that it is multiplied with, 6 per attended channel and position."""
    attention = 4 * width * width
    router, experts = 8 * width, 2 * 3 * width * expert
    gains = 2 * width
    weights = 2 * (attention + router + experts + gains) + 256 * width + width  # the lookup multiplies nothing
    return 6.0 * weights + 6.0 * 2 * width * seq_len


@pytest.mark.parametrize(("width", "expert"), [(32, 32), (128, 128)])
def test_flops_of_a_run_by_hand(width: int, expert: int) -> None:
    base = MixtralConfig(**DEMO)
    config = moe_param.scale_config(base, width=width, expert_size=expert)
    plan = moe_param.plan(model_class_for(base), config, base)
    tokens = 300 * 16 * 64
    assert run_flops(plan, 64, False, tokens) == pytest.approx(flops_by_hand(width, expert, 64) * tokens)


def costs(runs: float | None) -> Costs:
    losses = {t: 2.1 + 0.01 * i for i, t in enumerate(search().trials)}
    return Costs(
        "width=4",
        "moe-completep",
        1e10,
        1e11,
        BaseRuns(runs, "a test"),
        {0: 2.0, 1: 2.0},
        (conclude(search(), losses),),
    )


def test_the_ways_are_counted_in_full(tmp_path: Path) -> None:
    transfer, searched = costs(20).ways
    assert (transfer.runs, transfer.finding, transfer.total) == (20, 20e10, 20e10 + 1e11)
    assert (searched.runs, searched.finding, searched.total) == (6, 6e11, 6e11)
    values = json.loads(json.dumps(costs(20).to_dict()))
    assert values["ways"][1]["runs_to_transferred"] is None and values["ways"][1]["gain"] > 0
    paper = values["computed_at_paper_scale"]
    assert paper["share_finding"] == pytest.approx(20 * 38e6 / (6 * 2.5e9))
    assert paper["share_total"] == pytest.approx((20 * 38e6 + 2.5e9) / (6 * 2.5e9))
    draw([costs(20).to_dict(), costs(None).to_dict()]).savefig(tmp_path / "costs.png")
    assert (tmp_path / "costs.png").stat().st_size > 10_000


def test_what_is_not_known_is_said() -> None:
    assert costs(None).ways[0].total is None and costs(None).at_paper_scale() is None
    assert "not known" in str(table(costs(None)).caption)


def test_the_runs_of_the_base(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned.yaml"
    assert base_runs(tuned, 0.01, 7).runs == 7
    assert base_runs(tuned, 0.01, None).runs is None and base_runs(None, 0.01, None).runs is None
    best = {"best": {"learning_rate": 0.01}}
    trials = [{"losses": {"0": 2.0, "1": 2.1}}, {"losses": {"0": 2.0}, "shares": {"0": 1.0, "1": 0.25}}, {}]

    def beside(record: object) -> float | None:
        (tmp_path / "tune.json").write_text(json.dumps(record))
        return base_runs(tuned, 0.01, None).runs

    assert beside({"best": best, "trials": trials}) == 3.25
    assert beside({"best": best, "trials": trials, "full_runs": 12.5}) == 12.5
    assert beside({"best": {"best": {"learning_rate": 0.02}}, "trials": trials}) is None  # of another file
    assert beside({"trials": 3}) is None and beside([]) is None
    (tmp_path / "tune.json").write_text("{")
    assert base_runs(tuned, 0.01, None).runs is None
