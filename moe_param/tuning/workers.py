"""Worker processes that can be killed: each evaluates one run at a time, and its death is the end of its pipe.

Imports nothing heavy, so a worker starts with what its function needs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

Evaluate = Callable[[dict[str, float], int], float]
"""(point, seed) → loss, inf or NaN where it diverged. Runs in a worker process, so it must pickle."""

Run = tuple[int, int]  # trial number, seed


class Worker:
    def __init__(self, evaluate: Evaluate) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, evaluate), daemon=True)
        self.process.start()
        theirs.close()  # so that the worker's death is the end of the pipe
        self.run: Run | None = None

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


def _work(connection: Connection, evaluate: Evaluate) -> None:
    """Answers each (point, seed) with a loss, or with what was raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()
    while True:
        try:
            point, seed = connection.recv()
        except EOFError:
            return
        try:
            answer: float | str = float(evaluate(point, seed))
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        connection.send(answer)


def die_with_parent() -> None:
    """A killed parent takes this process along, in the middle of a run too."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
