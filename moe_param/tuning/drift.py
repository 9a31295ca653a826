"""Where the best learning rate is at a base and at a target: how far it moved, and what keeping the base's costs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from moe_param.statistics import half_width, parabola_vertex

DRIFT, REGRET = 0.5, 0.01
"""What counts as transferred: the optimum within half an octave, at most 1% of the loss given up."""


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
class Ladder:
    """What was run: every octave with every seed, at the base and every target, under every spec."""

    specs: tuple[str, ...]
    targets: tuple[str, ...]  # without the base
    octaves: tuple[float, ...]  # from the config's learning rate, ascending
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Curves:
    """Loss against learning rate, one line per seed; inf where a run diverged."""

    octaves: tuple[float, ...]
    of_seeds: tuple[tuple[float, ...], ...]

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
    def at_edge(self) -> bool:
        """An optimum at the ladder's end may lie beyond it."""
        return self.best in (0, len(self.octaves) - 1)

    @property
    def optima(self) -> list[float]:
        """Each seed's best octave."""
        return [vertex(self.octaves, losses) for losses in self.of_seeds]


def vertex(octaves: Sequence[float], losses: Sequence[float]) -> float:
    """Of the parabola through the best rung and its neighbours; the best rung itself at an end of the ladder."""
    best = int(np.argmin(losses))
    near = slice(max(0, best - 1), best + 2)
    x, y = octaves[near], losses[near]
    if not math.isfinite(losses[best]):
        return math.nan
    if len(x) == 3 and all(map(math.isfinite, y)):
        lowest = parabola_vertex(x, y)
        if lowest is not None:  # not three equal losses
            return float(np.clip(lowest, x[0], x[-1]))
    return float(octaves[best])


def summarize(ladder: Ladder, losses: Mapping[Run, float]) -> list[dict[str, Any]]:
    """Per spec and target: where the best rates are, how far they moved, what keeping the base's costs."""

    def curves(spec: str, target: str) -> Curves:
        of_seeds = tuple(
            tuple(losses[Run(spec, target, octave, seed)] for octave in ladder.octaves) for seed in ladder.seeds
        )
        return Curves(ladder.octaves, of_seeds)

    return [
        {"spec": spec, "target": target, **compare(curves(spec, "base"), curves(spec, target))}
        for spec, target in itertools.product(ladder.specs, ladder.targets)
    ]


def compare(base: Curves, target: Curves) -> dict[str, Any]:
    """One target against its base, as plain values. Drifts are paired: a seed has the same batches at both."""
    at = {"base": base, "target": target}
    drifts = [moved - start for start, moved in zip(base.optima, target.optima)]
    drift, best = statistics.mean(drifts), target.mean[target.best]
    # What a user who searched the base would take, at the target.
    regret = (target.mean[base.best] - best) / best if math.isfinite(best) else math.inf
    return {
        "losses": {name: curves.mean for name, curves in at.items()},
        "spread": {name: curves.spread for name, curves in at.items()},
        "optimum": {name: vertex(curves.octaves, curves.mean) for name, curves in at.items()},
        "drift_octaves": drift,
        "drift_interval": half_width(drifts),
        "drift_of_seeds": drifts,
        "regret": regret,
        "best_loss": best,
        "at_edge": [name for name, curves in at.items() if curves.at_edge],
        "transferred": abs(drift) <= DRIFT and regret <= REGRET and not base.at_edge and not target.at_edge,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each target and spec."""
    edge = "; * an optimum at the end of the ladder: give more --octaves" if any(row["at_edge"] for row in rows) else ""
    found = Table(
        title="Best learning rate: drift from base to target (octaves, 95% interval), regret of keeping the base's",
        caption=f"transfers: drift ≤ {DRIFT} and regret ≤ {REGRET:.0%}{edge}",
    )
    for heading in ("target", "spec"):
        found.add_column(heading, overflow="fold")
    for heading in ("drift", "regret", "best loss", "transfers"):
        found.add_column(heading, no_wrap=True)
    for row in sorted(rows, key=lambda row: row["target"]):
        half = "" if row["drift_interval"] is None else f" ± {row['drift_interval']:.2f}"
        found.add_row(
            row["target"],
            row["spec"],
            f"{row['drift_octaves']:+.2f}{half}{' *' if row['at_edge'] else ''}",
            f"{row['regret']:.2%}",
            f"{row['best_loss']:.4f}",
            "yes" if row["transferred"] else "no",
        )
    return found


def plot(ladder: Ladder, rows: list[dict[str, Any]], lr: float, path: Path) -> None:
    draw(ladder, rows, lr).savefig(path, dpi=120)


def draw(ladder: Ladder, rows: Sequence[Mapping[str, Any]], lr: float) -> Any:
    """A panel for each target (across) and spec (down): loss against learning rate, at the base and at the target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(ladder.targets), 3.0 * len(ladder.specs)), layout="constrained")
    panels = figure.subplots(len(ladder.specs), len(ladder.targets), squeeze=False, sharex=True, sharey="col")
    found = {(row["spec"], row["target"]): row for row in rows}
    rates = [lr * 2.0**octave for octave in ladder.octaves]
    for (i, spec), (j, target) in itertools.product(enumerate(ladder.specs), enumerate(ladder.targets)):
        _panel(panels[i][j], found[spec, target], rates, lr)
    for axes in panels[-1]:
        axes.set_xlabel("learning rate")
    for line in panels:
        line[0].set_ylabel("validation loss")
    return figure


def _panel(axes: Any, row: Mapping[str, Any], rates: Sequence[float], lr: float) -> None:
    """One spec at one target, beside the base."""
    for name, colour in (("base", "tab:blue"), ("target", "tab:orange")):
        losses = np.array(row["losses"][name])
        label = "base" if name == "base" else row["target"]
        axes.errorbar(rates, losses, row["spread"][name], fmt="o-", ms=3, color=colour, label=label, capsize=2)
        axes.axvline(lr * 2.0 ** row["optimum"][name], color=colour, linestyle=":")
    low = min([*row["losses"]["base"], *row["losses"]["target"]])
    if math.isfinite(low):  # what diverges may leave the picture
        axes.set_ylim(top=min(axes.get_ylim()[1], low * 1.35))
    axes.set_xscale("log", base=2)
    axes.set_title(f"{row['spec']}\ndrift {row['drift_octaves']:+.2f}, regret {row['regret']:.1%}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
