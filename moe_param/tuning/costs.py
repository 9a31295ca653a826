"""What finding the numbers of a target costs, in FLOPs: at the base, or by a search at full size."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from moe_param import Parameterization
from moe_param.training.report import flops_per_token
from moe_param.tuning.rivals import QUANTILES, Found

PAPER = {"base": 38e6, "target": 2.5e9, "tokens": 1e9}
"""Active parameters and tokens of a run at the scale of arXiv:2601.20205 (Section 4 tunes 38M, on 1B tokens)."""


def run_flops(plan: Parameterization, seq_len: int, tied: bool, tokens: int) -> float:
    """Of one training run: 6 per active weight in a matrix product and token, and causal attention's own products."""
    return flops_per_token(plan, seq_len, tied) * tokens


@dataclass(frozen=True)
class BaseRuns:
    """How many full runs of the base finding its numbers took; None: not known. source: who says so."""

    runs: float | None
    source: str


def base_runs(tuned: Path | None, rate: float, given: float | None) -> BaseRuns:
    """From --base_runs, else from the `tune.json` beside a tuned.yaml.

    Its `full_runs` is taken where it is written, else its trials are counted: one run for every seed, a run that was
    stopped early by its share of the steps. A `tune.json` whose best rate is another belongs to another file.
    """
    if given is not None:
        return BaseRuns(given, "--base_runs")
    file = tuned.parent / "tune.json" if tuned is not None else None
    if file is None or not file.is_file():
        return BaseRuns(None, "there is no tune.json beside the file: say --base_runs")
    try:
        record = json.loads(file.read_text("utf-8"))
        best = record["best"]["best"]["learning_rate"]
        runs = float(record["full_runs"]) if "full_runs" in record else sum(map(_full_runs, record["trials"]))
    except (ValueError, KeyError, TypeError, OSError, AttributeError):
        return BaseRuns(None, f"{file} does not say how many runs there were: say --base_runs")
    if not math.isclose(best, rate, rel_tol=1e-6):
        return BaseRuns(None, f"{file} found another learning rate, {best:g}: say --base_runs")
    return BaseRuns(runs, str(file))


def _full_runs(trial: Mapping[str, Any]) -> float:
    """Of one trial, over its seeds."""
    shares = trial.get("shares")
    if shares is not None:
        return float(sum(shares.values() if isinstance(shares, Mapping) else shares))
    return float(len(trial.get("losses") or ()))


@dataclass(frozen=True)
class Way:
    """One way to a trained target.

    runs: that finding the numbers takes, of the base or of the target. finding: their FLOPs. total: with the run that
    is kept, which a search has already done: the best of its runs. loss: of the target, mean over the seeds.
    """

    name: str
    runs: float | None
    finding: float | None
    total: float | None
    loss: float


@dataclass(frozen=True)
class Costs:
    """Of one target: the numbers of the base kept, against searches at full size.

    base_flops, target_flops: of one run. transferred: by seed, the target's loss with the file's own numbers. searches:
    what was searched there.
    """

    target: str
    spec: str
    base_flops: float
    target_flops: float
    base_runs: BaseRuns
    transferred: Mapping[int, float]
    searches: tuple[Found, ...]

    @property
    def loss(self) -> float:
        """With the base's numbers."""
        return statistics.fmean(self.transferred.values())

    @property
    def ways(self) -> tuple[Way, ...]:
        """Transfer first."""
        runs = self.base_runs.runs
        finding = None if runs is None else runs * self.base_flops
        total = None if finding is None else finding + self.target_flops
        searched = (
            Way(found.search.name, found.search.points, cost, cost, found.loss)
            for found in self.searches
            for cost in [found.search.points * self.target_flops]
        )
        return (Way(f"{self.spec} with the base's numbers", runs, finding, total, self.loss), *searched)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `moe_param.tuning.transfer_report` says what they are."""
        ways = [vars(way) for way in self.ways]
        for way, found in zip(ways[1:], self.searches):
            gain, half = found.gain(self.transferred)
            way |= {
                "spec": found.search.spec,
                "constants": found.search.constants,
                "seeds": list(found.search.seeds),
                "octaves": list(found.search.octaves),
                "init_stds": list(found.search.init_stds),
                "best": {"octave": found.octave, "init_std": found.init_std},
                "at_edge": list(found.at_edge),
                "loss_of_seeds": list(found.of_seeds),
                "so_far": {f"{quantile:g}": found.so_far[quantile] for quantile in QUANTILES},
                "gain": gain,
                "gain_interval": half,
                "runs_to_transferred": found.runs_to(self.loss),
            }
        return {
            "target": self.target,
            "flops_of_a_run": {"base": self.base_flops, "target": self.target_flops},
            "base_runs": self.base_runs.runs,
            "base_runs_source": self.base_runs.source,
            "transferred": {str(seed): loss for seed, loss in self.transferred.items()},
            "ways": ways,
            "computed_at_paper_scale": self.at_paper_scale(),
        }

    def at_paper_scale(self) -> dict[str, Any] | None:
        """The same counts of runs at the paper's sizes, computed: nothing of it was run. None where a count is unknown.

        6 FLOPs per active parameter and token, the same tokens in every run.
        """
        if not self.searches or self.base_runs.runs is None:
            return None
        base, target = (6 * PAPER[name] * PAPER["tokens"] for name in ("base", "target"))
        points = min(found.search.points for found in self.searches)
        finding, search = self.base_runs.runs * base, points * target
        return {
            "active_parameters": {"base": PAPER["base"], "target": PAPER["target"]},
            "tokens": PAPER["tokens"],
            "runs": {"base": self.base_runs.runs, "search": points},
            "finding": {"base": finding, "search": search},
            "total": {"base": finding + target, "search": search},
            "share_finding": finding / search,
            "share_total": (finding + target) / search,
        }


def table(costs: Costs) -> Table:
    """A line for each way to the target."""
    found = Table(
        title=f"{costs.target}: loss at the target, and what finding its numbers costs",
        caption="\n".join(_notes(costs)),
        caption_justify="left",
    )
    found.add_column("way", overflow="fold")
    for heading in ("runs", "FLOPs", "of them to find", "loss"):
        found.add_column(heading, no_wrap=True, justify="right")
    for i, way in enumerate(costs.ways):
        where = "target" if i else "base"
        runs = "unknown" if way.runs is None else f"{way.runs:g} of the {where}"
        known = ("unknown" if flops is None else f"{flops:.2e}" for flops in (way.total, way.finding))
        found.add_row(way.name, runs, *known, f"{way.loss:.4f}")
    return found


def _notes(costs: Costs) -> list[str]:
    """Below the table, in sentences."""
    notes = []
    if costs.base_runs.runs is None:
        notes.append(f"The runs of the base are not known: {costs.base_runs.source}.")
    for found in costs.searches:
        gain, half = found.gain(costs.transferred)
        interval = "" if half is None else f" ± {half:.2%}"
        side = "below" if gain >= 0 else "above"
        runs = found.runs_to(costs.loss)
        reached = "no run of it gets there" if runs is None else f"half of all orders get there within {runs} runs"
        if gain < 0 and runs is None:
            reached = "seed by seed"
        notes.append(f"Transferred: {abs(gain):.2%}{interval} {side} the best of {found.search.name}; {reached}.")
        for ladder in found.at_edge:
            notes.append(f"The best {ladder} of {found.search.name} is the last of its ladder: it may lie beyond.")
    paper = costs.at_paper_scale()
    if paper is not None:
        notes.append(
            f"Computed, not run: with as many runs at the paper's sizes (38M active base, 2.5B target) finding the "
            f"numbers at the base costs {paper['share_finding']:.1%} of the search, "
            f"{paper['share_total']:.1%} with the target's run."
        )
    return notes


def draw(costs: Sequence[Mapping[str, Any]]) -> Any:
    """A panel for each target: loss at the target against the FLOPs spent until it is trained.

    Args:
        costs: as `Costs.to_dict` gives them and transfer.json holds them.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(6.4 * len(costs), 4.4), layout="constrained")
    for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs):
        _panel(axes, cost)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda flops, _: f"{flops:.0e}".replace("e+", "e")))
        axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def _panel(axes: Any, costs: Mapping[str, Any]) -> None:
    """One target: lowest loss so far of every search, and the transferred numbers as a star."""
    transferred, *searches = costs["ways"]
    seen = [] if transferred["loss"] is None else [transferred["loss"]]
    for i, way in enumerate(searches):
        flops = [costs["flops_of_a_run"]["target"] * k for k in range(1, int(way["runs"]) + 1)]
        low, middle, high = (
            [math.nan if loss is None or math.isinf(loss) else loss for loss in way["so_far"][f"{quantile:g}"]]
            for quantile in QUANTILES
        )
        axes.step(flops, middle, where="post", color=f"C{i + 1}", label=f"searched: {way['name']}")
        axes.fill_between(flops, low, high, step="post", color=f"C{i + 1}", alpha=0.15)
        seen += [loss for loss in middle if math.isfinite(loss)]
    if transferred["loss"] is not None and math.isfinite(transferred["loss"]):
        if transferred["total"] is None:
            label = f"{transferred['name']} (its runs are not known)"
            axes.axhline(transferred["loss"], color="C0", ls="--", label=label)
        else:
            point = (transferred["total"], transferred["loss"])
            axes.plot(*point, "*", color="C0", ms=16, label=transferred["name"], zorder=3)
    if seen:  # what diverges may leave the picture
        margin = 0.05 * (max(seen) - min(seen)) or 0.01
        axes.set_ylim(min(seen) - margin, min(max(seen) + margin, min(seen) * 1.35))
    axes.set_xscale("log")
    axes.set(xlabel="FLOPs until the target is trained (finding the numbers and its run)", ylabel="validation loss")
    axes.set_title(f"{costs['target']}: median over orders of the search, 10% to 90% shaded", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
