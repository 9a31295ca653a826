"""Finds the hyperparameters of a base model: learning rate, init std and constants per role.

    moe-param tune recipes/configs/demo.yaml --output_dir runs/base

Model, text and horizon are those of training, whose arguments all go here too. A run is a short training in a plain
loop, or the user's own script; runs are spread over worker processes and, through `--storage`, over machines; see
`docs/tune.md`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PretrainedConfig

import moe_param
from moe_param.errors import InputError
from moe_param.folder_lock import folder_lock
from moe_param.naming import nearest
from moe_param.parsing import check_keys, option_names, parse
from moe_param.structure.trace import model_class_for
from moe_param.training.arguments import (
    TRAINING_TYPES,
    ModelArguments,
    PretrainArguments,
    build_configs,
    config_defaults,
)
from moe_param.training.data.text import DataArguments
from moe_param.training.report import finite, flops_per_token, hardware, versions
from moe_param.tuned import Tuned, read_tuned
from moe_param.tuning.arguments import STARTS, TuneArguments
from moe_param.tuning.base import Base, overrides_of, read_base
from moe_param.tuning.page import write
from moe_param.tuning.pictures import plot
from moe_param.tuning.points import Point, canonical, key_of, mean_loss
from moe_param.tuning.reports import tune_page
from moe_param.tuning.results import Found, conclude, found_record, spent_by, tables, trial_records, write_tuned
from moe_param.tuning.runners import CommandRunner, Loop, LoopRunner, Runner
from moe_param.tuning.search import Search
from moe_param.tuning.short_run import times_seen
from moe_param.tuning.stages import ladder_cost, least_budget, sampled, staged
from moe_param.tuning.strategies import SAMPLERS, Coordinate, Grid, Staged, Strategy
from moe_param.tuning.study import SearchError, local_file, open_study, results_of, shown, status_of, storage_errors
from moe_param.tuning.workers import Evaluate

RATES, STDS, CONSTANTS = (1 / 16, 16.0), (0.5, 8.0), (1 / 16, 16.0)
"""How far from the start a sampler may go, where no ladder says."""


@dataclass(frozen=True)
class Space:
    """What is searched beside learning rate and init std.

    roles: whose constants, init and learning rate of each; None: all that the model has; (): none.
    """

    roles: Sequence[str] | None = None


def tune(
    config: str | Path | PretrainedConfig | Mapping[str, Any],
    *,
    space: Space | None = None,
    runner: Runner | None = None,
    storage: str | None = None,
    budget: float | str | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    output_dir: str | Path = "tune",
    **options: Any,
) -> Tuned:
    """`moe-param tune` as a function: searches the base, leaves tuned.yaml and a report in `output_dir`.

    Args:
        config: a YAML file or what it would say; a config, its folder, Hub id or model type.
        space: what is searched beside learning rate and init std.
        runner: what a run is, `LoopRunner` or `CommandRunner`. Default: `LoopRunner()`.
        storage: Optuna's, for many machines. Default: a file in `output_dir`.
        budget: full runs of the base, or a share of a run at `shape`, "25%". Default: 75.
        seeds: the first is what every candidate is trained with; all decide what is kept.
        options: as on the command line: mode, start, workers, study, …, and those of training, as max_steps or seq_len.

    Returns:
        What was found, as `read_tuned(output_dir / "tuned.yaml")`.

    Raises:
        MoeParamError: whatever is wrong with the input, before the first run; see `run_tune`.
    """
    types = (TuneArguments, *TRAINING_TYPES)
    values: dict[str, Any] = {**config_values(config), **options}
    check_keys("tune", values, option_names(types))
    values |= {"storage": storage, "budget": None if budget is None else str(budget), "seeds": list(seeds)}
    values["output_dir"] = str(output_dir)
    if space is not None and space.roles is not None:
        values["roles"] = list(space.roles) or ["none"]
    args, model, data, training = parse(types, [], prog="moe_param.tune", defaults=values)
    given = {**options, "budget": budget, "seeds": tuple(seeds), "space": space, "output_dir": str(output_dir)}
    named = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    call = f"import moe_param; from moe_param import Space; moe_param.tune({values_shown(config)!r}, {named})"
    run_tune(args, model, data, training, command=shlex.join(["python", "-c", call]), runner=runner)
    return read_tuned(Path(output_dir) / "tuned.yaml")


def values_shown(config: str | Path | PretrainedConfig | Mapping[str, Any]) -> Any:
    """The config as it can be typed again."""
    return str(config) if isinstance(config, str | Path) else config_values(config)


def config_values(config: str | Path | PretrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    """What a config says, under the names of the options."""
    if isinstance(config, PretrainedConfig):
        return {"model_type": config.model_type, "overrides": overrides_of(config)}
    if isinstance(config, Mapping):
        return dict(config)
    values = config_defaults([str(config)])
    values.pop("output_dir", None)  # where training writes
    return {**values, "config": str(config)} if str(config).endswith((".yaml", ".yml")) else values


def run_tune(
    args: TuneArguments,
    model: ModelArguments,
    data: DataArguments,
    training: PretrainArguments,
    *,
    command: str,
    runner: Runner | None = None,
    evaluate: Evaluate | None = None,
) -> dict[str, Any]:
    """Runs the search and writes tuned.yaml, tune.json, tune.png and tune.html; returns what tune.json holds.

    Args:
        command: what was typed, for the record.
        runner: what a run is. Default: what the arguments say.
        evaluate: stands in for the runner's training of a point with a seed.

    Raises:
        MoeParamError: before a worker starts, whatever is wrong with the arguments; an output folder in use.
        SearchError: a run that raised, a storage that went away, no run that did not diverge.
    """
    base = read_base(args, model, data, training)
    strategy = strategy_of(args, base, share_of_target(args, base, model, data))
    output, console = Path(str(training.output_dir)), Console()
    runner = runner or runner_of(args, output)
    seen = times_seen(base.run) if evaluate is None and isinstance(runner, LoopRunner) else ""
    evaluate = evaluate or runner.bind(base)
    start = time.perf_counter()
    console.print(header(base, strategy, seen), soft_wrap=True)
    base = replace(base, settings={**base.settings, "trial": what_a_run_is(runner, evaluate)})
    with folder_lock(output, "moe-param tune (others join with the same --storage and an --output_dir of their own)"):
        workers = args.workers or min(8, runner.workers())
        trials = search(args, base, strategy, evaluate, workers, output, console)
        output.mkdir(parents=True, exist_ok=True)  # the trials may be elsewhere, and it may be gone meanwhile
        found = conclude(strategy, trials, args.seeds)
        record = finite(record_of(args, base, found, trials, command))
        record["seconds"] = round(time.perf_counter() - start, 1)  # of this session, where it was resumed
        write_tuned(output / "tuned.yaml", base.yaml, found, command)
        (output / "tune.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        plot(record, output / "tune.png")
        write(output / "tune.html", tune_page(record))
    for table in tables(found, trials):
        console.print(table)
    tell(found, record["statuses"], output, console)
    return record


def what_a_run_is(runner: Runner, evaluate: Evaluate) -> dict[str, Any]:
    """What else the losses of a study depend on: the command, or the precision."""
    if isinstance(runner, CommandRunner):
        return {"command": runner.command}
    return {"dtype": evaluate.run.dtype} if isinstance(evaluate, Loop) else {}


def header(base: Base, strategy: Strategy, seen: str) -> str:
    """What is searched, and what a run is."""
    run = base.run
    budget = f", a budget of {strategy.budget:g} runs" if isinstance(strategy, Staged) else ""
    tokens = run.steps * run.batch_size * run.seq_len
    text = f"; {seen}" if seen else ""
    return f"base: {base.shape}\na run: {run.steps} steps, {tokens:,} tokens, {run.schedule}{budget}{text}"


def runner_of(args: TuneArguments, output: Path) -> Runner:
    """What a run is, by the arguments."""
    if args.command is not None:
        return CommandRunner(args.command, args.limit, args.gpus_per_run, output / "runs")
    return LoopRunner(device=args.device, dtype=args.dtype)


def share_of_target(args: TuneArguments, base: Base, model: ModelArguments, data: DataArguments) -> float | None:
    """FLOPs of a run at the base over those of one at `--shape` (as many tokens); None where the budget needs none."""
    if not (args.budget or "").strip().endswith("%") or not model.shape:
        return None
    _, target = build_configs(model)
    model_class = model_class_for(base.config)
    flops = [
        flops_per_token(
            moe_param.plan(model_class, config, base.config),
            data.seq_len,
            bool(getattr(config, "tie_word_embeddings", 0)),
        )
        for config in (base.config, target)
    ]
    return flops[0] / flops[1]


def record_of(args: TuneArguments, base: Base, found: Found, trials: list[FrozenTrial], command: str) -> dict[str, Any]:
    """What there is to know about the search."""
    statuses = [status_of(trial) for trial in trials]
    return {
        "command": command,
        "settings": base.settings,
        "storage": shown(args.storage) if args.storage else "study.db",
        "study": args.study,
        "tuned_at": asdict(base.shape),
        "steps": base.run.steps,
        "tokens": base.run.steps * base.run.batch_size * base.run.seq_len,
        "best": found_record(found),
        "full_runs": found.spent,
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
    names = ("tuned.yaml", "tune.json", "tune.png", "tune.html")
    console.print(
        f"best: {key_of(found.best)}, loss {found.loss:.4f}; {statuses.get('complete', 0)} runs complete"
        + "".join(f", {n} {status}" for status, n in lost.items())
        + f"; {found.spent:.1f} full runs in all\n{', '.join(str(output / name) for name in names)}",
        soft_wrap=True,
    )


# -- which search -----------------------------------------------------------------------------------------------------
def strategy_of(args: TuneArguments, base: Base, share: float | None = None) -> Strategy:
    """The search that the arguments describe.

    Raises:
        InputError: a role or constant that the model has not, a budget that is too small.
    """
    ladders: dict[str, list[float]] = dict(args.ladders)  # type: ignore[arg-type]
    for name in ladders:
        _check_constant(name, "ladders", base.roles)
    for role in args.roles if args.roles != ["none"] else ():
        _check_constant(f"{role}.lr", "roles", base.roles)
    names, factors = tuple(_coordinates(args.roles, base.roles)), tuple(f for f in args.factors if f != 1)
    seeds = tuple(args.seeds)
    if args.mode == "coordinate":
        return Coordinate(base.start, names, factors, error_rate=args.error_rate, seeds=seeds)
    if args.mode == "stages":
        budget = checked_budget(args.runs(share), names, seeds)
        return Staged(staged(start_of(args, base), names, seeds, budget), budget)
    if args.mode in SAMPLERS:
        return _sampled(args, base, names, share)
    return _grid(ladders_of(args, base), base.start, seeds)


def checked_budget(budget: float, names: Sequence[str], seeds: Sequence[int]) -> float:
    """Refuses what is too little for the stages."""
    least = least_budget(names, seeds)
    if budget < least:
        raise InputError(
            f"a budget of {budget:.3g} runs is too small for the stages: {least} at least with {len(seeds)} seeds "
            "(or fewer --seeds)"
        )
    return budget


def start_of(args: TuneArguments, base: Base) -> Point:
    """Where the stages begin: the numbers that were given, or the paper's constants over them.

    Where no init std was given it is the paper's own, 2^-6 at width 512, carried to this width by fan-in: transformers'
    0.02 is meant for widths of a thousand, and far too small for a small base.
    """
    std = 2.0**-6 * math.sqrt(512 / base.shape.width)
    paper = {
        name: value
        for name, value in STARTS[args.start].items()
        if "." not in name or name in _coordinates([], base.roles)
    }
    return canonical({"init_std": std, **base.start, **paper})


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
    if chosen == ["none"]:
        return []
    return [
        f"{role}.{kind}"
        for role, random in roles.items()
        if role in (chosen or roles)
        for kind in ("init", "lr")
        if random or kind == "lr"
    ]


def ladders_of(args: TuneArguments, base: Base) -> dict[str, list[float]]:
    """Name → what is to be tried, for a grid."""
    middle = round(math.log2(base.start["learning_rate"]))
    log2_lrs = args.log2_lrs or [middle + octave for octave in range(-3, 4)]
    given: dict[str, list[float]] = dict(args.ladders)  # type: ignore[arg-type]
    stds = {"init_std": args.init_stds} if args.init_stds else {}
    return {"learning_rate": [2.0**x for x in log2_lrs], **given, **stds}


def _grid(ladders: Mapping[str, list[float]], start: Point, seeds: tuple[int, ...]) -> Grid:
    """Every combination of the ladders, once."""
    points = [canonical({**start, **dict(zip(ladders, values))}) for values in itertools.product(*ladders.values())]
    return Grid(tuple({key_of(point): point for point in points}.values()), seeds)


def _sampled(args: TuneArguments, base: Base, names: Sequence[str], share: float | None) -> Staged:
    """A sampler between the ends of the ladders (one of a single rung is fixed); of everything where none is given."""
    seeds, start = tuple(args.seeds), start_of(args, base)
    if args.log2_lrs or args.init_stds or args.ladders:
        ladders = ladders_of(args, base)
        ranges = {name: (min(ladder), max(ladder)) for name, ladder in ladders.items() if len(ladder) > 1}
        start = canonical({**base.start, **{name: ladder[0] for name, ladder in ladders.items() if len(ladder) == 1}})
    else:
        wide = {"learning_rate": RATES, "init_std": STDS, **dict.fromkeys(names, CONSTANTS)}
        ranges = {name: (start.get(name, 1.0) * low, start.get(name, 1.0) * high) for name, (low, high) in wide.items()}
    if not ranges:
        raise InputError(f"mode {args.mode} has nothing to search: give at least two --log2_lrs, or another range")
    finals = 2 * len(seeds) + ladder_cost(seeds)
    if args.trials is None:
        budget = args.runs(share)
        if budget < finals + 4:
            raise InputError(f"a budget of {budget:.3g} runs is too small for mode {args.mode}: {finals + 4} at least")
    count = args.trials or int(budget - finals)
    fixed = {name: value for name, value in start.items() if name not in ranges}
    return Staged(sampled(count, seeds), count + finals, args.mode, ranges, fixed)


# -- running it -------------------------------------------------------------------------------------------------------
def search(
    args: TuneArguments,
    base: Base,
    strategy: Strategy,
    evaluate: Evaluate,
    workers: int,
    output: Path,
    console: Console,
) -> list[FrozenTrial]:
    """All trials of the study, with a progress bar.

    Raises:
        SearchError: also where the study's file is removed meanwhile.
    """
    storage = args.storage or f"sqlite:///{(output / 'study.db').resolve()}"
    settings = base.settings
    if isinstance(strategy, Staged):
        space: dict[str, Any] = {"ranges": strategy.ranges, "fixed": strategy.fixed}
        if not strategy.sampler:
            space = {"start": start_of(args, base), "constants": _coordinates(args.roles, base.roles)}
        settings = {**settings, "search": json.loads(json.dumps(space))}
    study, file = open_study(storage, args.study, settings), local_file(storage)
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers start
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console) as progress, storage_errors(storage, running=True):
        task, live = progress.add_task("", left=""), Live(time.monotonic())

        def check() -> None:
            if file and not file.exists():
                raise SearchError(f"{file} is gone")  # said in full by storage_errors

        def on_change(trials: list[FrozenTrial], expected: float) -> None:
            progress.update(task, **live.look(trials, expected))

        return Search(
            study,
            strategy,
            evaluate,
            workers=workers,
            limit=None if args.command else args.limit,  # a command is ended by its runner, which keeps what it said
            heartbeat=args.heartbeat,
            grace=args.grace,
            on_change=on_change,
            check=check,
        ).run()


@dataclass
class Live:
    """What the progress bar shows: runs done of those expected, the best so far, the time left at this pace."""

    since: float
    spent_before: float | None = None  # by earlier sessions and others

    def look(self, trials: list[FrozenTrial], expected: float) -> dict[str, Any]:
        spent, results = spent_by(trials), results_of(trials)
        if self.spent_before is None:
            self.spent_before = spent
        losses = [mean for key in results if math.isfinite(mean := mean_loss(results, key))]
        best = f", best {min(losses):.4f}" if losses else ""
        running = sum(status_of(trial) == "running" for trial in trials)
        pace = (spent - self.spent_before) / max(1e-9, time.monotonic() - self.since)
        left = max(0.0, expected - spent) / pace if pace > 0 else None
        return {
            "completed": spent,
            "total": max(expected, spent),
            "description": f"{spent:.0f}/{expected:.0f} runs{best}, {running} under way",
            "left": f"{int(left // 60)}:{int(left % 60):02d} left" if left is not None else "",
        }
