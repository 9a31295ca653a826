"""The rows of a benchmark's report in a few lines of Markdown; the JSON has all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

LONG = 80
"""Characters of a value that is left to the JSON."""


def describe(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tests by outcome, an experts layer as a table, anything else a line for each row."""
    tests = [row for row in rows if "outcome" in row]
    cases = [row for row in rows if "implementations" in row]
    others = [row for row in rows if "outcome" not in row and "implementations" not in row]
    parts = [*experts_table(cases), "\n".join(f"- {', '.join(cells(row))}" for row in others), *test_lines(tests)]
    return "\n\n".join(part for part in parts if part)


def cells(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`name value` of all that is short."""
    found = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            found += cells(value, f"{prefix}{name} ")
        elif value is not None and not isinstance(value, list) and len(str(value)) <= LONG:
            found.append(f"{prefix}{name} {value:.4g}" if isinstance(value, float) else f"{prefix}{name} {value}")
        elif name == "wrong" and value:
            found.append(f"{prefix}{name} {value}")
    return found


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
