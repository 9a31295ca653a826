"""What to try next. Every strategy is a pure function of the results: nothing else is to be restored after a crash.

`Grid` and `Coordinate` are lists; `Staged` runs a search that is written as if it trained right there (`stages.py`),
from its start each time, until it asks for a run that nobody has done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moe_param.tuning.constants import Pass, coordinate_pass
from moe_param.tuning.points import Point, Results, key_of, over_seeds
from moe_param.tuning.stages import Course, Plan, replay

SAMPLERS = ("tpe", "gp", "cmaes")


class Wanted(NamedTuple):
    """A run without a result. `point` None: one for the sampler to choose. `rival`: the point it has to keep up with,
    seed by seed, or be stopped."""

    point: Point | None
    seed: int
    rival: Point | None = None


class Strategy(Protocol):
    def wanted(self, results: Results) -> Sequence[Wanted]:
        """Runs still without a result, the most urgent first; none: all is done."""

    def expected(self, results: Results) -> float:
        """How many runs it will have taken, as far as can be told."""


@dataclass(frozen=True)
class Grid:
    """Every point with every seed."""

    points: tuple[Point, ...]
    seeds: tuple[int, ...] = (0,)

    def wanted(self, results: Results) -> list[Wanted]:
        decided = over_seeds(results, self.seeds)
        return [
            Wanted(point, seed)
            for seed in self.seeds  # a whole picture first, then its noise
            for point in self.points
            if key_of(point) not in decided and seed not in results.get(key_of(point), {})
        ]

    def expected(self, results: Results) -> float:
        return len(self.points) * len(self.seeds)


@dataclass(frozen=True)
class Coordinate:
    """The paper's pass over the constants, every candidate with every seed (Appendix D.1)."""

    start: Point
    coordinates: tuple[str, ...]
    factors: tuple[float, ...] = (0.25, 4.0)
    lr_factors: tuple[float, ...] = (0.5, 2.0)
    error_rate: float = 0.05
    seeds: tuple[int, ...] = (0, 1, 2)

    def replay(self, results: Results) -> Pass:
        return coordinate_pass(
            self.start,
            self.coordinates,
            over_seeds(results, self.seeds),
            factors=self.factors,
            lr_factors=self.lr_factors,
            error_rate=self.error_rate,
        )

    def wanted(self, results: Results) -> list[Wanted]:
        return [
            Wanted(point, seed)
            for key, point in self.replay(results).wanted.items()
            for seed in self.seeds
            if seed not in results.get(key, {})
        ]

    def expected(self, results: Results) -> float:
        points = max(len(results), 1 + len(self.coordinates) * len(self.factors) + len(self.lr_factors))
        return points * len(self.seeds)


@dataclass(frozen=True)
class Staged:
    """A plan of `stages.py` within a budget. `ranges` are the sampler's, where the plan asks one."""

    plan: Plan
    budget: float
    sampler: str | None = None  # one of SAMPLERS
    ranges: Mapping[str, tuple[float, float]] | None = None
    fixed: Point | None = None

    def course(self, results: Results) -> Course:
        return replay(self.plan, results)

    def wanted(self, results: Results) -> list[Wanted]:
        return [Wanted(*run) for run in self.course(results).wanted]

    def expected(self, results: Results) -> float:
        return self.budget
