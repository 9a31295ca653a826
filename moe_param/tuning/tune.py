"""Finds the hyperparameters of a base model: learning rate, init std and constants per role.

    moe-param tune recipes/configs/tiny.yaml --mode grid --output_dir runs/base
    moe-param tune runs/base/tuned.yaml --mode coordinate --output_dir runs/constants

Model, text and horizon are those of training, whose arguments all go here too. The trials are short runs in
a plain loop, spread over worker processes and, through `--storage`, over machines; see `docs/tune.md`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moe_param.errors import InputError
from moe_param.folder_lock import folder_lock
from moe_param.naming import nearest
from moe_param.training.arguments import ModelArguments, PretrainArguments
from moe_param.training.data.text import DataArguments
from moe_param.training.report import finite, hardware, versions
from moe_param.tuning.arguments import TuneArguments
from moe_param.tuning.base import Base, read_base
from moe_param.tuning.constants import Point, canonical, key_of
from moe_param.tuning.page import write
from moe_param.tuning.reports import tune_page
from moe_param.tuning.results import Found, conclude, plot, split, tables, trial_records, write_tuned
from moe_param.tuning.search import (
    Coordinate,
    Grid,
    Search,
    SearchError,
    Strategy,
    Tpe,
    local_file,
    open_study,
    shown,
    status_of,
    storage_errors,
)
from moe_param.tuning.short_run import ShortRun, check_run, times_seen, train
from moe_param.tuning.workers import Answer, Evaluate, Watch


@dataclass(frozen=True)
class Training:
    """What a worker does with a point and a seed."""

    run: ShortRun

    def __call__(self, point: Point, seed: int, watch: Watch) -> Answer:
        torch.set_num_threads(1)  # the workers are the parallelism
        rate, std, constants = split(point)
        run = replace(self.run, lr=rate, init_std=std, constants=constants, seed=seed)
        outcome = train(run, watch)
        loss = outcome.training_loss if outcome.stopped else outcome.validation_loss
        return Answer(loss, outcome.share, outcome.stopped)


def tune(
    args: TuneArguments,
    model: ModelArguments,
    data: DataArguments,
    training: PretrainArguments,
    *,
    command: str,
    evaluate: Evaluate | None = None,
) -> dict[str, Any]:
    """Runs the search and writes tuned.yaml, tune.json, .png and .html to the output folder; returns the second.

    Args:
        command: what was typed, for the record.
        evaluate: stands in for the training of a point with a seed.

    Raises:
        MoeParamError: before a worker starts, whatever is wrong with the arguments; an output folder in use.
        SearchError: a trial that raised, a storage that went away, no trial that did not diverge.
    """
    base = read_base(args, model, data, training)
    strategy = strategy_of(args, base)
    if evaluate is None:
        check_run(base.run)
    output, console = Path(str(training.output_dir)), Console()
    run, start = base.run, time.perf_counter()
    seen = "" if evaluate else times_seen(run)
    console.print(
        f"base: {base.shape}\na run: {run.steps} steps, {run.steps * run.batch_size * run.seq_len:,} tokens, "
        f"{run.schedule}" + (f"; {seen}" if seen else ""),
        soft_wrap=True,
    )
    with folder_lock(output, "moe-param tune (others join with the same --storage and an --output_dir of their own)"):
        trials = search(args, base, strategy, evaluate or Training(run), output, console)
        output.mkdir(parents=True, exist_ok=True)  # the trials may be elsewhere, and it may be gone meanwhile
        found = conclude(strategy, trials)
        record = record_of(args, base, found, trials, command)
        record["seconds"] = round(time.perf_counter() - start, 1)  # of this session, where it was resumed
        write_tuned(output / "tuned.yaml", base.yaml, found, command)
        (output / "tune.json").write_text(json.dumps(finite(record), indent=2) + "\n", "utf-8")
        plot(strategy, trials, found, output / "tune.png")
        write(output / "tune.html", tune_page(record))
    console.print(tables(found, trials))
    tell(found, record["statuses"], output, console)
    return record


def record_of(args: TuneArguments, base: Base, found: Found, trials: list[FrozenTrial], command: str) -> dict[str, Any]:
    """What there is to know about the search."""
    statuses = [status_of(trial) for trial in trials]
    return {
        "command": command,
        "settings": base.settings,
        "storage": shown(args.storage) if args.storage else "study.db",
        "study": args.study,
        "tuned_at": asdict(base.shape),
        "best": asdict(found),
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
        "trials": trial_records(trials),
        "hardware": hardware(),
        "versions": {**versions(), "optuna": version("optuna")},
    }


def tell(found: Found, statuses: Mapping[str, int], output: Path, console: Console) -> None:
    """The last lines: the best point, what to be careful about, where everything is."""
    for name in found.at_edge:
        console.print(f"[yellow]the best {name} is at the end of its ladder: it may lie outside[/]", soft_wrap=True)
    lost = {status: n for status, n in statuses.items() if status != "complete"}
    console.print(
        f"best: {key_of(found.best)}, loss {found.loss:.4f}; {statuses.get('complete', 0)} trials complete"
        + "".join(f", {n} {status}" for status, n in lost.items())
        + f"\n{output / 'tuned.yaml'}, {output / 'tune.json'}, {output / 'tune.png'}, {output / 'tune.html'}",
        soft_wrap=True,
    )


def strategy_of(args: TuneArguments, base: Base) -> Strategy:
    """The search that the arguments describe."""
    ladders: dict[str, list[float]] = dict(args.ladders)  # type: ignore[arg-type]
    for name in ladders:
        _check_constant(name, "ladders", base.roles)
    for role in args.roles:
        _check_constant(f"{role}.lr", "roles", base.roles)
    if args.mode == "coordinate":
        return Coordinate(
            base.start,
            tuple(_coordinates(args.roles, base.roles)),
            tuple(factor for factor in args.factors if factor != 1),
            error_rate=args.error_rate,
        )
    middle = round(math.log2(base.start["learning_rate"]))
    log2_lrs = args.log2_lrs or [middle + octave for octave in range(-3, 4)]
    ladders = {"learning_rate": [2.0**x for x in log2_lrs], **ladders}
    if args.init_stds:
        ladders["init_std"] = args.init_stds
    return _tpe(ladders, base.start, args.trials) if args.mode == "tpe" else _grid(ladders, base.start)


def _check_constant(name: str, option: str, roles: Mapping[str, bool]) -> None:
    """Refuses a constant, `router.lr`, that this model does not have."""
    role, _, kind = name.partition(".")
    if role not in roles:
        raise InputError(f"{option}: no role {role!r} in this model{nearest(role, roles)}")
    if kind not in ("init", "lr"):
        raise InputError(f"{option}: {role} has {kind!r}, expected 'init' or 'lr'")
    if kind == "init" and not roles[role]:
        raise InputError(f"{option}: the initialization of {role} is not random, so it has no constant")


def _coordinates(chosen: list[str], roles: Mapping[str, bool]) -> list[str]:
    """The constants of the chosen roles, or of all: init where that is random, and learning rate."""
    return [
        f"{role}.{kind}"
        for role, random in roles.items()
        if role in (chosen or roles)
        for kind in ("init", "lr")
        if random or kind == "lr"
    ]


def _tpe(ladders: Mapping[str, list[float]], start: Point, trials: int) -> Tpe:
    """Samples between the ends of the ladders; one of a single rung is fixed."""
    fixed = canonical({**start, **{name: ladder[0] for name, ladder in ladders.items() if len(ladder) == 1}})
    ranges = {name: (min(ladder), max(ladder)) for name, ladder in ladders.items() if len(ladder) > 1}
    if not ranges:
        raise InputError("mode tpe has nothing to search: give at least two --log2_lrs, or a range of another kind")
    return Tpe(ranges, {k: v for k, v in fixed.items() if k not in ranges}, trials)


def _grid(ladders: Mapping[str, list[float]], start: Point) -> Grid:
    """Every combination of the ladders, once."""
    points = [canonical({**start, **dict(zip(ladders, values))}) for values in itertools.product(*ladders.values())]
    return Grid(tuple({key_of(point): point for point in points}.values()))


def search(
    args: TuneArguments, base: Base, strategy: Strategy, evaluate: Evaluate, output: Path, console: Console
) -> list[FrozenTrial]:
    """All trials of the study, with a progress bar.

    Raises:
        SearchError: also where the study's file is removed meanwhile.
    """
    storage = args.storage or f"sqlite:///{(output / 'study.db').resolve()}"
    settings = base.settings
    if isinstance(strategy, Tpe):
        settings = {**settings, "search": json.loads(json.dumps({"ranges": strategy.ranges, "fixed": strategy.fixed}))}
    study, file = open_study(storage, args.study, settings), local_file(storage)
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers start
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, storage_errors(storage, running=True):
        task = progress.add_task("")

        def check() -> None:
            if file and not file.exists():
                raise SearchError(f"{file} is gone")  # said in full by storage_errors

        def on_change(done: int, expected: int, text: str) -> None:
            progress.update(task, completed=done, total=expected, description=f"{done}/{expected} trials, {text}")

        return Search(
            study,
            strategy,
            evaluate,
            tuple(args.seeds),
            workers=args.workers,
            heartbeat=args.heartbeat,
            grace=args.grace,
            on_change=on_change,
            check=check,
        ).run()
