"""`python -m recipes.bench.gpu`: see the package."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_param.errors import MoeParamError
from moe_param.folder_lock import folder_lock
from recipes.bench.gpu import report
from recipes.bench.gpu.running import FAILED, LIMIT, ROOT, Outcome, Run, run_all, run_guarded, tail
from recipes.bench.gpu.setup import from_wheels
from recipes.bench.gpu.steps import STEPS

DESCRIPTION = "Everything that waits for a GPU: correctness, tests, benchmarks, a training run; then the report."
SETUP_LIMIT = 180.0
IDENTITY = ("device", "python", "torch", "triton", "transformers")
"""What the results of one folder have in common."""


def environment(folder: Path, wheels: Path, device: str) -> dict[str, str]:
    """What every step sees: the private folder first, this checkout, no network."""
    site = folder / "site"
    path = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **from_wheels(wheels, site),
        "PYTHONPATH": os.pathsep.join(path),
        "PATH": os.pathsep.join([str(site / "bin"), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        **({"TRITON_INTERPRET": "1"} if device == "cpu" else {}),
    }


def prepare(run: Run, wheels: Path) -> dict[str, Any]:
    """Installs what is missing and looks at the machine, in a process of its own: `setup`.

    Raises:
        SystemExit: it failed, or there is no such device.
    """
    out, log = run.folder / "setup.json", run.folder / "setup.log"
    command = [sys.executable, "-m", "recipes.bench.gpu.setup", "--out", str(out), "--wheels", str(wheels)]
    code = run_guarded([*command, "--target", str(run.folder / "site")], log, run.environment, SETUP_LIMIT)
    if code != 0:
        raise SystemExit(f"setup {'failed' if code else f'took more than {SETUP_LIMIT:g} s'}:\n{tail(log)}")
    setup = json.loads(out.read_text("utf-8"))
    if run.device == "cuda" and setup["machine"]["device"] is None:
        raise SystemExit("torch finds no CUDA device here; the dry run is --device cpu --smallest")
    return setup


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.gpu", description=DESCRIPTION)
    parser.add_argument("--minutes", type=float, default=25, help="for all of it; the same command goes on")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="where everything goes")
    parser.add_argument("--wheels", type=Path, default=Path("build/gpu-wheels"), help="from `make gpu-wheels`")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: kernels interpreted")
    parser.add_argument("--smallest", action="store_true", help="tiny sizes: tries the code, not the times")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="default: all steps")
    parser.add_argument("--retry", action="store_true", help="run again what failed or was killed at its limit")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.smallest:
        parser.error("--device cpu is the dry run: give --smallest too")
    command = shlex.join(["python", "-m", "recipes.bench.gpu", *(sys.argv[1:] if argv is None else argv)])
    folder, wheels = arguments.out.resolve(), arguments.wheels.resolve()
    try:
        with folder_lock(folder, "benchmarks"):
            run = Run(folder, arguments.device, arguments.smallest, environment(folder, wheels, arguments.device))
            return run_steps(run, wheels, command, arguments)
    except MoeParamError as error:
        raise SystemExit(str(error)) from None


def run_steps(run: Run, wheels: Path, command: str, arguments: argparse.Namespace) -> int:
    """All steps, the report after each. Returns the exit status: 1 where one failed or was killed at its limit."""
    end = time.monotonic() + 60 * arguments.minutes
    setup = prepare(run, wheels)
    machine = {name: setup["machine"][name] for name in IDENTITY} | {"smallest": run.smallest}
    outcomes: list[Outcome] = []
    for outcome in run_all(STEPS, run, machine, end, arguments.retry, arguments.only or ()):
        outcomes.append(outcome)
        print(f"{outcome.step}: {outcome.state} ({outcome.seconds:g} s)", flush=True)
        report.write(STEPS, outcomes, run, setup, command)
    print(f"the report: {run.folder}/report.md")
    return int(any(outcome.state in (FAILED, LIMIT) for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
