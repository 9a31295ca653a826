"""tests/gpu, with each test's outcome on disk as it ends: `python -m recipes.bench.gpu.gpu_tests --out tests.json`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from recipes.bench.report import bench_report

TESTS = Path(__file__).parents[3] / "tests" / "gpu"


class Recorder:
    """A plugin of pytest that writes what became of every test so far, and which one is running."""

    def __init__(self, argv: Sequence[str] | None, smallest: bool, out: Path | None) -> None:
        self.argv, self.smallest, self.out = argv, smallest, out
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcomes[nodeid] = "running"
        self.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
            self.reasons[report.nodeid] = last_line(report)
        elif report.when == "teardown" and self.outcomes[report.nodeid] == "running":
            self.outcomes[report.nodeid] = "passed"
        self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes[report.nodeid], self.reasons[report.nodeid] = "failed", last_line(report)
            self.write()

    def write(self) -> dict[str, Any]:
        rows = [
            {"test": test, "outcome": outcome, "reason": self.reasons.get(test, "")}
            for test, outcome in self.outcomes.items()
            if outcome != "passed"
        ]
        counts = {"counts": dict(Counter(self.outcomes.values()))}
        return bench_report("recipes.bench.gpu.gpu_tests", self.argv, self.smallest, [counts, *rows], self.out)


def last_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test failed or was skipped."""
    if isinstance(report.longrepr, tuple):  # file, line, reason of a skip
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash else report.longreprtext).strip().splitlines()
    return lines[0] if lines else ""


def main(argv: Sequence[str] | None = None) -> tuple[int, dict[str, Any]]:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.gpu.gpu_tests", description=__doc__)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="the tests themselves look which one there is")
    parser.add_argument("--smallest", action="store_true", help="noted in the report; on a CPU the tests are tiny")
    parser.add_argument("-k", default="", help="only these, as pytest's -k")
    arguments = parser.parse_args(argv)
    recorder = Recorder(argv, arguments.smallest, arguments.out)
    code = pytest.main(
        [str(TESTS), "-v", "-s", "-p", "no:cacheprovider", "--tb", "short", "-k", arguments.k], plugins=[recorder]
    )
    return int(code), recorder.write()


if __name__ == "__main__":
    sys.exit(main()[0])
