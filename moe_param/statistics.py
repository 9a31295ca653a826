"""Student's t and what we do with it, once: intervals over seeds, paired tests, slopes and vertices.

scipy is imported where it is used: `import moe_param` and the checks that need no interval do without it.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

import numpy as np


@functools.cache
def t_quantile(tail: float, freedom: float) -> float:
    """The t that Student's t with `freedom` degrees of freedom exceeds with probability `tail` (one-sided)."""
    from scipy import stats

    return float(stats.t.isf(tail, freedom))


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Half the width of the confidence interval of the mean of `values`; None where fewer than two leave no spread."""
    if len(values) < 2:
        return None
    quantile = t_quantile((1 - confidence) / 2, len(values) - 1)
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def paired_threshold(gains: Sequence[float], spreads: Sequence[float], error_rate: float) -> float:
    """What the mean of `gains` must exceed to count: a one-sided paired t-test over the seeds.

    The paired differences of a few seeds tell their own spread badly, so the spread of all candidates judged so far is
    used, or the candidate's own where that is larger. Of those the median: a candidate that is far off scatters more,
    and must not hide what the others gain.

    Args:
        gains: one per seed, at least two.
        spreads: variances over the seeds, of every candidate judged so far (of as many seeds as `gains` has).
        error_rate: the probability with which a candidate that changes nothing may pass.

    Returns:
        The threshold; 0 where there is no spread to compare with (against a point that diverged).
    """
    from scipy import stats

    if not spreads or not all(map(math.isfinite, gains)):
        return 0.0
    freedom = len(gains) - 1
    pooled = statistics.median(spreads) * freedom / float(stats.chi2.median(freedom))
    spread = max(pooled, statistics.variance(gains))
    # A median is worth about half as many observations as a mean.
    quantile = t_quantile(error_rate, max(freedom, freedom * len(spreads) // 2))
    return quantile * math.sqrt(spread / len(gains))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line through the points (x, y); at least two different x."""
    return statistics.linear_regression(x, y).slope


def parabola_vertex(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The x at which the least-squares parabola through (x, y) is lowest; None where it does not open upwards."""
    curvature, gradient, _ = np.polyfit(x, y, 2)
    return float(-gradient / (2 * curvature)) if curvature > 0 else None
