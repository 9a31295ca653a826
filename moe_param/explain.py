"""What the rules of a model say, as rows of plain values and as a table."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moe_param.scaling.spec import ROLES
from moe_param.structure.laws import InitLaw
from moe_param.structure.regime import Regime, regime
from moe_param.structure.roles import LEFT_ALONE, UNTRAINED, layer_pattern
from moe_param.structure.shape import Shape

if TYPE_CHECKING:
    from moe_param.parameterization import Parameterization


def rows(parameterization: Parameterization, full: bool = False) -> list[dict[str, Any]]:
    """One row per role and rule, or with `full` one per parameter: plain values, ready for JSON or a table."""
    rows: dict[Any, dict[str, Any]] = {}
    for name, rule in parameterization.rules.items():
        pattern = name if full else layer_pattern(name)[0]
        values = {
            "role": rule.role,
            "parameter": pattern,
            "shape": list(rule.shape),
            "fan_in_ratio": rule.fan_in / rule.fan_in_base if rule.fan_in and rule.fan_in_base else None,
            "init": _describe_init(rule.init),
            "init_std": rule.init_std,
            "constant": rule.constant,
            "lr": rule.lr if rule.role not in UNTRAINED else None,
            "eps": rule.eps if rule.role not in UNTRAINED else None,
            "weight_decay": rule.weight_decay if rule.role not in UNTRAINED else None,
            "multiplier": rule.multiplier,
            "folded": list(rule.folded),
            "parameters": 0,
        }
        key = json.dumps(values)
        rows.setdefault(key, values)["parameters"] += 1
    order = {role: i for i, role in enumerate((*ROLES, LEFT_ALONE, *UNTRAINED))}
    found = list(rows.values())
    return found if full else sorted(found, key=lambda row: order[row["role"]])


def regimes(parameterization: Parameterization) -> dict[str, dict[str, Any]]:
    """On which side of the expert-size rule's crossover base and target are, and their α*; ready for JSON. Empty for
    dense models."""
    return {name: found.to_dict() for name, found in _regimes(parameterization).items()}


def _regimes(parameterization: Parameterization) -> dict[str, Regime]:
    shapes = {"base": parameterization.base_shape, "target": parameterization.shape}
    return {name: found for name, shape in shapes.items() if (found := regime(shape)) is not None}


def table(parameterization: Parameterization, full: bool = False) -> str:
    """The rules as text: one line per role and rule, or with `full` one per parameter."""
    from rich.console import Console

    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(rich_table(parameterization, full))
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def rich_table(parameterization: Parameterization, full: bool = False, *, narrow: bool = False) -> Any:
    """`table` as a `rich.table.Table`, for terminals; `narrow` leaves the names of the parameters out."""
    from rich import box
    from rich.table import Table

    near = [f"{name}: {found}." for name, found in _regimes(parameterization).items()]
    table = Table(
        title=f"{parameterization.spec.name}: {_ratios(parameterization.base_shape, parameterization.shape)}",
        caption="fan-in: target / base. init std: '= c' is a constant. lr, eps, decay: factors on the base's "
        "numbers. folded in: the forward multiplier that a parameter carries." + "\n" * bool(near) + " ".join(near),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    columns = ["role", "parameter", "shape", "fan-in", "init std", "lr", "eps", "decay", "folded in"]
    for column in columns:
        if not (narrow and column == "parameter"):
            wrap = column in ("parameter", "folded in")
            table.add_column(column, overflow="fold", no_wrap=not wrap, min_width=8 if wrap else None)
    for row in rows(parameterization, full):
        count = f" ({row['parameters']})" if row["parameters"] > 1 else ""
        folded = [number(row["multiplier"]), *(site.replace("_", " ") for site in row["folded"])]
        table.add_row(
            row["role"],
            *([] if narrow else [row["parameter"] + count]),
            "×".join(map(str, row["shape"])),
            number(row["fan_in_ratio"]),
            row["init"].removeprefix("normal "),
            *(number(row[factor]) for factor in ("lr", "eps", "weight_decay")),
            " ".join(folded) if row["folded"] else "",
        )
    return table


def _describe_init(law: InitLaw) -> str:
    if law.kind == "constant":
        return f"= {law.value:.4g}"
    if law.kind == "kept":
        return "as it is"
    if law.kind == "special":
        return "transformers' own" + (f" × {law.std:.4g}" if law.std not in (0.0, 1.0) else "")
    return f"{law.kind} {law.std:.4g}" + (", all experts alike" if law.tied else "")


def _ratios(base: Shape, target: Shape) -> str:
    def each() -> Iterator[str]:
        for name, value in asdict(target).items():
            before = getattr(base, name)
            if value is not None:
                yield f"{name} {before} → {value}" if before != value else f"{name} {value}"

    return ", ".join(each())
