"""What a search found: the best point, the stable region, tuned.yaml, the tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial
from rich.table import Table

from moe_param.tuning.constants import Judgement
from moe_param.tuning.points import ENDED, Point, key_of, over_seeds, with_numbers, without_rate
from moe_param.tuning.stages import Course, Rung
from moe_param.tuning.strategies import Coordinate, Staged, Strategy
from moe_param.tuning.study import SearchError, results_of, status_of

TOLERANCE = 0.01  # of the loss: what counts as stable


@dataclass(frozen=True)
class Found:
    """What a search came to. Losses are held-out, in nats per token."""

    best: Point
    loss: float  # mean over the seeds
    start_loss: float | None  # of where it began: coordinate, with all seeds; stages, with the first
    stable: tuple[float, float]  # learning rates within TOLERANCE of the best loss, the rest as at the best
    judgements: tuple[Judgement, ...] = ()
    at_edge: tuple[str, ...] = ()  # what is best at an end of its ladder
    rungs: tuple[Rung, ...] = ()  # stages: the last ladder, with all seeds where they were run
    moves: tuple[tuple[str, Point, float], ...] = ()  # stages: stage, point, loss with the first seed
    spent: float = 0.0  # full runs, by the steps that were done
    spent_in: dict[str, float] | None = None  # stages: the same by stage


def conclude(strategy: Strategy, trials: list[FrozenTrial], seeds: Sequence[int]) -> Found:
    """Raises SearchError where every run diverged."""
    points = points_of(trials)
    losses = over_seeds(results_of(trials), seeds)
    means = {key: statistics.fmean(losses[key]) for key in losses}
    spent = spent_by(trials)
    if isinstance(strategy, Staged):
        found = of_course(strategy.course(results_of(trials)), spent)
    elif isinstance(strategy, Coordinate):
        state = strategy.replay(results_of(trials))
        at, begin = means[key_of(state.current)], means[key_of(strategy.start)]
        stable = stable_region(state.current, at, points, means)
        found = Found(state.current, at, begin, stable, tuple(state.judgements), spent=spent)
    else:
        found = of_grid(points, means, spent)
    if not math.isfinite(found.loss):
        raise SearchError(
            f"every trial diverged ({len(trials)} of them): lower the learning rates (--log2_lrs, or the config's)"
        )
    return found


def points_of(trials: Sequence[FrozenTrial]) -> dict[str, Point]:
    """key → point, of all trials that signed."""
    return {t.user_attrs["key"]: t.user_attrs["point"] for t in trials if "point" in t.user_attrs}


def spent_by(trials: Sequence[FrozenTrial]) -> float:
    """Full runs that the trials cost, by the steps that were done."""
    return sum(float(t.user_attrs.get("share", 1.0)) for t in trials if status_of(t) in ENDED)


def of_course(course: Course, spent: float) -> Found:
    """What a staged search came to."""
    assert course.choice is not None, "a search that is not done"
    point, losses = course.choice
    loss = statistics.fmean(losses)
    rungs = {rung.rate: statistics.fmean(rung.losses) for rung in course.rungs}
    inside = [rate for rate, mean in rungs.items() if mean <= loss * (1 + TOLERANCE)] or [point["learning_rate"]]
    return Found(
        point,
        loss,
        start_loss(course),
        (min(inside), max(inside)),
        tuple(course.judgements),
        ("learning_rate",) if course.at_edge else (),
        rungs=tuple(course.rungs),
        moves=tuple(course.moves),
        spent=spent,
        spent_in=dict(course.spent_in),
    )


def of_grid(points: Mapping[str, Point], means: Mapping[str, float], spent: float) -> Found:
    """The best of a grid, and whether it is at an end of it."""
    key = min(means, key=lambda key: means[key])
    best, loss = points[key], means[key]
    edges: list[str] = []
    for name in ("learning_rate", "init_std"):
        ladder = {points[key][name] for key in means if name in points[key]}
        if len(ladder) > 1 and best.get(name) in (min(ladder), max(ladder)):
            edges.append(name)
    stable = stable_region(best, loss, points, means) if math.isfinite(loss) else (0.0, 0.0)
    return Found(best, loss, None, stable, at_edge=tuple(edges), spent=spent)


def stable_region(
    best: Point, loss: float, points: Mapping[str, Point], means: Mapping[str, float]
) -> tuple[float, float]:
    """Rates around the best one up to the first, on either side, whose loss is more than TOLERANCE above it."""
    rates = sorted(
        (points[key]["learning_rate"], mean)
        for key, mean in means.items()
        if without_rate(points[key]) == without_rate(best)
    )
    limit = loss * (1 + TOLERANCE)
    at = [rate for rate, _ in rates].index(best["learning_rate"])
    return _edge(rates[at::-1], limit), _edge(rates[at:], limit)


def _edge(runs: Sequence[tuple[float, float]], limit: float) -> float:
    """Where the line through (rate, loss) first leaves `limit`; the last point within it if the next diverged."""
    inside = runs[0]
    for run in runs[1:]:
        if run[1] > limit:
            if math.isfinite(run[1]):
                share = (limit - inside[1]) / (run[1] - inside[1])
                return float(inside[0] * (run[0] / inside[0]) ** share)
            break
        inside = run
    return inside[0]


def write_tuned(path: Path, config: Mapping[str, Any], found: Found, command: str) -> None:
    """`config` with what was found: what transfer, train and `moe_param.apply` take as it is."""
    header = (
        f"# Written by: {command}\n# Validation loss {found.loss:.4f} at the base. For a larger model: "
        f"moe-param train {path.name} --shape width=…\n"
    )
    document = with_numbers(config, found.best)
    path.write_text(header + yaml.safe_dump(document, sort_keys=False, allow_unicode=True), "utf-8")


def start_loss(course: Course) -> float | None:
    """Of the point that the search began with, with the first seed; None where it diverged."""
    first = next(iter(course.results.values()), {})
    loss = next((result.loss for result in first.values()), math.inf)
    return loss if math.isfinite(loss) else None


def found_record(found: Found) -> dict[str, Any]:
    """Plain values, for tune.json."""
    return {
        **{name: value for name, value in asdict(found).items() if name not in ("rungs", "moves")},
        "rungs": [{"rate": rung.rate, "losses": list(rung.losses)} for rung in found.rungs],
        "moves": [{"stage": stage, "point": point, "loss": loss} for stage, point, loss in found.moves],
    }


def trial_records(trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """Plain values. `process` numbers the processes that claimed them; the study has their hosts and ids."""
    kept = ("point", "seed", "share", "worker_deaths", "error", "failure")
    owners = list(dict.fromkeys(trial.user_attrs.get("owner") for trial in trials))
    return [
        {
            "number": trial.number,
            "status": status_of(trial),
            "loss": trial.value if trial.values else trial.user_attrs.get("loss"),
            "seconds": round(trial.duration.total_seconds(), 2) if trial.duration else None,
            "process": owners.index(trial.user_attrs.get("owner")),
            **{name: trial.user_attrs[name] for name in kept if name in trial.user_attrs},
        }
        for trial in trials
    ]


def tables(found: Found, trials: list[FrozenTrial]) -> list[Table]:
    """What was tried, for a terminal."""
    shown = [constants_table(found)] if found.judgements else [best_points(trials)]
    return shown + ([ladder_table(found)] if found.rungs else [])


def constants_table(found: Found) -> Table:
    """Every constant that was tried, what it gained and would have had to."""
    table = Table("change", "gain", "needed", "seeds", "", title="Constants that were tried (nats per token)")
    for j in found.judgements:
        gain = f"{j.gain:+.4f}" if math.isfinite(j.gain) else "worse" if j.gain < 0 else "no longer diverges"
        mark = "[bold green]kept[/]" if j.accepted else ""
        needed = f"{j.needed:.4f}" if len(j.gains) > 1 else ""
        table.add_row(f"{j.coordinate} ×{j.factor:g}", gain, needed, str(len(j.gains)), mark)
    return table


def ladder_table(found: Found) -> Table:
    """The last ladder: how stable training is above the chosen rate."""
    table = Table("learning rate", "loss", "", title="Around the chosen rate (nats per token)")
    chosen = found.best["learning_rate"]
    for rung in found.rungs:
        factor = rung.rate / chosen
        loss = statistics.fmean(rung.losses)
        worse = "" if factor == 1 else "diverged" if not math.isfinite(loss) else f"{loss / found.loss - 1:+.2%}"
        table.add_row(f"2^{math.log2(rung.rate):.2f} (×{factor:g})", f"{loss:.4f}", worse)
    return table


def best_points(trials: Sequence[FrozenTrial]) -> Table:
    """The ten best points."""
    table = Table("learning rate", "rest", "loss", "seeds", title="The best ten points (nats per token)")
    results, points = results_of(trials), points_of(trials)
    finite = {
        key: [result.loss for _, result in sorted(of_seed.items())]
        for key, of_seed in results.items()
        if all(math.isfinite(result.loss) for result in of_seed.values())
    }
    for key in sorted(finite, key=lambda key: statistics.fmean(finite[key]))[:10]:
        rate = f"2^{math.log2(points[key]['learning_rate']):.2f}"
        losses = " ".join(f"{loss:.3f}" for loss in finite[key])
        rest = without_rate(points[key]) or "config's own"
        table.add_row(rate, rest, f"{statistics.fmean(finite[key]):.4f}", losses)
    return table
