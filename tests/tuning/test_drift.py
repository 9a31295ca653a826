"""`moe_param.tuning.drift`: intervals and verdicts, against noisy curves whose optima are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from moe_param.tuning.drift import Bounds, Curves, Drift, Regret, compare, drift_of, judge, regret_of, vertex

OCTAVES = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0)
HALVES = tuple(x / 2 for x in range(-6, 5))

Shape = Callable[[np.ndarray], np.ndarray]
SHAPES: dict[str, Shape] = {  # excess loss by octaves from the optimum, which is at 0
    "parabola": lambda z: 0.06 * z**2,
    "steep_below": lambda z: 0.05 * np.where(z < 0, 1.6 * z**2 / (1 + 0.25 * abs(z)), 1.3 * z**2 / (1 + 0.6 * abs(z))),
    "cliff": lambda z: 0.03 * z**2 + 0.012 * np.where(z > 0, np.expm1(1.6 * np.clip(z, 0, 4)), 0.0),
    "flat": lambda z: 0.09 * np.maximum(abs(z) - 0.6, 0) ** 2 + 0.005 * z**2,
}


def planted(
    optimum: float, octaves: tuple[float, ...] = OCTAVES, jitter: float = 0.0, seeds: int = 3, floor: float = 2.0
) -> Curves:
    """Losses floor + (octave − optimum)²/20; a seed moves the optimum by `jitter` times its number minus one."""
    lines = [tuple(floor + (x - optimum - jitter * (s - 1)) ** 2 / 20 for x in octaves) for s in range(seeds)]
    return Curves(octaves, tuple(lines))


def noisy(
    shape: Shape, optimum: float, octaves: tuple[float, ...], rng: np.random.Generator, of_seed: np.ndarray
) -> Curves:
    clean = 2 + shape(np.array(octaves) - optimum)
    lines = clean + of_seed[:, None] + rng.normal(0, 0.005, (len(of_seed), len(octaves)))
    return Curves(octaves, tuple(map(tuple, lines.tolist())))


def test_the_vertex_is_where_it_was_planted() -> None:
    octaves = [-1.0, 0.0, 1.0]
    assert vertex(octaves, [(x - 0.3) ** 2 for x in octaves]) == pytest.approx(0.3)
    assert vertex(octaves, [(x - 3) ** 2 for x in octaves]) == 1.0  # kept within what was measured
    assert vertex(octaves, [1.0, 0.4, math.inf]) == 0.0  # no parabola across a divergence
    assert vertex(octaves, [1.0, 0.9, 0.2]) == 1.0  # it opens downwards
    assert math.isnan(vertex(octaves, [math.inf] * 3))


def test_the_window_is_the_bottom_and_what_is_near_it() -> None:
    curves = Curves((0.0, 1.0, 2.0, 3.0, 4.0), ((2.3, 2.05, 2.0, 2.01, 2.02),))
    assert curves.window(0.0) == slice(1, 4)  # never less than the neighbours
    assert curves.window(0.03) == slice(1, 5)
    assert Curves((0.0, 1.0, 2.0), ((2.0, 1.9, math.inf),)).window(1.0) == slice(0, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("octaves", [OCTAVES, HALVES], ids=["octaves", "halves"])
@pytest.mark.parametrize("moved", [0.0, 0.4])
def test_the_interval_of_the_drift_holds_the_truth(shape: str, octaves: tuple[float, ...], moved: float) -> None:
    """95% of the time, up to four standard errors of the simulation. Read at the three rungs around the best alone, as
    it used to be, a flat bottom is missed a third of the time (the negative control, below)."""
    rng, draws, held, half_widths = np.random.default_rng(0), 300, 0, []
    for _ in range(draws):
        start, of_seed = rng.uniform(-1, 0), rng.normal(0, 0.02, 3)
        base, target = (noisy(SHAPES[shape], at, octaves, rng, of_seed) for at in (start, start + moved))
        drift = drift_of(base, target)
        assert drift.half is not None
        held += abs(drift.octaves - moved) <= drift.half
        half_widths.append(drift.half)
    assert held / draws > 0.95 - 4 * math.sqrt(0.95 * 0.05 / draws)
    assert np.median(half_widths) < (0.75 if shape == "flat" else 0.4)  # it does not hold it by being endless


def test_three_rungs_and_the_seeds_alone_do_not_hold_it() -> None:
    rng, draws, held = np.random.default_rng(0), 300, 0
    for _ in range(draws):
        start, of_seed = rng.uniform(-1, 0), rng.normal(0, 0.02, 3)
        base, target = (noisy(SHAPES["flat"], at, OCTAVES, rng, of_seed) for at in (start, start + 0.4))
        moved = [b - a for a, b in zip(base.optima(0.0), target.optima(0.0))]
        held += abs(np.mean(moved) - 0.4) <= 4.303 * np.std(moved, ddof=1) / math.sqrt(3)
    assert held / draws < 0.85


@pytest.mark.parametrize("moved", [0.0, 1.0])
def test_the_interval_of_the_regret_holds_the_truth(moved: float) -> None:
    """The truth: what the rung that is best at the base, over the seeds that were drawn, really costs at the target."""
    rng, draws, held, missed_above = np.random.default_rng(1), 400, 0, 0
    shape = SHAPES["parabola"]
    for _ in range(draws):
        start, of_seed = rng.uniform(-1, 0), rng.normal(0, 0.02, 3)
        base, target = (noisy(shape, at, OCTAVES, rng, of_seed) for at in (start, start + moved))
        clean = 2 + shape(np.array(OCTAVES) - start - moved)
        truth = (clean[base.best] - clean.min()) / clean.min()
        regret = regret_of(base, target)
        assert regret.low is not None and regret.high is not None
        held += regret.low - 1e-4 <= truth <= regret.high + 1e-4
        missed_above += truth > regret.high + 1e-4
    assert held / draws > 0.95 - 4 * math.sqrt(0.95 * 0.05 / draws)
    assert missed_above / draws < 0.025 + 4 * math.sqrt(0.025 * 0.975 / draws)  # a yes is wrong no more often


def test_drift_and_regret_of_planted_optima() -> None:
    base = planted(0.0, jitter=0.1)
    width = compare("standard", "width=4", base, planted(-2.0, jitter=0.1))
    assert width.drift.octaves == pytest.approx(-2.0) and width.transferred == "no"
    assert width.drift.of_seeds == pytest.approx([-2.0] * 3)  # paired: what a seed does to both cancels
    # At the base's octave 0 the target is 2 + 4/20 (+ the jitter's share, the same everywhere), at its best 2.
    jitter = (0.1**2 * 2 / 3) / 20
    assert width.regret.mean == pytest.approx(0.2 / (2 + jitter))
    depth = compare("standard", "depth=4", base, planted(0.25, jitter=0.1))
    assert depth.drift.octaves == pytest.approx(0.25) and depth.regret.mean == 0.0 and depth.transferred == "yes"


def verdict(
    of_seeds: tuple[float, ...] = (0.1, 0.1, 0.1),
    half: float | None = 0.1,
    shape: float = 0.0,
    regret: float = 0.0,
    low: float | None = 0.0,
    high: float | None = 0.001,
    at_edge: tuple[str, ...] = (),
) -> tuple[str, str]:
    return judge(Drift(of_seeds, half, shape), Regret((regret,) * len(of_seeds), low, high), at_edge, Bounds(0.5, 0.01))


def test_a_verdict_respects_its_interval() -> None:
    assert verdict()[0] == "yes"
    assert verdict((-0.11, -3.0, 2.78), half=5.17)[0] == "undecided"  # "-0.11 ± 5.17 octaves, yes", as it used to be
    assert verdict((-1.0, -1.1, -0.9), half=0.2)[0] == "no"
    assert verdict((-1.0, -1.1, -0.9), half=0.6)[0] == "undecided"
    assert verdict(regret=0.05, low=0.04, high=0.06)[0] == "no"
    assert verdict(regret=0.005, low=0.0, high=0.02)[0] == "undecided"
    assert verdict((math.nan,) * 3)[0] == "no"  # everything diverged


def test_one_seed_decides_nothing_but_a_ruin() -> None:
    one = {"half": None, "low": None, "high": None}
    assert verdict((0.0,), **one) == ("undecided", "one seed has no interval: give more --seeds")
    assert verdict((-3.0,), **one)[0] == "undecided"
    assert verdict((0.0,), regret=0.04, **one)[0] == "undecided"
    assert verdict((0.0,), regret=0.06, **one)[0] == "no"


def test_an_undecided_verdict_says_what_would_settle_it() -> None:
    # s = 0.2, room 0.3: t(0.975; 3)·0.2/√4 = 0.318 is too much, t(0.975; 4)·0.2/√5 = 0.248 is not.
    said = verdict((0.0, 0.2, 0.4), half=0.497)[1]
    assert "+0.20 ± 0.50 holds the bound 0.5: about 5 --seeds would tell" in said
    assert "a finer ladder would tell" in verdict(half=0.1, shape=0.6)[1]
    assert "up to 2.00%, the bound is 1.00%: more --seeds" in verdict(high=0.02)[1]
    assert "the best rate of the target is the last one: give more --octaves" in verdict(at_edge=("target",))[1]


def test_an_optimum_at_the_end_of_the_ladder_is_no_yes_but_may_be_a_no() -> None:
    short = (0.0, 1.0, 2.0)
    row = compare("s", "width=4", planted(0.0, short), planted(0.0, short))
    assert row.drift.octaves == 0 and row.regret.mean == 0
    assert row.at_edge == ("base", "target") and row.transferred == "undecided"
    row = compare("s", "width=4", planted(0.0), planted(-3.4))  # it would only be further away
    assert row.at_edge == ("target",) and row.transferred == "no"


def test_runs_that_all_diverge_are_a_result() -> None:
    gone = Curves(OCTAVES, ((math.inf,) * len(OCTAVES),) * 2)
    row = compare("s", "width=4", planted(0.0, seeds=2), gone)
    assert row.regret.mean == math.inf and row.transferred == "no" and "diverged" in row.why
    kept = Curves(OCTAVES, ((2.2, 2.1, 2.0, math.inf, math.inf, math.inf),) * 2)  # the base's rate diverges there
    row = compare("s", "width=4", planted(0.0, seeds=2), kept)
    assert row.regret.mean == math.inf and row.transferred == "no"
