"""How large must a base be? Where the best rate lies at bases of many sizes, and what it costs at one joint target.

    python -m recipes.evidence.transfer.base_size

Reads what the studies `base_size` and `axes` wrote. Rules are powers of ratios, so scaled from a base of half the width
a target has the initialization and the rates that it has scaled from the whole one. One ladder at every size therefore
says what a base of that size would have chosen, with the std and the constants of the tuned one.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_param.errors import InputError
from moe_param.statistics import half_width
from moe_param.tuning.drift import Curves, Run
from recipes.evidence.transfer.run import HERE, JOINT
from recipes.evidence.transfer.tables import Record, records, table, target_of

SPEC = "moe-completep"


@dataclass(frozen=True)
class Size:
    """A base of one size.

    active: parameters that a token visits. best: its best rung. drift: octaves from its best rate to the target's, the
    mean over seeds, with half of the 95% interval. regret: of the target at that rung, over the target's best.
    noise: standard deviation over seeds of its loss at its best rung, as a share of it.
    """

    name: str
    active: int
    best: float
    drift: float
    half: float | None
    regret: float
    noise: float


def curves_of(runs: Mapping[str, float | None], name: str) -> Curves:
    """A ladder, from the losses of all runs."""
    losses: dict[Run, float] = {}
    for key, loss in runs.items():
        spec, target, octave, seed = key.rsplit("/", 3)
        if spec == SPEC and target == name:
            losses[Run(spec, target, float(octave), int(seed))] = math.inf if loss is None else loss
    return Curves.of(losses, SPEC, name)


def sizes(found: Mapping[str, Record]) -> list[Size]:
    """Of all ladders but the target's, smallest base first. `found`: the records of `base_size` and `axes`, which have
    rungs of one ladder where both have its size."""
    runs = {key: loss for record in found.values() for key, loss in record["runs"].items()}
    active = {name: count for record in found.values() for name, count in record["active_parameters"].items()}
    target = curves_of(runs, JOINT)
    rows = [_size(name, count, curves_of(runs, name), target) for name, count in active.items() if name != JOINT]
    return sorted(rows, key=lambda row: row.active)


def _size(name: str, active: int, base: Curves, target: Curves) -> Size:
    drifts = [there - here for there, here in zip(target.optima(), base.optima(), strict=True)]
    rung, loss = base.octaves[base.best], base.mean[base.best]
    at_target = dict(zip(target.octaves, target.mean, strict=True))
    if rung not in at_target:
        raise InputError(f"{name} is best at octave {rung:g}, at which the target was not run: {sorted(at_target)}")
    return Size(
        name,
        active,
        rung,
        statistics.fmean(drifts),
        half_width(drifts),
        at_target[rung] / min(target.mean) - 1,
        base.spread[base.best] / loss,
    )


def found_in(results: Path, base: str) -> dict[str, Record]:
    """The records of one base in the two studies."""
    return {study: records(study, results)[base] for study in ("base_size", "axes") if base in records(study, results)}


def base_sizes(results: Path) -> str:
    """The table of the page."""
    rows = []
    for base in records("base_size", results):
        for size in sizes(found_in(results, base)):
            half = "" if size.half is None else f" ± {size.half:.2f}"
            rows.append(
                (
                    *(base, "as it is" if size.name == "base" else target_of(size.name), f"{size.active:,}"),
                    *(f"{size.best:+g}", f"{size.drift:+.2f}{half}", f"{size.regret:.2%}", f"{size.noise:.1%}"),
                )
            )
    headings = ("base", "its size", "active parameters", "best rung", "drift", "target worse by", "noise of a run")
    return table(headings, rows)


def draw(found: list[Size], file: Path) -> None:
    """Drift and regret against the base's size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="tight")
    left, right = figure.subplots(1, 2, sharex=True)
    for size in found:
        for panel, value, half in ((left, size.drift, size.half), (right, 100 * size.regret, None)):
            panel.errorbar(size.active, value, yerr=half, fmt="o", color="tab:blue", capsize=3)
            name = "base" if size.name == "base" else target_of(size.name)
            panel.annotate(name, (size.active, value), xytext=(4, 4), textcoords="offset points", fontsize=7)
    left.axhspan(-0.5, 0.5, color="tab:green", alpha=0.15)
    left.set_ylabel("drift to the target, octaves")
    right.set_ylabel("target worse than at its best, %")
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("active parameters of the base")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    results: Path = parser.parse_args().results
    print(base_sizes(results))
    for base in records("base_size", results):
        draw(sizes(found_in(results, base)), results / "base_size" / f"{base}.png")


if __name__ == "__main__":
    main()
