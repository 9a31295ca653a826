"""What a coordinate check concludes: exponents with their intervals, and whether they are in bounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moe_param.statistics import half_width, slope

GROW, VANISH = 0.2, -0.6
"""Verdict: a change may not grow faster than size^0.2. It may fall as size^-0.5 where it is an average of many
independent parts (top_k experts, α·n hidden units, early logits), and not faster than size^-0.6. What is no such
average may do neither beyond 0.2, see `floor`."""

FADING = ("router_logits_by_input", "logits_by_input")
"""What initial weights make of a change of their input may fade where they fade themselves: initial router logits and
logits are meant to fall with size."""

FADES, AVERAGES = "its initial weights are meant to fade", "an average of ever more independent parts"

Status = Literal["passed", "failed", "undecided"]


@dataclass(frozen=True)
class Slope:
    """Exponent of size, with a 95% confidence interval over seeds (the interval is nan with one seed)."""

    value: float
    low: float
    high: float

    def holds(self, bound: float) -> bool:
        """Whether the bound is within the interval, so that these seeds do not tell on which side the exponent is."""
        return self.low <= bound <= self.high

    @property
    def interval(self) -> str:
        """`[-0.10, +0.05]`; nothing with one seed."""
        return "" if math.isnan(self.low) else f"[{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Verdict:
    """Whether one quantity behaves, and why; undecided where the seeds do not tell."""

    status: Status
    reason: str

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def fit(points: Iterable[tuple[int, float, float | None]]) -> Slope:
    """The exponent of size, fitted for each seed by itself.

    Args:
        points: (seed, factor, what was measured there); what is None, zero or not finite is left out.
    """
    per_seed: dict[int, list[tuple[float, float]]] = {}
    for seed, factor, measured in points:
        if measured is not None and 0 < measured < math.inf:
            per_seed.setdefault(seed, []).append((math.log(factor), math.log(measured)))
    slopes = [slope(*zip(*found)) for found in per_seed.values() if len(found) > 1]
    if not slopes:
        return Slope(math.nan, math.nan, math.nan)
    mean, half = statistics.fmean(slopes), half_width(slopes)
    return Slope(mean, math.nan, math.nan) if half is None else Slope(mean, mean - half, mean + half)


def floor(quantity: str, axis: str) -> float:
    """The exponent below which a change counts as vanishing. The number of experts makes an average of their sum alone.
    The residual stream is one on depth, where in the first steps layers add up independently."""
    if quantity in FADING:
        return -math.inf
    if axis == "num_experts":
        return VANISH if quantity == "moe_output" else -GROW
    return -GROW if quantity == "residual" and axis != "depth" else VANISH


def judge(quantity: str, change: Slope, axis: str) -> Verdict:
    """The verdict on one quantity by how its change scales; with one seed, which has no interval, by the value."""
    lowest = floor(quantity, axis)
    power = f"{axis}^{change.value:+.2f}"
    if math.isnan(change.value):
        return Verdict("undecided", "it did not change, so there is nothing to fit")
    for bound in (lowest, GROW):
        if change.holds(bound):
            return Verdict("undecided", f"{power}, but {change.interval} holds the bound {bound:+.1f}: more seeds")
    if change.value > GROW:
        return Verdict("failed", f"its change grows as {power}")
    if change.value < lowest:
        return Verdict("failed", f"its change vanishes as {power}")
    why = "it stays" if change.value >= -GROW else FADES if quantity in FADING else AVERAGES
    return Verdict("passed", f"{power}: {why}" + ("" if change.interval else " (one seed, no interval)"))


def overall(statuses: Iterable[Status]) -> Status:
    """Failed where one failed, else undecided where one is."""
    found = set(statuses)
    return "failed" if "failed" in found else "undecided" if "undecided" in found else "passed"
