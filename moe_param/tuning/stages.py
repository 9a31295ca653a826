"""The search that `moe-param tune` makes unless it is told another one: three stages within a budget of runs.

1. *Zoom*: learning rate and init std together, one seed. Steps of ×4 and ×3 from the start until nothing
   is better, then steps of half that. Runs that cannot catch up are stopped.
2. *Constants* per role (arXiv:2601.20205, Appendix D.1), a few at a time with the learning rate: each ×4 and ×1/4 with
   one seed; what looks like a gain is run with all seeds, and where it wins beyond their noise the search goes on from
   there at once, because most constants only show what they are worth once the largest is right.
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

from moe_param.statistics import paired_threshold
from moe_param.tuning.constants import Judgement, gains_of
from moe_param.tuning.points import Losses, Point, Result, Results, canonical, key_of, moved

Run = tuple[Point | None, int]
"""A point and a seed. None: a point for the sampler to choose."""

RATE_STEPS, STD_STEPS = (4.0, 2.0), (3.0, 3.0**0.5)
ALIKE, CLIFF = 0.0025, 0.05
"""Of the loss: rates that are as good as the best, and how much worse twice the rate is at the edge of a cliff. (3% is
none: where twice the demo base's rate cost that, every larger model was as good there or better, by up to 2%.)"""
LARGER = 0.01
"""Of the loss: what a larger init std may cost at the base. A small model pays for a large std, with the accidents of
its few random weights, and a wide one does not: from 0.06 to 0.12 our demo's base loses 5%, its ×4 target nothing; from
0.06 to 0.03 they lose 1.4% and 3.8%. So what is alike at the base is not at the target, and the larger is the safer."""


class Ask(NamedTuple):
    """Runs that a stage needs. `rival`: whom they have to keep up with; None: they are needed whole."""

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
            missing = [run for run in ask.runs if not _known(run, results, ask.rival is None)]
            course.wanted += [(point, seed, ask.rival) for point, seed in missing]
            if missing:
                return course
            ask = steps.send(_answers(ask, course))
    except StopIteration as end:
        course.choice = end.value
    return course


def _known(run: Run, results: Results, whole: bool) -> bool:
    point, seed = run
    result = None if point is None else results.get(key_of(point), {}).get(seed)
    return result is not None and not (whole and result.stopped)


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
    constants = 2 * (GROUP + 1) + 2 * (len(seeds) - 1)
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
    """The constants, a group at a time, what is worth most first; kept where all of it together wins beyond noise."""
    start = Choice(base, (yield from measure([base], seeds))[key_of(base)])
    if not all(map(math.isfinite, start.losses)):
        return base  # the ladder will look for a rate that does not diverge
    best, ranked = start, ordered(names)
    for first in range(0, len(ranked), GROUP):
        look = (1 + first // GROUP) % len(seeds)  # not the seed that the start was lucky with, and another each time
        best = yield from climb(course, best, ("learning_rate", *ranked[first : first + GROUP]), seeds, look, limit)
    if best.point == base:
        return base
    judged = judge(Step("all of it together", 1.0), start, best, course.judgements, ERROR_RATE)
    course.judgements.append(judged)
    return judged.point if judged.accepted else base


def climb(
    course: Course, current: Choice, names: Sequence[str], seeds: Sequence[int], look: int, limit: float
) -> Generator[Ask, Answers, Choice]:
    """To whichever of these numbers, up or down, wins with all seeds; from there again, until none does.

    After a win only what had looked like a gain is looked at again, and the same number farther the same way.

    Args:
        look: index of the seed that every step is looked at with.
    """
    steps = [Step(name, factor) for name in names for factor in (RATE if name == "learning_rate" else CONSTANT)]
    while steps and course.spent + len(steps) + len(seeds) - 1 <= limit:
        points = {step: moved(current.point, *step) for step in steps}
        answers = yield Ask([(points[step], seeds[look]) for step in steps], rival=current.point)
        losses = {step: answers[key_of(points[step]), seeds[look]].loss for step in steps}
        judged = {key_of(judgement.point) for judgement in course.judgements}
        steps = [step for step in steps if losses[step] < current.losses[look] * (1 - PROMISING)]
        steps = sorted((step for step in steps if key_of(points[step]) not in judged), key=losses.__getitem__)
        if not steps:
            break
        after = Choice(points[steps[0]], (yield from measure([points[steps[0]]], seeds))[key_of(points[steps[0]])])
        course.judgements.append(judge(steps[0], current, after, course.judgements, STEP_ERROR_RATE))
        if course.judgements[-1].accepted:
            current = after
            course.moves.append((course.stage, current.point, current.losses[0]))
            steps = [step for step in steps if step == steps[0] or step.name != steps[0].name]
        else:
            steps = steps[1:]
    return current


class Step(NamedTuple):
    """A number times a factor."""

    name: str
    factor: float


GROUP = 3
"""Constants that are looked at together, up and down, with the learning rate: eight runs at a time."""
CONSTANT, RATE = (4.0, 0.25), (2.0, 0.5)
"""Factors that a constant and the learning rate move by."""
PROMISING = 0.005
"""Of the loss: what one run has to gain over that of the same seed for the other seeds to be run."""


def judge(step: Step, before: Choice, after: Choice, earlier: Sequence[Judgement], error_rate: float) -> Judgement:
    """Whether the mean gain over the seeds is beyond their noise.

    Args:
        earlier: what was judged so far, whose spreads over the seeds count too: three gains tell their own badly.
        error_rate: the probability with which a step that changes nothing may pass.
    """
    gains = gains_of(before.losses, after.losses)
    mean = statistics.fmean(gains)
    if len(gains) > 1 and math.isfinite(mean):
        finite = (each for each in (*(j.gains for j in earlier), gains) if all(map(math.isfinite, each)))
        spreads = [statistics.variance(each) for each in finite]
        needed = paired_threshold(gains, spreads, error_rate)
    else:
        needed = ONE_RUN * before.losses[0]
    return Judgement(step.name, step.factor, after.point, gains, mean, needed, mean > needed)


STEP_ERROR_RATE, ERROR_RATE = 0.1, 0.05
"""Of the test of one step, whose look at the first seed was a choice already, and of all steps together."""
ONE_RUN = 0.015
"""Of the loss: the noise of one run, which decides where there is only one seed."""


def ladders(course: Course, current: Point, seeds: Sequence[int], budget: float) -> Generator[Ask, Answers, Choice]:
    """The last ladders, with all seeds: the init std, then the learning rate; then four times the rate with one seed.

    The std comes back here because one run says little of it, and it is worth more at a larger model than at the base.
    """
    if "init_std" in current:
        wide = yield from ladder(course, current, "init_std", seeds, budget - 2 * len(seeds) - 1)
        means = {factor: statistics.fmean(losses) for factor, losses in wide.items()}
        alike = [factor for factor, mean in means.items() if mean <= min(means.values()) * (1 + LARGER) < math.inf]
        current = moved(current, "init_std", max(alike, default=1.0))
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
