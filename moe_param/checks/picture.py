"""The picture of a coordinate check."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_param.checks.coordinates import CoordCheck

COLORS = {"passed": "tab:green", "undecided": "tab:orange", "failed": "tab:red"}


def draw(check: CoordCheck, path: str | Path) -> None:
    """Small multiples, log-log: one panel per quantity, its size at initialization and its change per step."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(4, len(check.quantities))
    rows = -(-len(check.quantities) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.8 * rows), layout="tight")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for panel in axes.flat[len(check.quantities) :]:
        panel.set_axis_off()
    slopes, verdicts = check.slopes["change"], check.verdicts
    for panel, quantity in zip(axes.flat, check.quantities, strict=False):
        _curves(panel, check.records, quantity, colormaps["viridis"])
        title = f"{quantity.replace('_', ' ')}: {slopes[quantity].value:+.2f}"
        panel.set_title(title, fontsize=10, color=COLORS[verdicts[quantity].status])
    axes.flat[0].legend(fontsize=7)
    figure.supxlabel(f"{check.axis} / base", fontsize=10)
    word = check.status if check.passed else check.status.upper()
    figure.suptitle(f"{check.spec}, {check.axis}: {word} (exponent of the last change in each title)", fontsize=11)
    figure.savefig(path, dpi=110)


def _curves(panel: Any, records: list[dict[str, Any]], quantity: str, colors: Any) -> None:
    last = len(records[0]["change"]) - 1
    panel.plot(*_mean(records, lambda r: r["init"][quantity]), "k--", marker=".", label="initial size")
    for step in range(last + 1):
        x, y = _mean(records, lambda r, s=step: r["change"][s][quantity])
        label = f"change, step {step + 1}" if step in (0, last) else None
        width = 2 if step == last else 1
        panel.plot(x, y, color=colors(step / max(last, 1)), lw=width, marker=".", label=label)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")


def _mean(records: list[dict[str, Any]], value: Any) -> tuple[list[float], list[float]]:
    """(factors, geometric means over the seeds)."""
    x, y = [], []
    for factor in sorted({r["factor"] for r in records}):
        values = [value(r) for r in records if r["factor"] == factor]
        values = [v for v in values if v > 0 and math.isfinite(v)]
        if values:
            x.append(factor)
            y.append(math.exp(sum(map(math.log, values)) / len(values)))
    return x, y
