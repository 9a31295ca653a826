"""What a benchmark leaves behind."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_param.training.report import hardware, versions


def bench_report(
    module: str, argv: Sequence[str] | None, smallest: bool, results: list[dict[str, Any]], out: Path | None
) -> dict[str, Any]:
    """What a benchmark leaves behind: its command, hardware, versions and results; written to `out` if given."""
    report = {
        "command": shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)]),
        "hardware": hardware(),
        "versions": versions(),
        "smallest": smallest,
        "results": results,
    }
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return report
