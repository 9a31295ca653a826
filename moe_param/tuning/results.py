"""What a search found: the best point, the stable region, tuned.yaml, the picture, the tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from optuna.trial import FrozenTrial
from rich.table import Table

from moe_param.tuning.constants import Judgement, Point, key_of
from moe_param.tuning.search import Coordinate, Grid, SearchError, Strategy, Tpe, results_of, status_of

TOLERANCE = 0.01  # of the loss: what counts as stable


@dataclass(frozen=True)
class Found:
    best: Point
    loss: float  # mean over the seeds
    start_loss: float | None  # coordinate: of where it began
    stable: tuple[float, float]  # learning rates within TOLERANCE of the best loss, the rest as at the best
    judgements: tuple[Judgement, ...] = ()
    at_edge: tuple[str, ...] = ()  # what is best at an end of its ladder


def conclude(strategy: Strategy, trials: list[FrozenTrial]) -> Found:
    results = results_of(trials)
    points = {t.user_attrs["key"]: t.user_attrs["point"] for t in trials if t.user_attrs.get("key") in results}
    means = {key: statistics.fmean(losses) for key, losses in results.items()}
    judgements: tuple[Judgement, ...] = ()
    start_loss = None
    if isinstance(strategy, Coordinate):
        state = strategy.replay(results)
        best, judgements = state.current, tuple(state.judgements)
        loss, start_loss = means[key_of(best)], means[key_of(strategy.start)]
    else:
        key = min(means, key=lambda key: means[key])
        best, loss = points[key], means[key]
    if not math.isfinite(loss):
        raise SearchError(
            f"every trial diverged ({len(means)} of them): lower the learning rates (--log2_lrs, or the config's)"
        )
    edges: list[str] = []
    if isinstance(strategy, Grid):
        for name in ("learning_rate", "init_std"):
            ladder = {point[name] for point in points.values() if name in point}
            if len(ladder) > 1 and best.get(name) in (min(ladder), max(ladder)):
                edges.append(name)
    return Found(best, loss, start_loss, stable_region(strategy, best, loss, points, means), judgements, tuple(edges))


def without_rate(point: Mapping[str, float]) -> str:
    return key_of({name: value for name, value in point.items() if name != "learning_rate"})


def stable_region(
    strategy: Strategy, best: Point, loss: float, points: Mapping[str, Point], means: Mapping[str, float]
) -> tuple[float, float]:
    """Learning rates around the best one up to the first, on either side, whose loss is more than TOLERANCE above it.

    tpe changes everything at once, so there it is the range of the rates of all points that good.
    """
    sampled = isinstance(strategy, Tpe)
    rates = sorted(
        (point["learning_rate"], means[key])
        for key, point in points.items()
        if sampled or without_rate(point) == without_rate(best)
    )
    limit = loss * (1 + TOLERANCE)
    if sampled:
        good = [rate for rate, loss in rates if loss <= limit]
        return min(good), max(good)
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


def split(point: Mapping[str, float]) -> tuple[float, float | None, dict[str, dict[str, float]] | None]:
    """(learning rate, init std, constants) as `moe_param.apply` takes them."""
    constants: dict[str, dict[str, float]] = {}
    for name, value in point.items():
        if "." in name:
            role, kind = name.split(".")
            constants.setdefault(role, {})[kind] = value
    return point["learning_rate"], point.get("init_std"), constants or None


def write_tuned(path: Path, config: Mapping[str, Any], found: Found, command: str) -> None:
    """`config` with what was found: what transfer, train and `moe_param.apply` take as it is."""
    rate, std, constants = split(found.best)
    numbers = {"learning_rate": rate, "init_std": std, "constants": constants}
    header = (
        f"# Written by: {command}\n# Validation loss {found.loss:.4f} at the base. For a larger model: "
        f"moe-param train {path.name} --shape width=…\n"
    )
    document = {name: numbers.get(name, value) for name, value in config.items()}
    document = {name: value for name, value in document.items() if value is not None}
    path.write_text(header + yaml.safe_dump(document, sort_keys=False, allow_unicode=True), "utf-8")


def trial_records(trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """Plain values. `process` numbers the processes that claimed them; the study has their hosts and ids."""
    kept = ("point", "losses", "worker_deaths", "error")
    owners = list(dict.fromkeys(trial.user_attrs.get("owner") for trial in trials))
    return [
        {
            "number": trial.number,
            "status": status_of(trial),
            "loss": trial.value if trial.values else None,
            "seconds": round(trial.duration.total_seconds(), 2) if trial.duration else None,
            "process": owners.index(trial.user_attrs.get("owner")),
            **{name: trial.user_attrs[name] for name in kept if name in trial.user_attrs},
        }
        for trial in trials
    ]


def plot(strategy: Strategy, trials: list[FrozenTrial], found: Found, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, max(4.5, 0.17 * len(found.judgements))), layout="constrained")
    axes = figure.subplots()
    if isinstance(strategy, Coordinate):
        plot_pass(axes, found)
    else:
        plot_rates(axes, strategy, trials, found)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def plot_rates(axes: Any, strategy: Strategy, trials: list[FrozenTrial], found: Found) -> None:
    """Loss against learning rate, a line for each of the rest; the stable region shaded."""
    results = results_of(trials)
    points = {t.user_attrs["key"]: t.user_attrs["point"] for t in trials if t.user_attrs.get("key") in results}
    lines: dict[str, list[tuple[float, float]]] = {}
    for key, point in points.items():
        name = "" if isinstance(strategy, Tpe) else without_rate(point)
        lines.setdefault(name, []).append((point["learning_rate"], statistics.fmean(results[key])))
    draw_rates(axes, lines, found, sampled=isinstance(strategy, Tpe))


def draw_rates(axes: Any, lines: Mapping[str, Sequence[tuple[float, float]]], found: Found, *, sampled: bool) -> None:
    """`lines`: what is the same along one → (learning rate, mean loss); `sampled` points are on no line."""
    losses = [loss for line in lines.values() for _, loss in line if math.isfinite(loss)]
    top = max(losses)
    best_first = sorted(lines, key=lambda name: min(loss for _, loss in lines[name]))
    for rank, name in enumerate(best_first):
        runs = sorted((rate, loss) for rate, loss in lines[name] if math.isfinite(loss))
        gone = sorted(rate for rate, loss in lines[name] if not math.isfinite(loss))
        colour = f"C{rank}" if rank < 8 else "0.8"
        style = "o" if sampled else "o-"
        label = (name or ("trials" if sampled else "config's own")) if rank < 8 else None
        if runs:
            axes.plot(*zip(*runs), style, color=colour, markersize=4, label=label)
        if gone:
            axes.plot(gone, [top] * len(gone), "x", color=colour, label="diverged" if rank == 0 else None)
    axes.plot(found.best["learning_rate"], found.loss, "*", color="C0", markersize=14, zorder=3)
    axes.axvspan(*found.stable, color="tab:green", alpha=0.15, label=f"within {TOLERANCE:.0%} of the best")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="learning rate", ylabel="validation loss (nats per token)")
    axes.legend(fontsize="small")


def plot_pass(axes: Any, found: Found) -> None:
    """What every change that was tried gained, seed by seed, and what it would have had to gain."""
    shown_as = [f"{j.coordinate} ×{j.factor:g}" for j in found.judgements]
    for i, judgement in enumerate(found.judgements):
        finite_gains = [gain for gain in judgement.gains if math.isfinite(gain)]
        colour = "tab:green" if judgement.accepted else "0.5"
        if finite_gains:
            axes.plot(finite_gains, [i] * len(finite_gains), ".", color=colour)
            axes.plot(judgement.gain, i, "|", color=colour, markersize=12)
            axes.plot(judgement.needed, i, "|", color="tab:red", markersize=8, alpha=0.5)
        else:
            axes.plot(0, i, "x", color=colour)
    axes.axvspan(-TOLERANCE * found.loss, 0, color="tab:green", alpha=0.15, label=f"loss within {TOLERANCE:.0%}")
    axes.set_yticks(range(len(shown_as)), shown_as, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=max(0.01, TOLERANCE * found.loss))
    axes.set(xlabel="gain in validation loss, each seed (red: what the mean had to exceed; × diverged)")
    axes.legend(fontsize="small")


def tables(found: Found, trials: list[FrozenTrial]) -> Table:
    if found.judgements:
        table = Table("change", "gain", "needed", "", title="One pass over the constants (nats per token)")
        for j in found.judgements:
            gain = f"{j.gain:+.4f}" if math.isfinite(j.gain) else "diverged" if j.gain < 0 else "no longer diverges"
            mark = "[bold green]accepted[/]" if j.accepted else ""
            table.add_row(f"{j.coordinate} ×{j.factor:g}", gain, f"{j.needed:.4f}", mark)
        return table
    table = Table("learning rate", "rest", "loss", "seeds", title="The best ten trials (nats per token)")
    complete = sorted((t for t in trials if status_of(t) == "complete"), key=lambda t: t.value or math.inf)
    for trial in complete[:10]:
        point = trial.user_attrs["point"]
        losses = " ".join(f"{loss:.3f}" for loss in trial.user_attrs["losses"].values())
        rate = f"2^{math.log2(point['learning_rate']):.2f}"
        table.add_row(rate, without_rate(point) or "config's own", f"{trial.value:.4f}", losses)
    return table
