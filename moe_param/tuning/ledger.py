"""Many runs on the cores of one machine, each done once however often the command is interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moe_param.errors import InputError
from moe_param.training.report import finite, read_lines
from moe_param.tuning.workers import die_with_parent


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    work: Callable[[Any], dict[str, Any]],
    jobs: Mapping[str, Any],
    ledger: Path,
    *,
    settings: Mapping[str, Any],
    costs: Mapping[str, float],
    workers: int,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """`work(job)` for every job that is not in the ledger, one thread each, expensive ones first.

    Args:
        work: a function of a module (workers import it). Numbers in what it returns that are not finite come back
            as None.
        jobs, settings, costs: by name; settings (plain values) say what a job is, so that a ledger of other runs is
            noticed.

    Raises:
        InputError: the ledger holds a job of this name with other settings.
    """
    ledger.parent.mkdir(parents=True, exist_ok=True)
    wanted = {name: json.loads(json.dumps(settings[name])) for name in jobs}
    done: dict[str, dict[str, Any]] = {}
    for line in read_lines(ledger):
        name = line["run"]
        if name in jobs:
            if line["settings"] != wanted[name]:
                raise InputError(f"{ledger} holds {name} with other settings: take another --output_dir")
            done[name] = line["result"]
    if ledger.exists():  # a line that a kill cut short must not run into the next one
        os.truncate(ledger, ledger.read_bytes().rfind(b"\n") + 1)
    left = sorted((name for name in jobs if name not in done), key=lambda name: -costs[name])
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers start; they are the parallelism
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start) as pool,
        ledger.open("a", encoding="utf-8") as file,
    ):
        task = progress.add_task(f"{len(done)}/{len(jobs)} runs", total=sum(costs[name] for name in left))
        pending = {pool.submit(work, jobs[name]): name for name in left}
        for future in as_completed(pending):
            name = pending[future]
            done[name] = finite(future.result())
            file.write(json.dumps({"run": name, "settings": wanted[name], "result": done[name]}) + "\n")
            file.flush()
            progress.update(task, advance=costs[name], description=f"{len(done)}/{len(jobs)} runs")
    return done


def _start() -> None:
    torch.set_num_threads(1)
    die_with_parent()
