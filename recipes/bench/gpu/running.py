"""Runs steps one after the other, each as a process that is killed at its limit, and remembers what became of them.

What a step ended as is a line in `runs.jsonl`, written when it ends; a run that was interrupted repeats the step it was
in and none before it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_param.errors import InputError
from moe_param.ledger import append, read_finished
from recipes.bench.gpu.steps import NOT_BUILT_STATUS, Step

ROOT = Path(__file__).parents[3]
LEDGER = "runs.jsonl"
DONE, FAILED, LIMIT = "done", "failed", "killed at its limit"
NOT_BUILT, NOT_RUN, NO_TIME = "not built", "not run", "no time left"
LEAST = 20.0
"""Seconds below which no step is begun: loading torch and transformers takes most of them."""
SLACK = 5
"""Times its limit that a step gets in a dry run: a CPU may be busy."""
TAIL = 15
"""Lines of a failure's output that the report shows."""


@dataclass(frozen=True)
class Outcome:
    step: str
    state: str
    seconds: float = 0.0
    reason: str = ""
    """Why it is not done: the end of what it said, or one sentence."""

    @property
    def final(self) -> bool:
        """Whether another run need not try again."""
        return self.state in (DONE, FAILED, LIMIT)


@dataclass(frozen=True)
class Run:
    """Where and how steps run."""

    folder: Path
    device: str
    smallest: bool
    environment: Mapping[str, str]

    def result(self, step: Step) -> Path:
        return self.folder / f"{slug(step)}.json"

    def log(self, step: Step) -> Path:
        return self.folder / f"{slug(step)}.log"


def slug(step: Step) -> str:
    return step.name.replace(", ", "-").replace(" ", "-")


def run_all(
    steps: Sequence[Step],
    run: Run,
    machine: Mapping[str, Any],
    end: float,
    retry: bool = False,
    only: Collection[str] = (),
) -> Iterator[Outcome]:
    """What becomes of each step, as it ends.

    Args:
        end: when the time is up, by `time.monotonic`.
        machine: what the results depend on. Those of another machine are refused.
        retry: run again what failed or was killed at its limit.
        only: names of the steps to run; of the others, what earlier runs left. Default: all.

    Raises:
        InputError: the folder holds the results of another machine, or another command works in it.
    """
    ended = finished(run.folder / LEDGER, machine)
    for step in steps:
        known = ended.get(step.name)
        if only and step.name not in only:
            yield known or Outcome(step.name, NOT_RUN, reason="not among --only")
        elif step.not_built:
            yield Outcome(step.name, NOT_BUILT, reason=step.not_built)
        elif known and (known.state == DONE or not retry):
            yield known
        elif step.needs and (step.needs not in ended or ended[step.needs].state != DONE):
            yield Outcome(step.name, NOT_RUN, reason=f"needs {step.needs}")
        elif end - time.monotonic() < LEAST:
            yield Outcome(step.name, NO_TIME, reason="the same command goes on with it")
        else:
            outcome = run_step(step, run, end - time.monotonic())
            if outcome.final:
                append(run.folder / LEDGER, {**asdict(outcome), "machine": dict(machine)})
                ended[step.name] = outcome
            yield outcome


def finished(ledger: Path, machine: Mapping[str, Any]) -> dict[str, Outcome]:
    """What runs before this one brought to an end, the last word on each step."""
    found = {}
    for line in read_finished(ledger):
        theirs = line.pop("machine")
        for name, value in machine.items():
            if theirs.get(name) != value:
                raise InputError(
                    f"{ledger.parent} holds results of another machine: {name} was {theirs.get(name)}, here it is "
                    f"{value}. Give another --out"
                )
        found[line["step"]] = Outcome(**line)
    return found


def run_step(step: Step, run: Run, left: float) -> Outcome:
    """Runs one step for at most its limit, or what time is left: then it is not over, and a later run repeats it."""
    own = step.limit * (SLACK if run.smallest else 1)
    limit = min(own, left)
    start = time.monotonic()
    code = run_guarded(step.command(run.result(step), run.device, run.smallest), run.log(step), run.environment, limit)
    seconds = round(time.monotonic() - start, 1)
    if code is None and left < own:
        return Outcome(step.name, NO_TIME, seconds, f"cut after {seconds:.0f} s; the same command repeats it")
    if code == NOT_BUILT_STATUS:
        return Outcome(step.name, NOT_BUILT, seconds, tail(run.log(step), 1))
    if code is None:
        return Outcome(step.name, LIMIT, seconds, f"after {limit:g} s. {tail(run.log(step))}")
    return Outcome(step.name, FAILED if code else DONE, seconds, tail(run.log(step)) if code else "")


def run_guarded(command: list[str], log: Path, environment: Mapping[str, str], limit: float) -> int | None:
    """The exit status of a command, None where it was killed at its limit; all that it started goes with it."""
    with log.open("w", encoding="utf-8") as file:
        guard = subprocess.Popen(
            [sys.executable, "-m", "recipes.bench.gpu.guard", *command],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.PIPE,  # see guard
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return guard.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if guard.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(guard.pid, signal.SIGKILL)
                guard.wait()
            assert guard.stdin is not None
            guard.stdin.close()


def tail(log: Path, lines: int = TAIL) -> str:
    """The last lines of a log, without empty ones."""
    text = log.read_text("utf-8", "replace") if log.exists() else ""
    said = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(said[-lines:]) or "it said nothing"
