"""Student's t against printed tables, intervals and the paired test against simulated seeds."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from moe_param.statistics import half_width, paired_threshold, parabola_vertex, slope, t_quantile


@pytest.mark.parametrize(
    ("freedom", "tail", "printed"),
    [
        *[(1, 0.05, 6.3138), (2, 0.05, 2.9200), (3, 0.025, 3.1824), (4, 0.005, 4.6041), (5, 0.01, 3.3649)],
        *[(8, 0.025, 2.3060), (9, 0.025, 2.2622), (10, 0.001, 4.1437), (19, 0.025, 2.0930), (30, 0.0005, 3.6460)],
        (60, 0.025, 2.0003),
    ],
)
def test_quantiles_are_those_of_the_tables(freedom: int, tail: float, printed: float) -> None:
    assert t_quantile(tail, freedom) == pytest.approx(printed, abs=6e-5)


@pytest.mark.parametrize("seeds", [2, 3, 9, 12])
def test_intervals_hold_the_mean_as_often_as_they_say(seeds: int) -> None:
    """95 in 100 of simulated experiments, for few seeds and for many (at nine, a normal quantile gives 91)."""
    draws = np.random.default_rng(seeds).normal(3.0, 0.5, (8000, seeds))
    covered = np.mean([abs(draw.mean() - 3.0) <= (half_width(draw.tolist()) or 0.0) for draw in draws])
    assert covered == pytest.approx(0.95, abs=0.008)  # three standard errors


def test_one_seed_has_no_interval() -> None:
    assert half_width([0.1]) is None and half_width([]) is None


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_a_change_that_does_nothing_rarely_wins(seeds: int) -> None:
    """The paired test keeps its error rate; the pooled spread, not three numbers' own, is what lets real gains pass."""
    random = np.random.default_rng(seeds)
    won = found = 0
    for _ in range(2000):
        gains = random.normal(0.0, 1.0, (20, seeds))  # 20 candidates judged before this one
        spreads = gains.var(axis=1, ddof=1).tolist()
        needed = paired_threshold(gains[-1].tolist(), spreads, 0.05)
        won += gains[-1].mean() > needed
        found += gains[-1].mean() + 4.0 > needed
    assert 0.01 < won / 2000 < 0.06
    assert found / 2000 > 0.85


def test_nothing_is_needed_against_a_diverged_point() -> None:
    assert paired_threshold([math.inf] * 3, [0.1], 0.05) == 0.0
    assert paired_threshold([0.1] * 3, [], 0.05) == 0.0


def test_slope_and_vertex_are_where_they_were_planted() -> None:
    x = [0.0, 1.0, 2.5, 4.0]
    assert slope(x, [3 - 0.7 * v for v in x]) == pytest.approx(-0.7)
    assert parabola_vertex(x, [2 * (v - 1.3) ** 2 + 5 for v in x]) == pytest.approx(1.3)
    assert parabola_vertex(x, [-((v - 1.3) ** 2) for v in x]) is None


def test_scipy_is_loaded_when_an_interval_is_asked_for() -> None:
    check = "import sys, moe_param, moe_param.statistics; sys.exit('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
