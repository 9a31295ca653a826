"""Old commands say where they went, and go on there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("old", "new"), [("sweep", "tune"), ("transfer", "transfer")])
def test_an_old_command_says_where_it_went(old: str, new: str) -> None:
    command = [sys.executable, "-m", f"recipes.{old}", "--sedes", "0"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    moved, said = done.stderr.strip().splitlines()
    assert f"recipes.{old} is now `moe-param {new}`" in moved and done.returncode == 2
    assert said == f"moe-param {new}: error: unknown argument '--sedes' (did you mean '--seeds'?)"
