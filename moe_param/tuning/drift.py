"""Where the best learning rate is at a base and at a target: how far it moved, what keeping the base's costs, and
whether that is within bounds.

How the estimates were chosen: `tests/tuning/test_drift.py` draws noisy curves of four shapes (a parabola, one side
steeper than the other, a flat bottom, a cliff) with known optima and counts how often the intervals hold the truth.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moe_param.statistics import half_width, parabola_vertex, t_quantile

NEAR, WIDE = 0.03, 0.10
"""Rungs whose loss is within this share of the best one's are what the optimum is read off; and those of the second,
coarser reading, which tells how much the answer depends on the curve's being no parabola."""

HUGE = 5.0
"""So many times the bound is a regret that one seed is enough for."""

MOST_SEEDS = 30
"""More seeds than that are not recommended."""

Status = Literal["yes", "no", "undecided"]


@dataclass(frozen=True)
class Bounds:
    """What counts as transferred: the optimum within so many octaves, at most this share of the loss given up."""

    drift: float = 0.5
    regret: float = 0.01


@dataclass(frozen=True)
class Run:
    """One rung of one ladder."""

    spec: str
    target: str  # "base", or as on the command line
    octave: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.spec}/{self.target}/{self.octave:g}/{self.seed}"


@dataclass(frozen=True)
class Curves:
    """Loss against learning rate, one line per seed; inf where a run diverged."""

    octaves: tuple[float, ...]  # from the config's learning rate, ascending
    of_seeds: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, losses: Mapping[Run, float], spec: str, target: str) -> Curves:
        """The ladder of one parameterization at one size, as far as it was run."""
        own = [run for run in losses if run.spec == spec and run.target == target]
        octaves, seeds = sorted({run.octave for run in own}), sorted({run.seed for run in own})
        return cls(
            tuple(octaves),
            tuple(tuple(losses[Run(spec, target, octave, seed)] for octave in octaves) for seed in seeds),
        )

    @property
    def mean(self) -> list[float]:
        """Over the seeds; inf if one of them diverged."""
        return [statistics.fmean(column) for column in zip(*self.of_seeds)]

    @property
    def spread(self) -> list[float]:
        """Standard deviations over the seeds; 0 where there is none."""
        return [
            statistics.stdev(column) if len(column) > 1 and all(map(math.isfinite, column)) else 0.0
            for column in zip(*self.of_seeds)
        ]

    @property
    def best(self) -> int:
        """The rung of the lowest mean loss."""
        return int(np.argmin(self.mean))

    @property
    def edge(self) -> int:
        """An optimum at an end of the ladder may lie beyond it: -1 at the low end, 1 at the high end, else 0."""
        if not math.isfinite(self.mean[self.best]):
            return 0
        return -1 if self.best == 0 else 1 if self.best == len(self.octaves) - 1 else 0

    def window(self, within: float) -> slice:
        """The best rung, its neighbours, and what follows them whose mean loss is within this share of the best."""
        mean, best = self.mean, self.best
        low, high = max(0, best - 1), min(len(mean), best + 2)
        limit = mean[best] * (1 + within)
        while low > 0 and mean[low - 1] <= limit:
            low -= 1
        while high < len(mean) and mean[high] <= limit:
            high += 1
        finite = [i for i in range(low, high) if math.isfinite(mean[i])] or [best]
        return slice(finite[0], finite[-1] + 1)

    def optima(self, within: float = NEAR) -> list[float]:
        """Each seed's best octave, read off the rungs that are best over all seeds.

        One window for all seeds: a seed whose noise puts its best rung elsewhere is no reason to look elsewhere.
        """
        near = self.window(within)
        return [vertex(self.octaves[near], losses[near]) for losses in self.of_seeds]


def vertex(octaves: Sequence[float], losses: Sequence[float]) -> float:
    """Of the least-squares parabola through all rungs, kept within them; the best rung where there is none."""
    best = int(np.argmin(losses))
    if not math.isfinite(losses[best]):
        return math.nan
    lowest = parabola_vertex(octaves, losses) if len(octaves) >= 3 and all(map(math.isfinite, losses)) else None
    return float(octaves[best]) if lowest is None else float(np.clip(lowest, octaves[0], octaves[-1]))


@dataclass(frozen=True)
class Drift:
    """How far the best rate moved from base to target, in octaves.

    of_seeds: paired, as a seed has the same batches at both. seeds: half of the 95% interval over the seeds (Student's
    t), None for one seed. shape: how far the mean moves when the rungs within `WIDE` are read instead of those within
    `NEAR`, which is what the interval over the seeds does not see.
    """

    of_seeds: tuple[float, ...]
    seeds: float | None
    shape: float

    @property
    def octaves(self) -> float:
        return statistics.fmean(self.of_seeds)

    @property
    def half(self) -> float | None:
        """Half of the interval that is reported."""
        return None if self.seeds is None else self.seeds + self.shape


def drift_of(base: Curves, target: Curves) -> Drift:
    """Paired over the seeds."""

    def read(within: float) -> list[float]:
        return [moved - start for start, moved in zip(base.optima(within), target.optima(within))]

    near = read(NEAR)
    if not all(map(math.isfinite, near)):
        return Drift(tuple(near), None, 0.0)
    shape = abs(statistics.fmean(read(WIDE)) - statistics.fmean(near))
    return Drift(tuple(near), half_width(near), shape)


@dataclass(frozen=True)
class Regret:
    """What is lost by training the target with the best rung of the base, relative to the target's own best rung.

    of_seeds: between these two rungs, paired. low, high: 95% interval, None for one seed. The upper end is over all
    rungs near the target's best, because noise may have hidden which of them is the best.
    """

    of_seeds: tuple[float, ...]
    low: float | None
    high: float | None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.of_seeds)


def regret_of(base: Curves, target: Curves) -> Regret:
    """Paired over the seeds; infinite where the base's rate, or every rate, diverges at the target."""
    best = target.mean[target.best]
    octave = base.octaves[base.best]
    if octave not in target.octaves or not math.isfinite(best):
        return Regret((math.inf,) * len(target.of_seeds), None, None)
    kept = target.octaves.index(octave)

    def lost(rung: int) -> list[float]:
        return [(losses[kept] - losses[rung]) / best for losses in target.of_seeds]

    found = tuple(lost(target.best))
    if not all(map(math.isfinite, found)):
        return Regret((math.inf,) * len(found), math.inf, math.inf)
    if len(found) < 2:
        return Regret(found, None, None)
    near = target.window(NEAR)
    against = [lost(rung) for rung in range(near.start, near.stop)]
    high = max(statistics.fmean(values) + (half_width(values) or 0.0) for values in against)
    low = statistics.fmean(found) - (half_width(found) or 0.0)
    return Regret(found, max(0.0, low), max(0.0, high))


@dataclass(frozen=True)
class Row:
    """One target under one parameterization, beside its base.

    The dicts have the keys "base" and "target". octaves: the rungs. losses: means over the seeds. spread: their
    standard deviations. optimum: the best octave. best_loss: the target's. at_edge: where the best rung is the last of
    its ladder. transferred: yes, no or undecided; why: the reason, and what would settle it.
    """

    spec: str
    target: str
    octaves: Mapping[str, tuple[float, ...]]
    losses: Mapping[str, list[float]]
    spread: Mapping[str, list[float]]
    optimum: Mapping[str, float]
    drift: Drift
    regret: Regret
    best_loss: float
    at_edge: tuple[str, ...]
    transferred: Status
    why: str


def compare(spec: str, target: str, base: Curves, grown: Curves, bounds: Bounds = Bounds()) -> Row:
    """One target against its base."""
    at = {"base": base, "target": grown}
    drift, regret = drift_of(base, grown), regret_of(base, grown)
    at_edge = tuple(name for name, curves in at.items() if curves.edge)
    status, why = judge(drift, regret, at_edge, bounds)
    return Row(
        spec,
        target,
        {name: curves.octaves for name, curves in at.items()},
        {name: curves.mean for name, curves in at.items()},
        {name: curves.spread for name, curves in at.items()},
        {name: statistics.fmean(curves.optima()) for name, curves in at.items()},
        drift,
        regret,
        grown.mean[grown.best],
        at_edge,
        status,
        why,
    )


def judge(drift: Drift, regret: Regret, at_edge: Sequence[str], bounds: Bounds) -> tuple[Status, str]:
    """(yes, no or undecided, why).

    No where an interval is outside its bound: an optimum at the end of a ladder makes the drift look smaller than it
    is, so that it does not excuse one that is too large. Yes where both intervals are within and no optimum is at an
    end. One seed leaves no interval: undecided, unless the regret is outside by far.
    """
    if not all(map(math.isfinite, drift.of_seeds)):
        return "no", "every rate of a ladder diverged, at the base or at the target"
    half, low, high = drift.half, regret.low, regret.high
    if low is not None and low > bounds.regret:
        return "no", f"keeping the base's rate costs {_percent(regret.mean)}, at least {_percent(low)} of the loss"
    if half is not None and abs(drift.octaves) - half > bounds.drift:
        return "no", f"the best rate moved by {drift.octaves:+.2f} octaves, {abs(drift.octaves) - half:.2f} at least"
    if half is None and regret.mean > HUGE * bounds.regret:
        return "no", f"keeping the base's rate costs {_percent(regret.mean)} of the loss, by far too much for one seed"
    if half is None or high is None:
        return "undecided", "one seed has no interval: give more --seeds"
    if at_edge:
        return "undecided", f"the best rate of the {' and the '.join(at_edge)} is the last one: give more --octaves"
    missing = list(_missing(drift, half, regret, high, bounds))
    return ("undecided", "; ".join(missing)) if missing else ("yes", "both intervals are within their bounds")


def _missing(drift: Drift, half: float, regret: Regret, high: float, bounds: Bounds) -> Iterable[str]:
    """What keeps the answer from being yes, and what would settle it."""
    room = abs(bounds.drift - abs(drift.octaves))  # to the bound, from within or from outside
    if abs(drift.octaves) + half > bounds.drift:
        said = f"the drift's interval {drift.octaves:+.2f} ± {half:.2f} holds the bound {bounds.drift:g}"
        if drift.shape > max(drift.seeds or 0.0, room):
            yield f"{said}: a finer ladder would tell (--octaves in half the steps)"
        else:
            yield f"{said}: {_more_seeds(drift.of_seeds, room - drift.shape)}"
    if high > bounds.regret:
        room = abs(bounds.regret - regret.mean)
        yield (
            f"the regret may be up to {_percent(high)}, the bound is {_percent(bounds.regret)}: "
            f"{_more_seeds(regret.of_seeds, room) if any(regret.of_seeds) else 'more --seeds would tell'}"
        )


def _more_seeds(of_seeds: Sequence[float], room: float) -> str:
    """How many seeds would leave an interval of half the width `room`, were they to scatter as these do."""
    spread = statistics.stdev(of_seeds)
    for seeds in range(len(of_seeds) + 1, MOST_SEEDS + 1):
        if room > 0 and t_quantile(0.025, seeds - 1) * spread / math.sqrt(seeds) <= room:
            return f"about {seeds} --seeds would tell"
    return "more --seeds would tell"


def _percent(share: float) -> str:
    return f"{share:.2%}"


def draw(rows: Sequence[Mapping[str, Any]], lr: float) -> Any:
    """A panel for each target (across) and spec (down): loss against learning rate, at the base and at the target.

    Args:
        rows: those of transfer.json's summary, with infinity and NaN where it has null.
        lr: octave 0.
    """
    from matplotlib.figure import Figure

    specs, targets = (list(dict.fromkeys(row[name] for row in rows)) for name in ("spec", "target"))
    figure = Figure(figsize=(3.4 * len(targets), 3.0 * len(specs)), layout="constrained")
    panels = figure.subplots(len(specs), len(targets), squeeze=False, sharex=True, sharey="col")
    found = {(row["spec"], row["target"]): row for row in rows}
    for (i, spec), (j, target) in itertools.product(enumerate(specs), enumerate(targets)):
        _panel(panels[i][j], found[spec, target], lr)
    for axes in panels[-1]:
        axes.set_xlabel("learning rate")
    for line in panels:
        line[0].set_ylabel("validation loss")
    return figure


def _panel(axes: Any, row: Mapping[str, Any], lr: float) -> None:
    """One spec at one target, beside the base."""
    for name, colour in (("base", "tab:blue"), ("target", "tab:orange")):
        rates, losses = [lr * 2.0**octave for octave in row["octaves"][name]], np.array(row["losses"][name])
        label = "base" if name == "base" else row["target"]
        axes.errorbar(rates, losses, row["spread"][name], fmt="o-", ms=3, color=colour, label=label, capsize=2)
        if math.isfinite(row["optimum"][name]):
            axes.axvline(lr * 2.0 ** row["optimum"][name], color=colour, linestyle=":")
    low = min([*row["losses"]["base"], *row["losses"]["target"]])
    if math.isfinite(low):  # what diverges may leave the picture
        axes.set_ylim(top=min(axes.get_ylim()[1], low * 1.35))
    axes.set_xscale("log", base=2)
    half = "" if row["drift_interval"] is None else f" ± {row['drift_interval']:.2f}"
    drift = f"drift {row['drift_octaves']:+.2f}{half}, regret {row['regret']:.1%}"
    axes.set_title(f"{row['spec']}: {said(row['transferred'])}\n{drift}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def said(transferred: str | bool) -> str:
    """yes, no or undecided, also of a file of version 0.1, where it was true or false."""
    return transferred if isinstance(transferred, str) else "yes" if transferred else "no"
