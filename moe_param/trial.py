"""`moe_param.report`: how a training script tells the search that started it what comes of a run.

The search names a file in the environment; the script's first process adds a line to it for every call, and that line
holds what the call returns. The other processes read it there, so that all of them end at the same step.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

from moe_param.errors import MoeParamError

FILE = "MOE_PARAM_REPORT"
"""The environment variable with the path of a run's reports; beside it, with STOP added, is the wish that it ends."""

STOP = ".stop"
"""What the name of that wish ends in."""

WAIT = 600.0
"""Seconds that a process waits for the first one's line."""

_calls: Counter[str] = Counter()  # of this process, by file
_heard: dict[str, Reports] = {}  # by the processes that are not the first


class ReportError(MoeParamError):
    """A report that says nothing: no number, steps that do not count, or one that only some processes made."""


def report(loss: SupportsFloat | SupportsIndex, *, step: int | None = None, steps: int | None = None) -> bool:
    """Tells `moe-param tune --command` how this run goes; started otherwise, does nothing.

        for step in range(1, steps + 1):
            ...
            if step % 50 == 0 and not moe_param.report(loss, step=step, steps=steps):
                break                              # the search has seen enough of this run
        moe_param.report(validation_loss)          # what the run came to

    Call it in every process of a distributed run: the first one's loss counts (by RANK, which torchrun and accelerate
    set), and all are told the same.

    Args:
        loss: a number or a tensor of one. Without `step` the held-out loss, which is the result of the run; with it,
            the training loss so far.
        step, steps: how many of how many steps are done.

    Returns:
        Whether to go on. A script that goes on all the same is ended after a while.

    Raises:
        ReportError: no number; a step without steps or beyond them; processes that do not all call it.
    """
    value = _number(loss)
    if (step is None) != (steps is None) or (step is not None and steps is not None and not 0 <= step <= steps > 0):
        raise ReportError(f"report: step is {step}, steps is {steps}: expected both, or neither, and step ≤ steps")
    path = os.environ.get(FILE)
    if path is None:
        return True
    _calls[path] += 1
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0":
        return _told(_heard.setdefault(path, Reports(path)), _calls[path])
    go_on = math.isfinite(value) and not Path(path + STOP).exists()
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"loss": value, "step": step, "steps": steps, "go_on": go_on}) + "\n")
    return go_on


def _number(loss: Any) -> float:
    try:
        if isinstance(loss, str):
            raise TypeError
        return float(loss)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several
        raise ReportError(f"report: loss is {loss!r:.100}: expected one number") from None


def _told(reports: Reports, call: int) -> bool:
    """What the first process was told at this call."""
    deadline = time.monotonic() + WAIT
    while len(reports.read()) < call:
        if time.monotonic() > deadline:
            raise ReportError(
                f"report: this process waited {WAIT:g} s for the first one's call number {call}: call it in every "
                "process equally often, or in the first one alone"
            )
        time.sleep(0.01)
    return bool(reports.lines[call - 1]["go_on"])


class Reports:
    """The lines of a file that grows."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.lines, self._read = Path(path), list[dict[str, Any]](), 0

    def read(self) -> list[dict[str, Any]]:
        """All that was reported so far; a line that is being written is left for later."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read += len(whole)
            self.lines += [json.loads(line) for line in whole.splitlines()]
        return self.lines
