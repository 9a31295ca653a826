"""`moe_param.tuning.workers`: a run says how it goes, can be ended, and leaves nothing behind, whoever is killed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_param.errors import InputError
from moe_param.tuning.workers import INDEX, MARK, Answer, Died, Pool, Progress, Raised, Spent, Watch, end, marked
from tests.tuning.test_ledger import alive, wait_until

ROOT = Path(__file__).parents[2]
SLEEPER = [sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]


# -- what workers do, by name --------------------------------------------------------------------------------------
def reports(folder: Path, watch: Watch) -> Answer:
    return Answer(1.0, stopped=not (watch(0.25, 3.0) and watch(0.75, 2.0)))


def until_cancelled(folder: Path, watch: Watch) -> Answer:
    while watch(0.5, 2.5):
        time.sleep(0.01)
    return Answer(2.5, share=0.5, stopped=True)


def hangs(folder: Path, watch: Watch) -> Answer:
    watch(0.1, 4.0)
    time.sleep(600)
    return Answer(0.0)


def ignores_sigterm(folder: Path, watch: Watch) -> Answer:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return hangs(folder, watch)


def start_children(folder: Path) -> None:
    """Two that are hard to end: one in a session of its own, one whose parent is gone; neither heeds SIGTERM."""
    child = subprocess.Popen(SLEEPER, start_new_session=True)
    shell = ["sh", "-c", f"{shlex.join(SLEEPER)} >/dev/null & echo $!"]
    orphan = subprocess.run(shell, stdout=subprocess.PIPE, text=True, timeout=60).stdout
    (folder / "new").write_text(f"{os.getpid()} {child.pid} {orphan}")
    (folder / "new").rename(folder / "processes")


def with_children(folder: Path, watch: Watch) -> Answer:
    start_children(folder)
    return hangs(folder, watch)


def starts_children_and_dies(folder: Path, watch: Watch) -> None:
    start_children(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def raises(folder: Path, watch: Watch) -> Answer:
    raise InputError("not as asked")


def cannot_be_sent(folder: Path, watch: Watch) -> Any:
    raise RuntimeError("two\nlines")


def is_spent(folder: Path, watch: Watch) -> Answer:
    raise Spent(Answer(5.0))


def who(folder: Path, watch: Watch) -> tuple[int, str]:
    return os.getpid(), os.environ[INDEX]


def work(name: str, folder: Path, watch: Watch) -> Any:
    return globals()[name](folder, watch)


# -- ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(work, 2)
    yield made
    made.stop()


def heard(pool: Pool, runs: int = 1, at_progress: Callable[[], None] = lambda: None) -> list[tuple[Any, Any]]:
    """All that is said until so many runs have ended."""
    found: list[tuple[Any, Any]] = []
    deadline = time.monotonic() + 120
    while sum(not isinstance(answer, Progress) for _, answer in found) < runs:
        assert time.monotonic() < deadline, found
        for run, answer in pool.answers(timeout=1.0):
            found.append((run, answer))
            if isinstance(answer, Progress):
                at_progress()
    return found


def test_a_run_says_how_it_goes(pool: Pool, tmp_path: Path) -> None:
    pool.start("a", "reports", tmp_path)
    assert heard(pool) == [("a", Progress(0.25, 3.0)), ("a", Progress(0.75, 2.0)), ("a", Answer(1.0))]


def test_a_run_is_cancelled_and_the_next_one_is_not(pool: Pool, tmp_path: Path) -> None:
    pool.start("a", "until_cancelled", tmp_path)
    assert heard(pool, at_progress=lambda: pool.cancel("a"))[-1] == ("a", Answer(2.5, share=0.5, stopped=True))
    pool.start("b", "reports", tmp_path)  # in the same worker, where more than one request to end `a` has arrived
    assert heard(pool)[-1] == ("b", Answer(1.0, stopped=False))
    pool.cancel("b")  # has ended: nobody is asked
    pool.start("c", "reports", tmp_path)
    assert heard(pool)[-1] == ("c", Answer(1.0, stopped=False))


@pytest.mark.parametrize("name", ["hangs", "ignores_sigterm"])
def test_a_limit_ends_a_run(pool: Pool, tmp_path: Path, name: str) -> None:
    pool.start("first", "who", tmp_path)
    ((_, (process, _)),) = heard(pool)  # a worker that has started
    pool.start("a", name, tmp_path, limit=3.0)
    assert heard(pool) == [("a", Progress(0.1, 4.0)), ("a", Died(-signal.SIGKILL, timed_out=True))]
    assert not alive(process) and pool.free == 2
    pool.start("b", "reports", tmp_path)  # by a new one, and without a limit
    assert heard(pool)[-1] == ("b", Answer(1.0))


def test_a_killed_worker_and_what_it_leaves(pool: Pool, tmp_path: Path) -> None:
    pool.start("a", "starts_children_and_dies", tmp_path)
    assert heard(pool)[-1] == ("a", Died(-signal.SIGKILL))
    assert not any(map(alive, processes(tmp_path)))


def test_stop_leaves_nothing(pool: Pool, tmp_path: Path) -> None:
    pool.start("a", "with_children", tmp_path)
    wait_until(lambda: (tmp_path / "processes").exists())
    assert all(map(alive, processes(tmp_path)))
    pool.stop()
    assert not any(map(alive, processes(tmp_path)))


def test_what_a_run_raises_is_one_line_and_a_spent_worker_is_replaced(pool: Pool, tmp_path: Path) -> None:
    said = []
    for name in ("raises", "cannot_be_sent", "who", "is_spent", "who"):
        pool.start(name, name, tmp_path)
        said.append(heard(pool)[0][1])
    assert said[:2] == [Raised("not as asked"), Raised("RuntimeError: two lines")] and said[3] == Answer(5.0)
    assert said[2][0] != said[4][0], "another process"


def test_the_smallest_free_index_is_a_new_workers_own(pool: Pool, tmp_path: Path) -> None:
    pool.start("a", "is_spent", tmp_path)
    pool.start("b", "who", tmp_path)
    answers = dict(heard(pool, runs=2))
    assert answers["b"][1] == "1" and INDEX not in os.environ
    pool.start("c", "hangs", tmp_path)  # b's worker is free and takes it
    pool.start("d", "who", tmp_path)
    found = dict((run, answer) for run, answer in heard(pool) if run == "d")
    assert found["d"][1] == "0", "a's is free again"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGHUP])
def test_a_killed_parent_takes_all_along(tmp_path: Path, sent: signal.Signals) -> None:
    """SIGHUP goes to the whole group, as when a terminal closes."""
    code = (
        "import signal, sys, pathlib; from moe_param.tuning.workers import Pool\n"
        "from tests.tuning.test_workers import work\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and children inherit that\n"
        "pool = Pool(work, 1); pool.start('a', 'with_children', pathlib.Path(sys.argv[1]))\n"
        "while True: pool.answers(timeout=1.0)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, start_new_session=True)
    wait_until(lambda: parent.poll() is not None or (tmp_path / "processes").exists())
    assert all(map(alive, processes(tmp_path)))
    os.killpg(parent.pid, sent)
    parent.wait(60)
    wait_until(lambda: not any(map(alive, processes(tmp_path))))


def test_only_processes_with_the_mark_are_ended() -> None:
    ours, other = (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, MARK: mark})
        for mark in ("mine 1", "another 1")
    )
    try:
        wait_until(lambda: [process.pid for process in marked("mine")] == [ours.pid])
        end("mine", patience=1.0)
        assert ours.wait(60) == -signal.SIGTERM and other.poll() is None, "asked, not killed"
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


def processes(folder: Path) -> list[int]:
    """The worker, its child in another session, its grandchild without a parent."""
    found = [int(text) for text in (folder / "processes").read_text().split()]
    assert len(found) == 3
    return found
