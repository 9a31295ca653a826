"""Pictures of a search, drawn from its record (tune.json), so that they can be drawn again from the file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_param.tuning.points import ENDED, key_of, without_rate
from moe_param.tuning.results import TOLERANCE


def plot(record: Mapping[str, Any], path: Path) -> None:
    """tune.png: every picture there is something for, one above the other."""
    from matplotlib.figure import Figure

    drawn = [(draw, size) for draw, wanted, size in PANELS if wanted(record)]
    heights = [size(record) for _, size in drawn]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)
    for (draw, _), (axes,) in zip(drawn, panels):
        draw(axes, record)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def points_of(record: Mapping[str, Any]) -> list[tuple[dict[str, float], list[float]]]:
    """(point, losses of its seeds) of every point with a finite loss. (Before 0.2.0 a trial had all seeds.)"""
    found: dict[str, tuple[dict[str, float], list[float]]] = {}
    for trial in record["trials"]:
        if trial["status"] == "complete" and trial.get("point"):
            losses = list((trial.get("losses") or {"": trial["loss"]}).values())
            found.setdefault(key_of(trial["point"]), (trial["point"], []))[1].extend(losses)
    return list(found.values())


def lost(record: Mapping[str, Any]) -> Iterator[tuple[dict[str, float], str]]:
    """(point, status) of every run that ended without a loss of its own."""
    for trial in record["trials"]:
        if trial["status"] in ("diverged", "stopped", "failed"):
            yield trial["point"], trial["status"]


def plot_rates(axes: Any, record: Mapping[str, Any]) -> None:
    """Loss against learning rate, a line for each of the rest; the stable region shaded."""
    best = record["best"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for point, losses in points_of(record):
        lines.setdefault(without_rate(point), []).append((point["learning_rate"], statistics.fmean(losses)))
    order = sorted(lines, key=lambda name: (name != without_rate(best["best"]), min(loss for _, loss in lines[name])))
    for rank, name in enumerate(order):
        runs = sorted(lines[name])
        label = (name or "config's own") if rank < MOST_LINES else None
        colour = f"C{rank}" if rank < MOST_LINES else "0.8"
        style = "o-" if len(runs) > 1 else "o"
        axes.plot(
            *zip(*runs), style, color=colour, markersize=4, label=label and shortened(label), zorder=2 - rank / 1e4
        )
    shown = [loss for line in lines.values() for _, loss in line]
    low, high = min(shown), sorted(shown)[int(0.9 * (len(shown) - 1))]
    gone = [point["learning_rate"] for point, status in lost(record) if status == "diverged"]
    if gone:
        axes.plot(gone, [high] * len(gone), "x", color="0.4", label="diverged")
    axes.set_ylim(low - 0.1 * (high - low + 0.01), high + 0.3 * (high - low + 0.01))
    axes.plot(best["best"]["learning_rate"], best["loss"], "*", color="C0", markersize=14, zorder=3)
    axes.axvspan(*best["stable"], color="tab:green", alpha=0.15, label=f"within {TOLERANCE:.0%} of the best")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="learning rate", ylabel="held-out loss (nats per token)")
    axes.legend(fontsize="x-small")


MOST_LINES = 6


def shortened(label: str, most: int = 60) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def plot_pass(axes: Any, record: Mapping[str, Any]) -> None:
    """What every change that was tried gained, seed by seed, and what it would have had to gain."""
    judgements, loss = record["best"]["judgements"], record["best"]["loss"]
    for i, judgement in enumerate(judgements):
        gains = [gain for gain in judgement["gains"] if gain is not None and math.isfinite(gain)]
        colour = "tab:green" if judgement["accepted"] else "0.5"
        if gains:
            axes.plot(gains, [i] * len(gains), ".", color=colour)
            axes.plot(statistics.fmean(gains), i, "|", color=colour, markersize=12)
            if len(gains) > 1:
                axes.plot(judgement["needed"], i, "|", color="tab:red", markersize=8, alpha=0.5)
        else:
            axes.plot(0, i, "x", color=colour)
    names = [f"{j['coordinate']} ×{j['factor']:g}" if j["factor"] != 1 else j["coordinate"] for j in judgements]
    axes.axvspan(-TOLERANCE * loss, 0, color="tab:green", alpha=0.15, label=f"loss within {TOLERANCE:.0%}")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=max(0.01, TOLERANCE * loss))
    axes.set(
        xlabel="gain in held-out loss, each seed (green: kept; red: what the mean had to exceed; × stopped or diverged)"
    )
    axes.legend(fontsize="x-small")


def plot_descent(axes: Any, record: Mapping[str, Any]) -> None:
    """The best loss of a single run so far against what had been spent."""
    spent, best, line = 0.0, math.inf, []
    for trial in record["trials"]:
        if trial["status"] not in ENDED:
            continue
        spent += trial.get("share", 1.0)
        if trial["status"] == "complete":
            axes.plot(spent, trial["loss"], ".", color="0.7", markersize=4)
            best = min(best, trial["loss"])
        line.append((spent, best))
    finite = [(x, y) for x, y in line if math.isfinite(y)]
    axes.plot(*zip(*finite), color="C0", drawstyle="steps-post", label="best of one run so far")
    low, start = finite[-1][1], finite[0][1]
    axes.set_ylim(low - 0.1 * (start - low + 0.01), max(start, low * 1.05) + 0.1 * (start - low + 0.01))
    axes.set(xlabel="full runs of the base spent", ylabel="held-out loss (nats per token)")
    axes.legend(fontsize="x-small")


PANELS = (
    (plot_descent, lambda record: bool(record["best"].get("moves")), lambda record: 3.5),
    (plot_rates, lambda record: True, lambda record: 4.5),
    (
        plot_pass,
        lambda record: bool(record["best"].get("judgements", ())),
        lambda record: max(2.0, 0.17 * len(record["best"].get("judgements", ())) + 1),
    ),
)
"""(picture, whether there is something to draw, its height in inches)."""
