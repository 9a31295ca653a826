"""The rows of a benchmark's report in a few lines of Markdown; the JSON has all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

LONG = 80
"""Characters of a value that is left to the JSON."""


def describe(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tests by outcome, errors and an experts layer as tables, anything else a line for each row."""
    kinds: dict[str, list[Mapping[str, Any]]] = {"outcome": [], "implementations": [], "wrong": [], "": []}
    for row in rows:
        kinds[next(kind for kind in kinds if kind in row or not kind)].append(row)
    parts = [
        *errors_table(kinds["wrong"]),
        *experts_table(kinds["implementations"]),
        "\n".join(line(row) for row in kinds[""]),
        *test_lines(kinds["outcome"]),
    ]
    return "\n\n".join(part for part in parts if part)


def line(row: Mapping[str, Any]) -> str:
    """What it is about, then the rest; a ratio with what it is the ratio of."""
    rest = {name: value for name, value in row.items() if name not in ("name", "counts")} | row.get("counts", {})
    if {"ratio", "ours", "theirs"} <= rest.keys():
        ratio, ours, theirs = (rest.pop(name) for name in ("ratio", "ours", "theirs"))
        rest = {f"{ours} / {theirs}": ratio, **rest}
    name = f"{row['name']}: " if "name" in row else ""
    return f"- {name}{', '.join(cells(rest))}"


def cells(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`name value` of all that is short."""
    found = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            found += cells(value, f"{prefix}{name} ")
        elif value is not None and not isinstance(value, list) and len(str(value)) <= LONG:
            found.append(f"{prefix}{name} {value:.4g}" if isinstance(value, float) else f"{prefix}{name} {value}")
    return found


def errors_table(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far ours is from float64, eager beside it; what is too far off."""
    if not cases:
        return []
    names = list(cases[0]["ours"])
    lines = [f"| shape | tokens | routing | {' | '.join(names)} | wrong |", "|---" * (4 + len(names)) + "|"]
    for case in cases:
        errors = [f"{case['ours'][name]:.2g} ({case['eager'][name]:.2g})" for name in names]
        cell = [case["shape"], str(case["tokens"]), case["routing"], *errors, ", ".join(case["wrong"]) or "nothing"]
        lines.append(f"| {' | '.join(cell)} |")
    return ["\n".join(lines), "Distance from float64 over its norm; in brackets eager's."]


def experts_table(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Milliseconds of forward and backward, the dense MLP's and how many times that the others take."""
    if not cases:
        return []
    names = list(dict.fromkeys(name for case in cases for name in case["implementations"] if name != "dense"))
    lines = [
        f"| shape | tokens | routing | dense, ms | {' | '.join(f'{name} / dense' for name in names)} |",
        "|---" * (4 + len(names)) + "|",
    ]
    for case in cases:
        found = case["implementations"]
        dense = f"{1000 * found['dense']['seconds']:.4g}" if "dense" in found else "-"
        ratios = [f"{found[name]['over_dense']:.2f}" if dense != "-" and name in found else "-" for name in names]
        cell = [case["shape"], str(case["tokens"]), case["routing"], dense, *ratios]
        lines.append(f"| {' | '.join(cell)} |")
    reasons = Counter(item for case in cases for item in case["not_run"].items())
    said = [f"- not run: {name}, {count} of {len(cases)}: {reason}" for (name, reason), count in reasons.items()]
    return ["\n".join(lines), "\n".join(said)]


def test_lines(tests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each test that failed or was running at the end; why the others were skipped."""
    skipped = Counter(row["reason"] for row in tests if row["outcome"] == "skipped")
    lines = [f"- {row['outcome']}: `{row['test']}` {row['reason']}" for row in tests if row["outcome"] != "skipped"]
    return ["\n".join([*lines, *(f"- skipped, {count}: {reason}" for reason, count in skipped.items())])]
