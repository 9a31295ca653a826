"""A folder has one command at a time: real processes, ended in every way."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_param.errors import InputError
from moe_param.folder_lock import folder_lock

HOLD = """
import os, sys, time
from pathlib import Path
from moe_param.folder_lock import folder_lock
with folder_lock(Path(sys.argv[1]), "training"):
    ready, started = os.pipe()
    if os.fork() == 0:  # as a loader's worker: it outlives a killed parent for a while
        os.write(started, b".")
        time.sleep(60)
    os.read(ready, 1)  # os.fork() has returned there too, and so let go of the lock
    print(os.getpid(), flush=True)
    input()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout and int(process.stdout.readline()) == process.pid
    yield process
    os.killpg(process.pid, 9)
    process.wait()


def test_who_holds_a_folder_is_said_in_one_line(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with (
        pytest.raises(InputError) as raised,
        folder_lock(tmp_path / "out", "tuning"),
    ):
        pass
    line = str(raised.value)
    who = (
        rf"training on {re.escape(socket.gethostname())}, process {holder.pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    )
    assert re.search(rf"out is in use \({who}\): wait for it", line) and "\n" not in line
    with folder_lock(tmp_path / "another", "tuning"):  # a control: another folder is free
        pass


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_a_folder_is_free_when_its_process_is_gone(tmp_path: Path, holder: subprocess.Popen[str], how: str) -> None:
    if how == "ends":
        assert holder.stdin
        holder.stdin.write("\n")
        holder.stdin.flush()
    else:
        holder.kill()
    holder.wait()
    with folder_lock(tmp_path / "out", "tuning"):
        assert "tuning" in (tmp_path / "out" / ".lock-holder").read_text()
        with pytest.raises(InputError, match=r"in use \(tuning"), folder_lock(tmp_path / "out", "training"):
            pass
    with folder_lock(tmp_path / "out", "training"):
        pass


def test_a_folder_that_vanishes_is_the_commands_own_trouble(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "out", "training"):
        shutil.rmtree(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"file/out cannot be written to \(Not a directory\): give"),
        folder_lock(tmp_path / "file" / "out", "training"),
    ):
        pass
