"""The search that `moe-param tune` makes unless it is told another one: three stages within a budget of runs.

1. *Zoom*: learning rate and init std together, one seed. Steps of ×4 and ×3 from the start until nothing
   is better, then steps of half that. Runs that cannot catch up are stopped.
2. *Constants* per role (arXiv:2601.20205, Appendix D.1), all together (`surface.py`). What comes out is run with all
   seeds, and kept where it wins beyond their noise.
3. *Ladders*: init std and learning rate once more, with all seeds, up to four times the best rate: one at the edge of a
   cliff is left for a lower one that is as good.

A stage is written as if it trained right there: it yields the runs it needs and is sent their results. `replay` runs a
plan through what is known and stops where a run is missing, so machines can share a search and a killed one goes on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moe_param.statistics import t_quantile
from moe_param.tuning.constants import Judgement, gains_of
from moe_param.tuning.points import Losses, Point, Result, Results, canonical, key_of, moved
from moe_param.tuning.surface import Quadratic, fit

Run = tuple[Point | None, int]
"""A point and a seed. None: a point for the sampler to choose."""

RATE_STEPS, STD_STEPS = (4.0, 2.0), (3.0, 3.0**0.5)
ALIKE, CLIFF = 0.0025, 0.02
"""Of the loss: rates that are as good as the best, and how much worse twice the rate is at the edge of a cliff."""
CLEARLY = 0.005
"""Of the loss: what another init std has to gain in the last ladder."""


class Ask(NamedTuple):
    """Runs that a stage needs. `rival`: whom they have to keep up with."""

    runs: Sequence[Run]
    rival: Point | None = None


Answers = Mapping[tuple[str, int], Result]
"""(key of the point, seed) → result."""


class Choice(NamedTuple):
    """Where a plan ended."""

    point: Point
    losses: Losses


class Rung(NamedTuple):
    """A learning rate of the last ladder."""

    rate: float
    losses: Losses


class Effect(NamedTuple):
    """A number of the second stage: where it ended (octaves from where it began), what that gains (share of the loss,
    by the fit) and the standard error of the gain."""

    name: str
    octaves: float
    gain: float
    error: float


@dataclass
class Course:
    """How far a plan has come, and what it found on the way."""

    results: Results
    stage: str = ""
    spent: float = 0.0  # full runs that the plan asked for and got
    spent_in: dict[str, float] = field(default_factory=dict)
    wanted: list[tuple[Point | None, int, Point | None]] = field(default_factory=list)  # empty when it is done
    moves: list[tuple[str, Point, float]] = field(default_factory=list)  # stage, point, loss with the first seed
    judgements: list[Judgement] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)  # of the constants: what the fit says of each number
    rungs: list[Rung] = field(default_factory=list)
    at_edge: bool = False  # the best rate is at an end of the last ladder
    choice: Choice | None = None
    seen: set[tuple[str, int]] = field(default_factory=set)

    def enter(self, stage: str) -> None:
        self.stage = stage
        self.spent_in.setdefault(stage, 0.0)

    def charge(self, run: tuple[str, int], result: Result) -> None:
        """Counts a run once, by the share of its steps that were done."""
        if run not in self.seen:
            self.seen.add(run)
            self.spent += result.share
            self.spent_in[self.stage] = self.spent_in.get(self.stage, 0.0) + result.share


Stage = Generator[Ask, Answers, Point]
Plan = Callable[[Course], Generator[Ask, Answers, Choice]]


def replay(plan: Plan, results: Results) -> Course:
    """The plan, as far as the results carry it; `Course.wanted` are the runs it needs to go on."""
    course = Course(results)
    steps = plan(course)
    try:
        ask = next(steps)
        while True:
            missing = [run for run in ask.runs if not _known(run, results)]
            course.wanted += [(point, seed, ask.rival) for point, seed in missing]
            if missing:
                return course
            ask = steps.send(_answers(ask, course))
    except StopIteration as end:
        course.choice = end.value
    return course


def _known(run: Run, results: Results) -> bool:
    point, seed = run
    return point is not None and seed in results.get(key_of(point), {})


def _answers(ask: Ask, course: Course) -> Answers:
    """What was asked for, and counted."""
    found = {}
    for point, seed in ask.runs:
        assert point is not None, "a sampler's points are read from the results"
        run = key_of(point), seed
        found[run] = course.results[run[0]][seed]
        course.charge(run, found[run])
    return found


# -- stages -----------------------------------------------------------------------------------------------------------
def staged(start: Point, coordinates: Sequence[str], seeds: Sequence[int], budget: float) -> Plan:
    """Zoom, constants, ladder.

    Args:
        start: with learning_rate and init_std.
        coordinates: constants that may be changed, as `router.lr`.
        seeds: the first is what the search looks at, all decide.
        budget: in full runs; see `least_budget`.
    """

    def plan(course: Course) -> Generator[Ask, Answers, Choice]:
        left = budget - ladder_cost(seeds)
        course.enter("zoom")
        point = yield from zoom(course, canonical(start), seeds[0], ZOOM_SHARE * left if coordinates else left)
        if coordinates:
            course.enter("constants")
            point = yield from constants(course, point, coordinates, seeds, left)
        course.enter("ladder")
        return (yield from ladders(course, point, seeds, budget))

    return plan


ZOOM_SHARE = 0.18
"""Of the budget before the ladder, where there are constants to be found."""


def sampled(count: int, seeds: Sequence[int], finalists: int = 3) -> Plan:
    """`count` points of a sampler with the first seed, the best of them with all seeds, then the ladder."""

    def plan(course: Course) -> Generator[Ask, Answers, Choice]:
        course.enter("samples")
        known = [key for key, of_seed in course.results.items() if seeds[0] in of_seed][:count]
        for key in known:
            course.charge((key, seeds[0]), course.results[key][seeds[0]])
        if len(known) < count:
            yield Ask([(None, seeds[0])] * (count - len(known)))
        known.sort(key=lambda key: course.results[key][seeds[0]].loss)
        points = [point_of(key) for key in known[:finalists]]
        course.enter("finalists")
        losses = yield from measure(points, seeds)
        best = min(points, key=lambda point: statistics.fmean(losses[key_of(point)]))
        course.enter("ladder")
        return (yield from ladders(course, best, seeds, math.inf))

    return plan


def point_of(key: str) -> Point:
    """The point whose key this is."""
    return {name: float(value) for name, value in (part.split("=") for part in key.split())}


def ladder_cost(seeds: Sequence[int]) -> int:
    """Runs of the last stage where the optimum stays: five rungs with all seeds, one with the first."""
    return 5 * len(seeds) + 1


def least_budget(coordinates: Sequence[str], seeds: Sequence[int]) -> int:
    """A step of the zoom, one constant up and down and what comes of it with all seeds, the ladder."""
    constants = 2 + len(JUMPS) * len(seeds) + len(seeds) - 1
    return 5 + (constants if coordinates else 0) + ladder_cost(seeds)


def ordered(names: Sequence[str]) -> list[str]:
    """Those of WORTH first, in its order: what a small budget begins with."""
    return sorted(names, key=lambda name: WORTH.index(name) if name in WORTH else len(WORTH))


WORTH = (
    *("embedding.lr", "unembedding.init", "router.lr", "unembedding.lr", "expert_down.init", "attention_value.init"),
    *("expert_down.lr", "attention_in.lr", "expert_up.lr", "attention_in.init", "embedding.init", "expert_up.init"),
    *("attention_out.lr", "attention_out.init", "attention_value.lr", "router.init", "norm.lr", "final_norm.lr"),
)
"""The order in which constants are tried: what gained most in our measurements first."""


def measure(
    points: Sequence[Point], seeds: Sequence[int], rival: Point | None = None
) -> Generator[Ask, Answers, dict[str, Losses]]:
    """key → loss of each seed, of every point."""
    answers = yield Ask([(point, seed) for seed in seeds for point in points], rival)
    return {key_of(point): tuple(answers[key_of(point), seed].loss for seed in seeds) for point in points}


def zoom(course: Course, start: Point, seed: int, limit: float) -> Stage:
    """Learning rate and init std, to whichever neighbour is best, until none is better."""
    current = start
    for rate_step, std_step in zip(RATE_STEPS, STD_STEPS):
        steps = [("learning_rate", rate_step), ("learning_rate", 1 / rate_step), ("init_std", std_step)]
        steps += [("init_std", 1 / std_step)]
        while course.spent + 1 <= limit:
            points = [current, *(moved(current, name, step) for name, step in steps)]
            losses = yield from measure(points, [seed], rival=current)
            best = min(points, key=lambda point: losses[key_of(point)])
            if not math.isfinite(losses[key_of(best)][0]):
                best = moved(current, "learning_rate", rate_step**-2)  # everything diverged: far lower
            course.moves.append((course.stage, best, losses.get(key_of(best), (math.inf,))[0]))
            if best == current:
                break
            current = best
    return current


def constants(
    course: Course, base: Point, names: Sequence[str], seeds: Sequence[int], limit: float
) -> Generator[Ask, Answers, Point]:
    """Every constant up and down, one at a time; then all together to where the fit is lowest, and again from there.

    What comes out is kept where it wins with all seeds, beyond their noise, over what the stage began with.
    """
    tried = Tried(base, tuple(names), [], [], [])
    center, order = np.zeros(len(names)), ordered(names)
    start = best = (yield from tried.measure([center], seeds))[0]
    if not all(map(math.isfinite, start)):
        return base  # the ladder will look for a rate that does not diverge
    while (left := int(limit - course.spent - len(JUMPS) * len(seeds))) >= 2:
        moves = [(name, sign) for name in order for sign in (1, -1)][:left]
        yield from tried.one_at_a_time(center, moves, seeds)
        jumps = jumps_to(center, tried.fit().lowest(center, REACH))
        losses = yield from tried.measure(jumps, seeds)
        lowest = min(range(len(jumps)), key=lambda i: statistics.fmean(losses[i]))
        if statistics.fmean(losses[lowest]) >= statistics.fmean(best):
            break
        center, best = jumps[lowest], losses[lowest]
        course.moves.append((course.stage, tried.point(center), best[0]))
        gains, _ = tried.fit().gain(center)
        order = [name for _, name in sorted(zip(-np.abs(gains), names))]
    course.effects = tried.effects(center)
    if not center.any():
        return base
    quadratic = tried.fit()
    noise = quadratic.noise * statistics.fmean(start)
    judged = judge(tried.point(center), gains_of(start, best), noise, quadratic.freedom)
    course.judgements.append(judged)
    return judged.point if judged.accepted else base


@dataclass
class Tried:
    """The runs of the second stage: offsets of the constants (octaves from `base`), losses, seeds."""

    base: Point
    names: tuple[str, ...]
    offsets: list[np.ndarray]
    losses: list[float]
    seeds: list[int]

    def point(self, octaves: np.ndarray) -> Point:
        """The point that many octaves away."""
        moved = {name: self.base.get(name, 1.0) * 2.0 ** float(x) for name, x in zip(self.names, octaves)}
        return canonical({**self.base, **moved})

    def fit(self) -> Quadratic:
        return fit(self.offsets, self.losses, self.seeds)

    def effects(self, center: np.ndarray) -> list[Effect]:
        """What the fit says of every constant."""
        gains, errors = self.fit().gain(center)
        return [Effect(name, *map(float, values)) for name, *values in zip(self.names, center, gains, errors)]

    def measure(self, places: Sequence[np.ndarray], seeds: Sequence[int]) -> Generator[Ask, Answers, list[Losses]]:
        """The losses of each place with all seeds."""
        answers = yield Ask([(self.point(x), seed) for seed in seeds for x in places])
        found = [tuple(answers[key_of(self.point(x)), seed].loss for seed in seeds) for x in places]
        for x, losses in zip(places, found):
            self._add([x] * len(seeds), losses, seeds)
        return found

    def one_at_a_time(
        self, center: np.ndarray, moves: Sequence[tuple[str, int]], seeds: Sequence[int]
    ) -> Generator[Ask, Answers, None]:
        """A run for every move, a constant and a sign; each constant with the next seed."""
        offsets = [center + sign * STEP * (np.array(self.names) == name) for name, sign in moves]
        runs = [(self.point(x), seeds[i // 2 % len(seeds)]) for i, x in enumerate(offsets)]
        answers = yield Ask(runs, rival=self.point(center))
        self._add(offsets, [answers[key_of(point), seed].guess for point, seed in runs], [seed for _, seed in runs])

    def _add(self, offsets: Sequence[np.ndarray], losses: Sequence[float], seeds: Sequence[int]) -> None:
        self.offsets += offsets
        self.losses += losses
        self.seeds += seeds


def jumps_to(center: np.ndarray, goal: np.ndarray) -> list[np.ndarray]:
    """The whole way to the lowest point of the fit, and less of it; what hardly moves stays at 1."""
    points = [center + share * (goal - center) for share in JUMPS]
    return [np.where(np.abs(x) < NEGLIGIBLE, 0.0, x) for x in points]


STEP, REACH = 2.0, 2.0
"""Octaves that a run moves a constant by, and that the constants move by at a time."""
JUMPS = (1.0, 0.5)
"""Shares of the way to the lowest point of the fit that are run with all seeds."""
NEGLIGIBLE = 0.25
"""Octaves: a constant that is moved by less is 1."""


def judge(point: Point, gains: tuple[float, ...], noise: float, freedom: float) -> Judgement:
    """Whether the constants together win: whether their mean gain is beyond the noise of two runs a seed.

    Args:
        point: with the constants.
        gains: of each seed, in nats.
        noise: standard deviation of a run, in nats; freedom: the degrees of freedom it is known with. Three gains tell
            their own spread badly, so it is that of all runs of the stage.
    """
    gain = statistics.fmean(gains)
    needed = t_quantile(ERROR_RATE, freedom) * noise * math.sqrt(2 / len(gains))
    return Judgement("all constants together", 1.0, point, gains, gain, needed, gain > needed)


ERROR_RATE = 0.05
"""Of the test of what came out."""


def ladders(course: Course, current: Point, seeds: Sequence[int], budget: float) -> Generator[Ask, Answers, Choice]:
    """The last ladders, with all seeds: the init std, then the learning rate; then four times the rate with one seed.

    The std comes back here because one run says little of it, and it is worth more at a larger model than at the base.
    """
    if "init_std" in current:
        wide = yield from ladder(course, current, "init_std", seeds, budget - 2 * len(seeds) - 1)
        means = {factor: statistics.fmean(losses) for factor, losses in wide.items()}
        best = min(means, key=lambda factor: means[factor])
        if means[best] < means[1.0] * (1 - CLEARLY):
            current = moved(current, "init_std", best)
    rates = yield from ladder(course, current, "learning_rate", seeds, budget)
    means = {factor: statistics.fmean(losses) for factor, losses in rates.items()}
    best = min(means, key=lambda factor: means[factor])
    chosen = off_the_cliff(best, means)
    course.at_edge = best in (min(rates), max(rates))
    course.rungs = [Rung(current["learning_rate"] * factor, rates[factor]) for factor in sorted(rates)]
    point = moved(current, "learning_rate", chosen)
    if 4 * chosen not in rates:
        far = moved(point, "learning_rate", 4.0)
        course.rungs.append(Rung(far["learning_rate"], (yield from measure([far], seeds[:1]))[key_of(far)]))
    course.moves.append((course.stage, point, rates[chosen][0]))
    return Choice(point, rates[chosen])


def ladder(
    course: Course, current: Point, name: str, seeds: Sequence[int], budget: float
) -> Generator[Ask, Answers, dict[float, Losses]]:
    """Half, once and twice the number, and further while the best is at an end: factor → losses."""
    factors = [0.5, 1.0, 2.0]
    while True:
        losses = yield from measure([moved(current, name, factor) for factor in factors], seeds)
        found = {factor: losses[key_of(moved(current, name, factor))] for factor in factors}
        best = min(factors, key=lambda factor: statistics.fmean(found[factor]))
        if not math.isfinite(statistics.fmean(found[best])):
            factors.append(min(factors) / 4)  # everything diverged: far lower
        elif best in (min(factors), max(factors)):
            factors.append(best * 2 if best == max(factors) else best / 2)
        if factors[-1] in found or len(found) == MOST_RUNGS or course.spent + len(seeds) + 1 > budget:
            return found


MOST_RUNGS = 7
"""Of a last ladder, which is made longer while the best rate is at an end of it."""


def off_the_cliff(best: float, means: Mapping[float, float]) -> float:
    """The best rung; where twice its rate is far worse, half of it if that is as good."""
    steep = means.get(2 * best, math.inf) > means[best] * (1 + CLIFF)
    lower_is_alike = means.get(best / 2, math.inf) <= means[best] * (1 + ALIKE)
    return best / 2 if steep and lower_is_alike else best
