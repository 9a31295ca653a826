"""Many runs on the cores of one machine, each done once however often the command is interrupted."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from moe_param.errors import InputError, MoeParamError
from moe_param.ledger import append, read_finished
from moe_param.tuning.workers import ATTEMPTS, Died, Pool, Progress, Raised, Watch, sigterm_as_interrupt


class RunError(MoeParamError):
    """A run that cannot be done, or whose result cannot be kept."""


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    work: Callable[[Any, Watch], dict[str, Any]],
    jobs: Mapping[str, Any],
    ledger: Path,
    *,
    settings: Mapping[str, Any],
    costs: Mapping[str, float],
    workers: int,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """`work(job, watch)` for every job that is not in the ledger, expensive ones first, each in a process of its own.

    Args:
        work: a function of a module (workers import it). What it returns has to be JSON: null for infinity and NaN.
        jobs, settings, costs: by name; settings (plain values) say what a job is, so that a ledger of other runs is
            noticed.

    Raises:
        InputError: the ledger holds a job of this name with other settings.
        RunError: a job raised, its worker died three times, or the ledger was removed meanwhile.
        KeyboardInterrupt: also for SIGTERM. Jobs under way are stopped.
    """
    ledger.parent.mkdir(parents=True, exist_ok=True)
    wanted = {name: json.loads(json.dumps(settings[name])) for name in jobs}
    done = finished(ledger, wanted)
    left = deque(sorted((name for name in jobs if name not in done), key=lambda name: -costs[name]))
    deaths: Counter[str] = Counter()
    with (
        _progress(console, done, len(jobs), sum(costs[name] for name in left)) as advance,
        _pool(work, workers) as pool,
    ):
        while len(done) < len(jobs):
            while left and pool.free:
                name = left.popleft()
                pool.start(name, jobs[name])
            for name, answer in pool.answers(timeout=1.0):
                if isinstance(answer, Progress):
                    continue
                if isinstance(answer, Died):
                    deaths[name] += 1
                    if answer.by_itself or deaths[name] == ATTEMPTS:
                        raise RunError(_obituary(name, answer))
                    left.appendleft(name)
                    continue
                if isinstance(answer, Raised):
                    raise RunError(f"run {name}: {answer.text}")
                done[name] = answer
                append(ledger, {"run": name, "settings": wanted[name], "result": answer})
                advance(costs[name])
            if not ledger.exists():
                raise RunError(f"{ledger} was removed while this command ran, with its {len(done)} runs: start again")
    return done


def finished(ledger: Path, wanted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The results in the ledger that are wanted, by name.

    Raises:
        InputError: one was made with other settings, or a line that cannot be read.
    """
    done: dict[str, dict[str, Any]] = {}
    for line in read_finished(ledger):
        name = line["run"]
        if name in wanted:
            if line["settings"] != wanted[name]:
                raise InputError(f"{ledger} holds {name} with other settings: take another --output_dir")
            done[name] = line["result"]
    return done


def _obituary(name: str, death: Died) -> str:
    if death.by_itself:
        return f"run {name}: its process ended with exit code {death.exit_code}: what it said is above"
    return f"run {name}: its process was killed {ATTEMPTS} times (out of memory?): try fewer --workers"


@contextmanager
def _pool(work: Callable[[Any, Watch], dict[str, Any]], workers: int) -> Iterator[Pool]:
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers start; they are the parallelism
    pool = Pool(work, workers)
    with sigterm_as_interrupt():
        try:
            yield pool
        finally:
            pool.stop()


@contextmanager
def _progress(console: Console, done: Mapping[str, Any], jobs: int, cost: float) -> Iterator[Callable[[float], None]]:
    """A bar that counts runs and advances by what they cost."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, console=console) as progress:
        task = progress.add_task(f"{len(done)}/{jobs} runs", total=cost)
        yield lambda cost: progress.update(task, advance=cost, description=f"{len(done)}/{jobs} runs")
