"""Finds the hyperparameters of a base model: learning rate, init std and constants per role.

    python -m moe_param.tuning.sweep --config recipes/configs/tiny.yaml --mode grid --output_dir runs/sweep
    python -m moe_param.tuning.sweep --config runs/sweep/best.yaml --mode coordinate --output_dir runs/constants

Model, text and horizon are those of training, whose arguments all go here too. The trials are short runs in
a plain loop, spread over worker processes and, through `--storage`, over machines; see `docs/tune.md`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import shlex
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoConfig, HfArgumentParser, PretrainedConfig

import moe_param
from moe_param.errors import InputError
from moe_param.structure.trace import model_class_for
from moe_param.training.arguments import ModelArguments, PretrainArguments, build_configs, mapping, parse
from moe_param.training.data.text import DataArguments
from moe_param.training.pretrain import USER_ERRORS
from moe_param.training.report import finite, hardware, versions
from moe_param.tuned import read_yaml
from moe_param.tuning.constants import Point, canonical, key_of
from moe_param.tuning.ledger import cores
from moe_param.tuning.results import conclude, plot, split, tables, trial_records, write_best
from moe_param.tuning.search import (
    Coordinate,
    Grid,
    Search,
    SearchError,
    Strategy,
    Tpe,
    open_study,
    shown,
    status_of,
    storage_errors,
)
from moe_param.tuning.short_run import ShortRun, short_run, train
from moe_param.tuning.workers import Evaluate

MODES = ("grid", "tpe", "coordinate")
# Of pretrain's arguments, those that a trial's loss depends on and best.yaml therefore repeats.
TRAINING = (
    *("tokens", "max_steps", "batch_tokens", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("warmup_tokens", "warmup_steps", "decay_tokens", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("weight_decay", "decay", "base_steps", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
OURS = ("learning_rate", "output_dir", "resume", *(f.name for f in fields(ModelArguments)), *TRAINING)


@dataclass
class SweepArguments:
    """The search. Everything else is pretrain's: --config, --overrides, --max_steps, --seq_len, …"""

    mode: str = field(default="grid", metadata={"help": "grid, tpe, or coordinate: one pass over role constants."})
    output_dir: str = field(default="sweep", metadata={"help": "Where best.yaml, sweep.json, sweep.png go."})
    storage: str | None = field(
        default=None,
        metadata={
            "help": "Optuna storage: sqlite:///FILE, postgresql://USER:PASSWORD@HOST/NAME for many machines, "
            "journal:FILE on a shared file system. Default: study.db in output_dir."
        },
    )
    study: str = field(default="sweep", metadata={"help": "Name of the study in the storage."})
    workers: int = field(
        default_factory=lambda: min(8, cores()),
        metadata={"help": "Runs at a time on this machine, one thread each."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Every point is trained with each; losses are averaged."}
    )
    log2_lrs: list[float] = field(
        default_factory=list,
        metadata={"help": "Learning rates, as powers of 2 (tpe: the range). Default: 2^±3 around the config's."},
    )
    init_stds: list[float] = field(
        default_factory=list, metadata={"help": "Init stds (tpe: the range). Default: the config's own."}
    )
    ladders: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Constants to try, JSON: {"router": {"lr": [0.25, 1, 4]}} (tpe: the range).'},
    )
    trials: int = field(default=30, metadata={"help": "tpe: how many points."})
    roles: list[str] = field(
        default_factory=list, metadata={"help": "coordinate: whose constants. Default: all of the model's roles."}
    )
    factors: list[float] = field(
        default_factory=lambda: [0.25, 4.0], metadata={"help": "coordinate: the steps of a constant that are tried."}
    )
    error_rate: float = field(
        default=0.05, metadata={"help": "coordinate: how often a pass may take noise for a gain."}
    )
    heartbeat: float = field(default=5.0, metadata={"help": "Seconds between two signs of life of this process."})
    grace: float = field(
        default=60.0, metadata={"help": "Seconds without one after which its trials are run by someone else."}
    )

    def __post_init__(self) -> None:
        ladders = mapping("ladders", self.ladders)
        self.ladders = {
            f"{role}.{kind}": values
            for role, kinds in ladders.items()
            for kind, values in (kinds.items() if isinstance(kinds, dict) else [("", kinds)])
        }
        if self.mode not in MODES:
            raise InputError(f"mode is {self.mode!r}: expected one of {', '.join(MODES)}")
        lists: dict[str, Any] = {"seeds": self.seeds, "factors": self.factors, **self.ladders}
        for name, values in lists.items():
            if not isinstance(values, list) or not values:
                raise InputError(f"{name} is {values!r}: an empty ladder; expected a list with at least one value")
        positive = {"factors": self.factors, "init_stds": self.init_stds, **self.ladders}
        for name, values in positive.items():
            for value in values:
                if not isinstance(value, int | float) or not 0 < value < math.inf:
                    raise InputError(f"{name}: {value!r} is not a positive number")
        for name, least in (("workers", 1), ("trials", 1), ("heartbeat", 0.01), ("grace", 2 * self.heartbeat)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: expected at least {least:g}")
        if not 0 < self.error_rate < 1:
            raise InputError(f"error_rate is {self.error_rate}: expected a number between 0 and 1")
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds {self.seeds}: the same seed twice is the same run twice")
        if self.mode == "coordinate" and len(self.seeds) < 2:
            raise InputError("mode coordinate compares over seeds: give at least two (--seeds 0 1 2)")
        unused = {
            "grid": ("roles", "trials", "factors", "error_rate"),
            "tpe": ("roles", "factors", "error_rate"),
            "coordinate": ("log2_lrs", "init_stds", "ladders", "trials"),
        }[self.mode]
        for given in fields(self):
            default = given.default_factory() if callable(given.default_factory) else given.default
            if given.name in unused and getattr(self, given.name) not in (default, {}):
                raise InputError(f"{given.name} is not for mode {self.mode}: leave it out")


@dataclass(frozen=True)
class Training:
    """What a worker does with a point and a seed."""

    run: ShortRun

    def __call__(self, point: Point, seed: int) -> float:
        torch.set_num_threads(1)  # the workers are the parallelism
        rate, std, constants = split(point)
        return train(replace(self.run, lr=rate, init_std=std, constants=constants, seed=seed)).validation_loss


def parse_all(
    argv: Sequence[str],
) -> tuple[SweepArguments, str | None, ModelArguments, DataArguments, PretrainArguments]:
    """Our arguments, the config's name, and pretrain's arguments: all that ours leave."""
    parser = HfArgumentParser(
        SweepArguments,  # type: ignore[arg-type]
        prog="moe-param tune",
        allow_abbrev=False,
        epilog="All arguments of training too: see moe-param train --help",
    )
    args, rest = parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False, return_remaining_strings=True)
    first = ArgumentParser(add_help=False)
    first.add_argument("--config")
    return args, first.parse_known_args(rest)[0].config, *parse(rest)


@dataclass(frozen=True)
class Base:
    """The model that is searched, and how its trials train."""

    config: PretrainedConfig
    shape: moe_param.Shape
    roles: dict[str, bool]  # every trained role → whether its init is random
    start: Point
    run: ShortRun
    settings: dict[str, Any]  # what a trial's loss depends on: a study holds trials of one kind only
    yaml: dict[str, Any]  # best.yaml, with None for the numbers that are searched


def read_base(
    args: SweepArguments, model: ModelArguments, data: DataArguments, training: PretrainArguments, config: str | None
) -> Base:
    """Everything that can be wrong with the model and the training is found here, before a worker starts."""
    base, _ = build_configs(model)
    given = {name: getattr(training, name) for name in TRAINING}
    given["lr_scheduler_type"] = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    if training.warmup_tokens is not None:
        given["warmup_steps"] = None
    run = replace(short_run(model, data, training, base), init_std=None, constants=None)
    if given["tokens"] is None:
        given["max_steps"] = run.steps

    start = {"learning_rate": training.learning_rate}
    start |= {"init_std": model.init_std} if model.init_std is not None else {}
    constants: Any = model.constants
    plan = moe_param.plan(
        model_class_for(base), base, base, spec=model.spec, init_std=model.init_std, constants=constants or None
    )
    start |= {f"{role}.{kind}": value for role, kinds in constants.items() for kind, value in kinds.items()}
    roles: dict[str, bool] = {}
    for rule in plan.rules.values():
        if rule.lr > 0:
            roles[rule.role] = roles.get(rule.role, False) or rule.constant is None
    trained = {
        name: value
        for name, value in asdict(run).items()
        if name not in ("config", "base", "spec", "lr", "seed", "init_std", "constants", "data")
    }
    corpus = run.data or {"dataset": f"stdlib of Python {'.'.join(platform.python_version_tuple()[:2])}"}
    config_values = {name: value for name, value in base.to_dict().items() if name != "transformers_version"}
    settings = {
        "mode": args.mode,
        "seeds": list(args.seeds),
        "training": trained,
        "data": corpus,
        "model": config_values,
        "spec": plan.spec.to_dict(),
    }
    text = {f.name for f in fields(DataArguments)}
    carried = read_yaml(config) if config else {}
    document = {
        "model_type": base.model_type,
        "overrides": overrides_of(base),
        "tuned_at": {axis: size for axis, size in asdict(plan.base_shape).items() if axis != "head_dim"},
        "spec": model.spec,
        **dict.fromkeys(("learning_rate", "init_std", "constants")),
        **{name: value for name, value in given.items() if value not in (None, -1, {})},
        **{f.name: getattr(data, f.name) for f in fields(DataArguments) if getattr(data, f.name) != f.default},
        **{name: value for name, value in carried.items() if name not in (*OURS, *text)},
    }
    settings = json.loads(json.dumps(settings))  # as the storage gives it back
    return Base(base, plan.base_shape, roles, canonical(start), run, settings, document)


def overrides_of(config: PretrainedConfig) -> dict[str, Any]:
    """What makes `config` out of its model type's defaults; checked by making it."""
    skipped = ("model_type", "transformers_version", "architectures", "moe_param", "_name_or_path", "dtype")
    default = type(config)().to_dict()
    values = {
        name: value
        for name, value in config.to_dict().items()
        if name not in skipped and (name not in default or default[name] != value)
    }
    made = AutoConfig.for_model(config.model_type, **values).to_dict()
    wrong = [k for k, v in config.to_dict().items() if k not in skipped and made.get(k) != v]
    if wrong:
        raise InputError(
            f"a {config.model_type} config is not its defaults and overrides: {', '.join(wrong)} would differ"
        )
    return values


def strategy_of(args: SweepArguments, base: Base) -> Strategy:
    """The search that the arguments describe."""
    for name in [*args.ladders, *(f"{role}.lr" for role in args.roles)]:  # type: ignore[misc]
        role, _, kind = name.partition(".")
        if role not in base.roles:
            raise InputError(
                f"{'ladders' if name in args.ladders else 'roles'}: no role {role!r} in this model, which has "  # type: ignore[operator]
                f"{', '.join(base.roles)}"
            )
        if kind not in ("init", "lr"):
            raise InputError(f"ladders: {role} has {kind!r}, expected 'init' or 'lr'")
        if kind == "init" and not base.roles[role]:
            raise InputError(f"ladders: the initialization of {role} is not random, so it has no constant")
    if args.mode == "coordinate":
        coordinates = [
            f"{role}.{kind}"
            for role, random in base.roles.items()
            if role in (args.roles or base.roles)
            for kind in ("init", "lr")
            if random or kind == "lr"
        ]
        return Coordinate(
            base.start, tuple(coordinates), tuple(f for f in args.factors if f != 1), error_rate=args.error_rate
        )
    middle = round(math.log2(base.start["learning_rate"]))
    log2_lrs = args.log2_lrs or [middle + octave for octave in range(-3, 4)]
    ladders = {"learning_rate": [2.0**x for x in log2_lrs], **dict(args.ladders)}  # type: ignore[arg-type]
    if args.init_stds:
        ladders["init_std"] = args.init_stds
    if args.mode == "tpe":
        fixed = canonical({**base.start, **{name: ladder[0] for name, ladder in ladders.items() if len(ladder) == 1}})
        ranges = {name: (min(ladder), max(ladder)) for name, ladder in ladders.items() if len(ladder) > 1}
        if not ranges:
            raise InputError("mode tpe has nothing to search: give at least two --log2_lrs, or a range of another kind")
        return Tpe(ranges, {k: v for k, v in fixed.items() if k not in ranges}, args.trials)
    points = [
        canonical({**base.start, **dict(zip(ladders, values))})
        for values in itertools.product(*(ladders[name] for name in ladders))
    ]
    return Grid(tuple({key_of(point): point for point in points}.values()))


def search(
    args: SweepArguments, base: Base, strategy: Strategy, evaluate: Evaluate, console: Console
) -> list[FrozenTrial]:
    """All trials of the study, with a progress bar."""
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    storage = storage_of(args)
    settings = base.settings
    if isinstance(strategy, Tpe):
        settings = {**settings, "search": json.loads(json.dumps({"ranges": strategy.ranges, "fixed": strategy.fixed}))}
    study = open_study(storage, args.study, settings)
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers start
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, storage_errors(storage):
        task = progress.add_task("")

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
        ).run()


def storage_of(args: SweepArguments) -> str:
    return args.storage or f"sqlite:///{(Path(args.output_dir) / 'study.db').resolve()}"


def command_of(argv: Sequence[str], args: SweepArguments) -> str:
    """As typed, but for a password."""
    hidden = [arg.replace(args.storage, shown(args.storage)) if args.storage else arg for arg in argv]
    return shlex.join(["python", "-m", "moe_param.tuning.sweep", *hidden])


def main(argv: Sequence[str] | None = None, evaluate: Evaluate | None = None) -> dict[str, Any]:
    argv = list(sys.argv[1:] if argv is None else argv)
    args, config, model, data, training = parse_all(argv)
    base = read_base(args, model, data, training, config)
    strategy = strategy_of(args, base)
    console = Console()
    run = base.run
    tokens = run.steps * run.batch_size * run.seq_len
    console.print(f"base: {base.shape}\na run: {run.steps} steps, {tokens:,} tokens, {run.schedule}", soft_wrap=True)
    start = time.perf_counter()
    trials = search(args, base, strategy, evaluate or Training(base.run), console)
    found = conclude(strategy, trials)

    output = Path(args.output_dir)
    command = command_of(argv, args)
    write_best(output / "best.yaml", base.yaml, found, command)
    statuses = [status_of(trial) for trial in trials]
    record = {
        "command": command,
        "settings": base.settings,
        "storage": shown(args.storage) if args.storage else "study.db",
        "study": args.study,
        "tuned_at": asdict(base.shape),
        "best": asdict(found),
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
        "trials": trial_records(trials),
        "seconds": round(time.perf_counter() - start, 1),  # of this session, where it was resumed
        "hardware": hardware(),
        "versions": {**versions(), "optuna": version("optuna")},
    }
    (output / "sweep.json").write_text(json.dumps(finite(record), indent=2) + "\n", "utf-8")
    plot(strategy, trials, found, output / "sweep.png")
    console.print(tables(found, trials))
    for name in found.at_edge:
        console.print(f"[yellow]the best {name} is at the end of its ladder: it may lie outside[/]", soft_wrap=True)
    lost = {status: n for status, n in record["statuses"].items() if status != "complete"}  # type: ignore[attr-defined]
    console.print(
        f"best: {key_of(found.best)}, loss {found.loss:.4f}; {statuses.count('complete')} trials complete"
        + "".join(f", {n} {status}" for status, n in lost.items())
        + f"\n{output / 'best.yaml'}, {output / 'sweep.json'}, {output / 'sweep.png'}",
        soft_wrap=True,
    )
    return record


if __name__ == "__main__":
    try:
        main()
    except (*USER_ERRORS, SearchError) as error:
        sys.exit(f"sweep: {error}")
    except KeyboardInterrupt:
        print("sweep: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
