"""One pass over the constants of a base model (arXiv:2601.20205, Appendix D.1), and when a change counts as a gain.

Nothing here trains or stores: `coordinate_pass` replays the pass from the losses known so far and says which runs it
needs next. So any number of machines can share one, and a restarted one goes on where it was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moe_param.statistics import paired_threshold
from moe_param.tuning.points import Losses, Point, canonical, key_of, moved


@dataclass(frozen=True)
class Judgement:
    """One candidate against the point it would replace."""

    coordinate: str
    factor: float
    point: Point  # the candidate
    gains: tuple[float, ...]  # per seed, loss before minus loss after
    gain: float  # mean of them
    needed: float  # what the mean had to exceed
    accepted: bool


@dataclass
class Pass:
    """How far the pass has come."""

    current: Point
    judgements: list[Judgement] = field(default_factory=list)
    wanted: dict[str, Point] = field(default_factory=dict)  # runs it needs, the most urgent first; empty when done


def coordinate_pass(
    start: Point,
    coordinates: Sequence[str],
    results: Mapping[str, Losses],
    *,
    factors: Sequence[float],
    lr_factors: Sequence[float],
    error_rate: float,
) -> Pass:
    """Every coordinate once, the learning rate last: try the factors, keep what wins, go on from there.

    Where a step wins, the next one in the same direction is tried too. While a decision waits for its runs, those of
    the coordinates after it are listed as if nothing changed, which is what mostly happens: idle workers take them.
    """
    state = Pass(canonical(start))
    ladders = [(name, factors) for name in coordinates] + [("learning_rate", lr_factors)]
    tests = sum(len(ladder) for _, ladder in ladders)
    spreads: list[float] = []  # variances of the gains over the seeds, of every candidate judged
    for name, ladder in ladders:
        while ladder:
            candidates = [moved(state.current, name, factor) for factor in ladder]
            missing = {key_of(p): p for p in (state.current, *candidates) if key_of(p) not in results}
            if missing or state.wanted:
                state.wanted = {**state.wanted, **missing}
                break
            before = results[key_of(state.current)]
            gains = [gains_of(before, results[key_of(point)]) for point in candidates]
            spreads += [statistics.variance(gain) for gain in gains if all(map(math.isfinite, gain))]
            judged = []
            for factor, point, gain in zip(ladder, candidates, gains):
                needed = paired_threshold(gain, spreads, error_rate / tests)
                mean = statistics.fmean(gain)
                judged.append(Judgement(name, factor, point, gain, mean, needed, min(gain) > 0 and mean > needed))
            best = max((j for j in judged if j.accepted), key=lambda j: j.gain, default=None)
            # Two candidates can both win; one is taken.
            state.judgements += [j if j is best else replace(j, accepted=False) for j in judged]
            if best is None:
                break
            state.current, ladder = best.point, (best.factor,)
    return state


def gains_of(before: Losses, after: Losses) -> tuple[float, ...]:
    """Per seed; a diverged run makes its whole point diverged, and any finite point is a gain over that."""
    if not all(map(math.isfinite, after)):
        return (-math.inf,) * len(before)
    if not all(map(math.isfinite, before)):
        return (math.inf,) * len(after)
    return tuple(b - a for b, a in zip(before, after, strict=True))
