"""A run of three steps to be killed: `python -m tests.recipes.gpu_run FOLDER SECOND`; SECOND hangs or works."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from recipes.bench.gpu.running import Run, run_all
from tests.recipes.gpu_step import step

MACHINE = {"device": "a GPU", "torch": "2"}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    steps = [step("one", "works"), step("two", sys.argv[2]), step("three", "works")]
    for outcome in run_all(steps, Run(folder, "cpu", True, os.environ), MACHINE, time.monotonic() + 600):
        print(outcome.step, outcome.state, flush=True)
