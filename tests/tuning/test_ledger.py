"""`moe_param.tuning.ledger`: every job once, and nothing left running when the command is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_param.errors import InputError
from moe_param.tuning.ledger import RunError, run_all
from moe_param.tuning.workers import Watch


def work(job: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """Says who it is; long jobs last until they are killed."""
    Path(job["folder"], f"{job['name']}.{os.getpid()}").touch()
    if job["name"] == "bad":
        raise InputError("not as asked")
    if job["name"] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600 if job["long"] else 0)
    return {"square": job["number"] ** 2, "lost": None}


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


def test_a_run_that_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^run bad: not as asked$"):
        run(tmp_path, {"good": 2, "bad": 1})
    with pytest.raises(RunError, match=r"^run dies: its process was killed 3 times"):
        run(tmp_path, {"good": 2, "dies": 1})
    assert sorted(path.name[0] for path in tmp_path.glob("*.[0-9]*")) == ["b", "d", "d", "d", "g"]  # good: once


def start(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """(a command with a run under way that would last, the process of that run); in a group of its own."""
    code = (
        "import sys, pathlib; from tests.tuning.test_ledger import run; "
        "run(pathlib.Path(sys.argv[1]), {'a': 1}, long=True)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    parent = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: parent.poll() is not None or list(folder.glob("a.*")))
    (started,) = folder.glob("a.*")
    return parent, int(started.suffix[1:])


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_command_takes_its_workers_along(tmp_path: Path) -> None:
    parent, worker = start(tmp_path)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    wait_until(lambda: not alive(worker))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_runs_under_way(tmp_path: Path, sent: signal.Signals) -> None:
    """As from a terminal, to every process of the group; the workers have nothing to say about it."""
    parent, worker = start(tmp_path)
    os.killpg(parent.pid, sent)
    _, said = parent.communicate(timeout=120)
    assert not alive(worker)
    assert said.strip().splitlines()[-1] == "KeyboardInterrupt" and said.count("Traceback") == 1  # the parent's own


def test_a_folder_that_is_removed_ends_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    parent, worker = start(folder)
    shutil.rmtree(folder)
    _, said = parent.communicate(timeout=120)
    assert not alive(worker)
    assert "runs.jsonl was removed while this command ran, with its 0 runs" in said.splitlines()[-1]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # dead, nobody waited for it
    except FileNotFoundError:
        return False
