"""What one would do without a base: search learning rate × init std at the target, under a rival parameterization."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moe_param.statistics import half_width

QUANTILES = (0.1, 0.5, 0.9)
"""Of the best loss so far, over the orders in which a grid may be gone through."""


@dataclass(frozen=True)
class Trial:
    """One point of a search, with one seed."""

    octave: float  # from the config's learning rate
    init_std: float
    seed: int


@dataclass(frozen=True)
class Search:
    """A grid at one target, which grows while its best point is at an edge.

    constants: whether the base's constants per role are applied.
    """

    spec: str
    target: str
    constants: bool
    octaves: tuple[float, ...]
    init_stds: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.spec} {'with' if self.constants else 'without'} the base's constants"

    @property
    def points(self) -> int:
        return len(self.octaves) * len(self.init_stds)

    @property
    def trials(self) -> list[Trial]:
        return [Trial(*point) for point in itertools.product(self.octaves, self.init_stds, self.seeds)]

    def key(self, trial: Trial) -> str:
        """In the ledger."""
        kind = "constants" if self.constants else "plain"
        return f"search/{self.spec}/{self.target}/{kind}/{trial.init_std:g}/{trial.octave:g}/{trial.seed}"

    def mean(self, losses: Mapping[Trial, float], octave: float, init_std: float) -> float:
        return statistics.fmean(losses[Trial(octave, init_std, seed)] for seed in self.seeds)

    def best(self, losses: Mapping[Trial, float]) -> tuple[float, float]:
        """(octave, init std) of the lowest mean over the seeds."""
        return min(itertools.product(self.octaves, self.init_stds), key=lambda point: self.mean(losses, *point))

    def grown(
        self, losses: Mapping[Trial, float], octaves: Sequence[float], stds: Sequence[float], most: int
    ) -> Search:
        """With one rung more at every edge that the best point is at; itself where it is at none.

        Args:
            octaves, stds: the ladders as they were asked for.
            most: rungs that an end of a ladder may get.
        """
        octave, std = self.best(losses)
        if not math.isfinite(self.mean(losses, octave, std)):
            return self
        logs = [math.log2(value) for value in self.init_stds]
        more = longer(logs, math.log2(std), [math.log2(value) for value in stds], most)
        return replace(
            self,
            octaves=longer(self.octaves, octave, octaves, most),
            init_stds=tuple(sorted({*self.init_stds, *(2.0**rung for rung in more if rung not in logs)})),
        )


def longer(rungs: Sequence[float], best: float, first: Sequence[float], most: int) -> tuple[float, ...]:
    """A ladder with one rung more where `best` is at an end of it that has got fewer than `most` since `first`."""
    rungs = sorted(rungs)
    if len(first) < 2:
        return tuple(rungs)  # what is not searched is not at an edge
    added = {-1: sum(rung < min(first) for rung in rungs), 1: sum(rung > max(first) for rung in rungs)}
    if best == rungs[0] and added[-1] < most:
        return (rungs[0] - (rungs[1] - rungs[0]), *rungs)
    if best == rungs[-1] and added[1] < most:
        return (*rungs, rungs[-1] + (rungs[-1] - rungs[-2]))
    return tuple(rungs)


def init_ladder(stds: Sequence[float], tuned: float | None) -> tuple[float, ...]:
    """The init stds of a search that knows the base's: it takes the place of the rung nearest to it, so that knowing
    more does not cost the search more."""
    if tuned is None or not stds:
        return tuple(sorted(stds))
    nearest = min(stds, key=lambda std: abs(math.log(std / tuned)))
    return tuple(sorted({tuned if std == nearest else std for std in stds}))


def best_so_far(losses: Sequence[float], quantile: float) -> list[float]:
    """After 1, 2, … runs of a grid in random order, without luck: this quantile of the lowest loss so far.

    Exact: the lowest of k runs out of n is the i-th best or better unless all k are among the n - i others.
    """
    ordered, total = sorted(losses), len(losses)

    def reaches(i: int, k: int) -> float:
        """Probability that the lowest of k runs is one of the i best."""
        return 1.0 - math.comb(total - i, k) / math.comb(total, k)

    return [
        next(ordered[i - 1] for i in range(1, total + 1) if reaches(i, k) >= quantile - 1e-12)
        for k in range(1, total + 1)
    ]


@dataclass(frozen=True)
class Found:
    """What a search came to.

    octave, init_std: the best point over the seeds. of_seeds: the lowest loss of every seed's own search, which trains
    every point once; its luck included. loss: their mean. so_far: quantile → the lowest loss after 1, 2, … runs in
    random order, mean over the seeds. at_edge: "learning rate", "init std" where the best is the last rung, though the
    ladder was made longer.
    """

    search: Search
    octave: float
    init_std: float
    of_seeds: tuple[float, ...]
    so_far: Mapping[float, list[float]]
    at_edge: tuple[str, ...]

    @property
    def loss(self) -> float:
        return statistics.fmean(self.of_seeds)

    def runs_to(self, loss: float) -> int | None:
        """After how many runs half of all orders have found this loss or a lower one; None: the whole grid has not."""
        return next((k for k, best in enumerate(self.so_far[0.5], 1) if best <= loss), None)

    def gain(self, losses: Mapping[int, float]) -> tuple[float, float | None]:
        """(how far other runs, by seed, are below the best of the search, relative; half of the 95% interval)."""
        seeds = self.search.seeds
        gains = [
            (best - losses[seed]) / best if math.isfinite(best) else 1.0 for seed, best in zip(seeds, self.of_seeds)
        ]
        return statistics.fmean(gains), half_width(gains)


def conclude(search: Search, losses: Mapping[Trial, float]) -> Found:
    """The result of a search whose trials are all done."""
    octave, std = search.best(losses)
    of_seeds = [[losses[trial] for trial in search.trials if trial.seed == seed] for seed in search.seeds]
    so_far = {
        quantile: [statistics.fmean(step) for step in zip(*(best_so_far(own, quantile) for own in of_seeds))]
        for quantile in QUANTILES
    }
    ladders = (("learning rate", octave, search.octaves), ("init std", std, search.init_stds))
    at_edge = tuple(name for name, best, rungs in ladders if len(rungs) > 1 and best in (rungs[0], rungs[-1]))
    return Found(search, octave, std, tuple(min(own) for own in of_seeds), so_far, at_edge)
