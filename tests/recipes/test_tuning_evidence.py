"""The comparison of searches runs at its smallest, and goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_searches_are_compared(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.evidence.tuning.engines", "--smallest", "--bases", "mixtral"]
    command += ["--engines", "stages", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    [engine] = json.loads((tmp_path / "out" / "engines.json").read_text())["results"]["mixtral"].values()
    assert 10 < engine["full_runs"] <= 20 and len(engine["losses"]) == 1
    assert "full runs in all" not in done.stdout  # the second time nothing was searched
