"""Worker processes that can be killed: each does one run at a time, and its death is the end of its run.

A worker says how its run goes, can be asked to end it, and takes all that it started along when it or its parent dies:
every process below it carries its mark in the environment, whatever session or parent it has by then. Imports nothing
heavy, so a worker starts with what its function needs.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from moe_param.errors import MoeParamError

Watch = Callable[[float, float], bool]
"""(share of the run that is done, training loss so far) → whether to go on."""


@dataclass(frozen=True)
class Answer:
    """What one run of a trial came to."""

    loss: float  # held-out, in nats; inf where it left the finite numbers or failed; stopped: its training loss so far
    share: float = 1.0  # of the run's steps that were done
    stopped: bool = False  # by the search, as hopeless
    failure: str | None = None  # the end of what a run that failed said


Evaluate = Callable[[dict[str, float], int, Watch], Answer]
"""(point, seed, watch) → how the run went. It is called in a worker process, so it must pickle."""

ATTEMPTS = 3
"""Times that a run may cost its worker's life."""

PATIENCE = 3.0
"""Seconds between asking a process to end and killing it."""

INDEX = "MOE_PARAM_WORKER"
"""The environment variable with a worker's number, from 0: which GPU is its own, for one."""

MARK = "MOE_PARAM_WORKER_MARK"
"""The environment variable by which a worker's processes are found, down to those whose parent is gone."""


@dataclass(frozen=True)
class Progress:
    """What a run says while it is under way."""

    share: float
    loss: float


@dataclass(frozen=True)
class Raised:
    """The answer of a run that raised: what it said, in one line."""

    text: str


@dataclass(frozen=True)
class Died:
    """The answer of a worker that is no more."""

    exit_code: int | None  # negative: minus the signal's number
    timed_out: bool = False  # killed because the run took longer than it may

    @property
    def by_itself(self) -> bool:
        """It said why, and would again: no reason to try once more."""
        return self.exit_code is not None and self.exit_code > 0


class Spent(Exception):
    """Raised by a run whose process is of no further use (a GPU's context that broke), with the run's answer."""

    def __init__(self, answer: Any) -> None:
        super().__init__(answer)
        self.answer = answer


@dataclass(frozen=True)
class _Cancel:
    """Asks for the end of a run, which may have ended meanwhile: so it says which."""

    number: int


@dataclass(frozen=True)
class _Last:
    """A last answer: the worker ends."""

    answer: Any


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    index: int
    mark: str
    run: Hashable | None = None  # what it is at
    number: int = 0  # of the runs it was given
    deadline: float = math.inf  # of that run


class Pool:
    """Up to `size` processes that call `work(*arguments, watch)`, started when there is something to do.

    The smallest free index is a new worker's own, in the environment as MOE_PARAM_WORKER.
    """

    def __init__(self, work: Callable[..., Any], size: int) -> None:
        self._work, self._size = work, size
        self._workers: list[_Worker] = []
        self._mark = uuid.uuid4().hex

    @property
    def free(self) -> int:
        """How many runs could start now."""
        return self._size - sum(worker.run is not None for worker in self._workers)

    def start(self, run: Hashable, *arguments: Any, limit: float | None = None) -> None:
        """`work(*arguments, watch)` in a free worker; the answer comes under the name `run`.

        limit: seconds after which the worker is killed; those in which it starts count.
        """
        worker = next((worker for worker in self._workers if worker.run is None), None) or self._new()
        worker.run, worker.number = run, worker.number + 1
        worker.deadline = math.inf if limit is None else time.monotonic() + limit
        with suppress(OSError):  # it died idle: `answers` finds out
            worker.connection.send((worker.number, arguments))

    def cancel(self, run: Hashable) -> None:
        """The run's watch says no from now on. Its answer still comes; one that has ended is left alone."""
        for worker in self._workers:
            if worker.run == run:
                with suppress(OSError):
                    worker.connection.send(_Cancel(worker.number))

    def answers(self, timeout: float) -> list[tuple[Any, Any]]:
        """(run, `Progress`) of the runs under way, (run, what it returned, `Raised` or `Died`) of those that ended.

        Waits so many seconds for the first.
        """
        busy = [worker for worker in self._workers if worker.run is not None]
        first = min((worker.deadline for worker in busy), default=math.inf) - time.monotonic()
        wait([worker.connection for worker in busy], timeout=max(0.0, min(timeout, first)))
        return [(run, answer) for worker in busy for run in (worker.run,) for answer in self._heard(worker)]

    def stop(self) -> None:
        """Ends all workers, whatever they are at, and all that they started."""
        for worker in self._workers:
            worker.process.kill()
        end(self._mark, PATIENCE)
        for worker in self._workers:
            worker.process.join(PATIENCE)
            worker.connection.close()
        self._workers.clear()

    def _heard(self, worker: _Worker) -> Iterator[Any]:
        """What a worker said since it was asked last."""
        alive = worker.process.is_alive()  # asked first: what it said before it died is read below
        try:
            while worker.connection.poll():
                said = worker.connection.recv()
                if isinstance(said, Progress):
                    yield said
                    continue
                worker.run, worker.deadline = None, math.inf
                if isinstance(said, _Last):
                    self._bury(worker)
                    said = said.answer
                yield said
                return
        except (EOFError, OSError):
            alive = False
        late = time.monotonic() >= worker.deadline
        if late or not alive:
            yield self._bury(worker, timed_out=late and alive)

    def _bury(self, worker: _Worker, timed_out: bool = False) -> Died:
        """Ends a worker for good."""
        self._workers.remove(worker)
        if timed_out:
            worker.process.kill()
        worker.process.join(PATIENCE)
        end(worker.mark)
        worker.connection.close()
        return Died(worker.process.exitcode, timed_out)

    def _new(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._work), daemon=True)
        index = next(i for i in range(self._size) if i not in {worker.index for worker in self._workers})
        mark = f"{self._mark} {uuid.uuid4().hex}"
        with _interrupts_held_back(), _environment({INDEX: str(index), MARK: mark}):
            process.start()
        theirs.close()  # so that the worker's death is the end of the pipe
        self._workers.append(_Worker(process, ours, index, mark))
        return self._workers[-1]


def _serve(connection: Connection, work: Callable[..., Any]) -> None:
    """Answers each message, the arguments of a run, with what `work` returned or what it raised."""
    _leave_the_terminal()
    die_with_parent()
    try:
        while True:
            message = connection.recv()
            if isinstance(message, _Cancel):
                continue  # of a run that had ended
            number, arguments = message
            answer = _answer(work, (*arguments, _Line(connection, number)))
            connection.send(answer)
            if isinstance(answer, _Last):
                return
    except (EOFError, ConnectionError):
        return  # the parent is gone
    finally:
        end(os.environ[MARK])


def _answer(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return work(*arguments)
    except Spent as spent:
        return _Last(spent.answer)
    except Exception as error:
        said = " ".join(str(error).split())
        return Raised(said if isinstance(error, MoeParamError) else f"{type(error).__name__}: {said}")


class _Line:
    """The watch of one run: tells the parent, listens whether it wants the end."""

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection, self._number, self._wanted = connection, number, True

    def __call__(self, share: float, loss: float) -> bool:
        self._connection.send(Progress(share, loss))
        while self._connection.poll():
            self._wanted &= self._connection.recv() != _Cancel(self._number)
        return self._wanted


# -- processes that must not be left behind ---------------------------------------------------------------------------
def end(mark: str, patience: float = 0.0) -> None:
    """Ends the processes with this mark, but for this one.

    They are asked to end, where there is patience, and what is still there after so many seconds is killed. One that
    the system cannot kill (a driver that hangs) is left after a while.
    """
    asked_until = time.monotonic() + patience
    given_up_at = asked_until + PATIENCE
    if patience:
        _signal(marked(mark), signal.SIGTERM)
    while (left := marked(mark)) and time.monotonic() < given_up_at:
        if time.monotonic() >= asked_until:
            _signal(left, signal.SIGKILL)
        time.sleep(0.02)


def marked(mark: str) -> list[psutil.Process]:
    """The living processes whose mark begins with this one, but for this process."""
    return [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get(MARK, "").startswith(mark) and process.pid != os.getpid()
    ]


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """What a process that is started meanwhile finds in its environment."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A process started meanwhile never sees Ctrl-C, which a terminal sends to all: its parent stops it."""
    resource_tracker.ensure_running()  # starting it later would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_the_terminal() -> None:
    """A session of one's own: what a terminal sends when it closes must not kill a worker before it has cleaned up."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # drops one that was held back
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as programs expect that a worker starts


def die_with_parent() -> None:
    """A killed parent takes this process along, in the middle of a run too, and all that it started."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        end(os.environ[MARK])
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
