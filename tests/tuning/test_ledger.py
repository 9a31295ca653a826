"""`moe_param.tuning.ledger`: every job once, and nothing left running when the command is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_param.errors import InputError
from moe_param.tuning.ledger import run_all


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Says who it is; long jobs last until they are killed."""
    Path(job["folder"], f"{job['name']}.{os.getpid()}").touch()
    time.sleep(600 if job["long"] else 0)
    return {"square": job["number"] ** 2, "lost": float("nan")}


def run(folder: Path, numbers: dict[str, int], long: bool = False, workers: int = 1) -> dict[str, dict[str, Any]]:
    jobs = {name: {"folder": str(folder), "name": name, "number": n, "long": long} for name, n in numbers.items()}
    settings = {name: {"number": n} for name, n in numbers.items()}
    costs = {name: float(n) for name, n in numbers.items()}
    console = Console(quiet=True)
    ledger = folder / "runs.jsonl"
    return run_all(work, jobs, ledger, settings=settings, costs=costs, workers=workers, console=console)


def test_every_job_runs_once(tmp_path: Path) -> None:
    assert run(tmp_path, {"a": 1, "b": 2})["b"] == {"square": 4, "lost": None}
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"run": "c", "sett')  # killed while it wrote
    found = run(tmp_path, {"a": 1, "b": 2, "c": 3})
    assert {name: result["square"] for name, result in found.items()} == {"a": 1, "b": 4, "c": 9}
    assert sorted(path.name[0] for path in tmp_path.glob("?.*[0-9]")) == ["a", "b", "c"]
    with pytest.raises(InputError, match="b with other settings"):
        run(tmp_path, {"b": 5})


def test_a_killed_command_takes_its_workers_along(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from tests.tuning.test_ledger import run; "
        "run(pathlib.Path(sys.argv[1]), {'a': 1}, long=True)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while not (started := list(tmp_path.glob("a.*"))):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    worker = int(started[0].suffix[1:])
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # dead, nobody waited for it
    except FileNotFoundError:
        return False
