"""Worker processes that can be killed: each does one run at a time, and its death is the end of its pipe.

Imports nothing heavy, so a worker starts with what its function needs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from moe_param.errors import MoeParamError

Evaluate = Callable[[dict[str, float], int], float]
"""(point, seed) → loss, inf or NaN where it diverged. Runs in a worker process, so it must pickle."""

ATTEMPTS = 3
"""Times that a run may cost its worker's life."""


@dataclass(frozen=True)
class Raised:
    """The answer of a run that raised: what it said, in one line."""

    text: str


@dataclass(frozen=True)
class Died:
    """The answer of a worker that is no more."""

    exit_code: int | None  # negative: minus the signal's number

    @property
    def by_itself(self) -> bool:
        """It said why, and would again: no reason to try once more."""
        return self.exit_code is not None and self.exit_code > 0


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    run: Hashable | None = None  # what it is at


class Pool:
    """Up to `size` processes that call `work`, started when there is something to do."""

    def __init__(self, work: Callable[..., Any], size: int) -> None:
        self._work, self._size = work, size
        self._workers: list[_Worker] = []

    @property
    def free(self) -> int:
        """How many runs could start now."""
        return self._size - sum(worker.run is not None for worker in self._workers)

    def start(self, run: Hashable, *arguments: Any) -> None:
        """`work(*arguments)` in a free worker; the answer comes under the name `run`."""
        worker = next((worker for worker in self._workers if worker.run is None), None) or self._new()
        worker.run = run
        with suppress(OSError):  # it died idle: `answers` finds out
            worker.connection.send(arguments)

    def answers(self, timeout: float) -> list[tuple[Any, Any]]:
        """(run, what it returned, `Raised` or `Died`) of the runs that ended; waits so many seconds for the first."""
        busy = [worker for worker in self._workers if worker.run is not None]
        ready = wait([worker.connection for worker in busy], timeout=timeout)
        found = []
        for worker in busy:
            if worker.connection in ready:
                run, worker.run = worker.run, None
                try:
                    found.append((run, worker.connection.recv()))
                except (EOFError, OSError):
                    self._workers.remove(worker)
                    worker.process.join()
                    found.append((run, Died(worker.process.exitcode)))
        return found

    def stop(self) -> None:
        """Ends all workers, whatever they are at."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def _new(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        with _interrupts_held_back():
            process.start()
        theirs.close()  # so that the worker's death is the end of the pipe
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]


def _serve(connection: Connection, work: Callable[..., Any]) -> None:
    """Answers each message, the arguments of a run, with what `work` returned or what it raised."""
    die_with_parent()
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = work(*arguments)
        except Exception as error:
            said = " ".join(str(error).split())
            answer = Raised(said if isinstance(error, MoeParamError) else f"{type(error).__name__}: {said}")
        connection.send(answer)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A process started meanwhile never sees Ctrl-C, which a terminal sends to all: its parent stops it."""
    resource_tracker.ensure_running()  # starting it later would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die_with_parent() -> None:
    """A killed parent takes this process along, in the middle of a run too."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Schedulers end jobs with SIGTERM: time to put things in order."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
