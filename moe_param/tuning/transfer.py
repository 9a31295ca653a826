"""Do the numbers found at the base hold at the target, and what did the other ways to numbers cost?

    moe-param transfer runs/base/tuned.yaml --axes width=4 depth=4 --output_dir runs/transfer

Trains a ladder of learning rates around the config's own at the base and at each target, on the same text and the same
number of tokens, under several parameterizations. Reports per axis how far the best learning rate moved (octaves) and
what keeping the base's costs (regret), each with its interval. At one target a rival is searched over learning rate ×
init std, so that what both ways cost can be compared. Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moe_param.folder_lock import folder_lock
from moe_param.training.report import finite, hardware, versions
from moe_param.tuned import Tuned, import_modules
from moe_param.tuning.costs import Costs
from moe_param.tuning.drift import Curves, Row, Run, compare
from moe_param.tuning.ledger import run_all
from moe_param.tuning.rivals import Search, Trial, conclude, longer
from moe_param.tuning.runners import own_device
from moe_param.tuning.short_run import ShortRun, times_seen, train
from moe_param.tuning.transfer_plan import CONFIG as CONFIG
from moe_param.tuning.transfer_plan import Plan, TransferArguments, identity, plan_runs
from moe_param.tuning.transfer_plan import targets as targets
from moe_param.tuning.transfer_report import TransferReport
from moe_param.tuning.workers import Watch


@dataclass(frozen=True)
class Train:
    """What a worker does: one run, in one thread, on its own of the devices, to its end."""

    devices: tuple[str, ...] = ("cpu",)
    imports: tuple[str, ...] = ()

    def __call__(self, run: ShortRun, watch: Watch) -> dict[str, Any]:
        torch.set_num_threads(1)
        import_modules(self.imports)
        found: dict[str, Any] = finite(asdict(train(replace(run, device=own_device(self.devices)))))
        return found


@dataclass(frozen=True)
class Extent:
    """What is run: the rungs of every ladder, by (spec, target), and the searches."""

    ladders: Mapping[tuple[str, str], tuple[float, ...]]
    searches: tuple[Search, ...]


@dataclass(frozen=True)
class Losses:
    """Held-out losses, inf where a run diverged."""

    rungs: Mapping[Run, float]
    trials: Mapping[Search, Mapping[Trial, float]]

    def curves(self, plan: Plan, spec: str, target: str) -> Curves:
        return Curves.of(self.rungs, plan.home(spec, target), target)


def transfer(
    tuned: str | Path | Tuned,
    axes: Sequence[str] = (),
    *,
    specs: Sequence[str] = (),
    output_dir: str | Path = "transfer",
    training: Mapping[str, Any] | None = None,
    command: str = "",
    console: Console | None = None,
    **options: Any,
) -> TransferReport:
    """Trains ladders at the base and its targets and searches a rival; writes the report to the output folder.

    Args:
        tuned: the file of `moe-param tune`, or what `read_tuned` reads from one: then `training` says text and horizon.
        axes: targets, as factors of the base: `["width=4", "width=2,depth=2"]`. Default: every axis, times 4.
        specs: parameterizations to compare. Default: the file's, and `standard`.
        output_dir: where runs.jsonl (every run that is done: the same call goes on there), transfer.json and the
            pictures go.
        training: arguments of `moe-param train` over the file's, by name: seq_len, max_steps, train_files, …
        command: what was typed, for the record.
        console: where the progress is shown. Default: nowhere.
        options: the others of `TransferArguments`, by name: octaves, seeds, search, base_runs, …

    Raises:
        MoeParamError: before the first run, whatever is wrong with the arguments or the text; an output folder in use
            or of other settings; a run that cannot be done.
    """
    read = tuned if isinstance(tuned, Tuned) else None
    args = TransferArguments(
        config="" if read else str(tuned), output_dir=str(output_dir), axes=list(axes), specs=list(specs), **options
    )
    return run_transfer(args, plan_runs(args, read, training), command, console or Console(quiet=True))


def run_transfer(args: TransferArguments, plan: Plan, command: str, console: Console) -> TransferReport:
    """All runs of a plan, and what they say."""
    start, output = time.perf_counter(), Path(args.output_dir)
    plan = replace(plan, template=args.runner.checked(plan.template))
    if seen := times_seen(plan.template):
        console.print(seen)
    with folder_lock(output, "moe-param transfer"):
        losses, done = gather(args, plan, console)
        facts = facts_of(args, plan, done, command) | {"seconds": round(time.perf_counter() - start, 1)}
        report = TransferReport(
            tuple(rows_of(args, plan, losses)),
            tuple(costs_of(plan, losses)),
            args.bounds,
            plan.template.lr,
            facts,
        )
        report.write(output)
    return report


def gather(args: TransferArguments, plan: Plan, console: Console) -> tuple[Losses, dict[str, dict[str, Any]]]:
    """Runs what was asked for, then longer ladders and grids while a best point is at an end of one."""
    extent = Extent({ladder: tuple(args.octaves) for ladder in plan.ladders}, plan.searches)
    while True:
        rungs, trials, jobs = jobs_of(plan, extent, args.seeds)
        done = run_all(
            Train(plan.devices, plan.imports),
            jobs,
            Path(args.output_dir) / "runs.jsonl",
            settings={key: asdict(job) for key, job in jobs.items()},
            costs={key: cost_of(plan, key) for key in jobs},
            workers=args.workers,
            console=console,
        )
        losses = Losses(
            {run: loss_of(done[key]) for run, key in rungs.items()},
            {search: {trial: loss_of(done[key]) for trial, key in keys.items()} for search, keys in trials.items()},
        )
        grown = longer_where_needed(args, plan, extent, losses)
        if grown == extent:
            return losses, done
        extent = grown


def jobs_of(
    plan: Plan, extent: Extent, seeds: Iterable[int]
) -> tuple[dict[Run, str], dict[Search, dict[Trial, str]], dict[str, ShortRun]]:
    """(key of every rung, key of every trial, what to train by key): what is the same training has one key."""
    names: dict[str, str] = {}
    jobs: dict[str, ShortRun] = {}

    def add(key: str, run: ShortRun) -> str:
        name = names.setdefault(identity(run), key)
        jobs.setdefault(name, run)
        return name

    rungs = {
        run: add(run.key, plan.rung(run))
        for (spec, target), octaves in extent.ladders.items()
        for octave in octaves
        for seed in seeds
        for run in [Run(spec, target, octave, seed)]
    }
    trials = {
        search: {trial: add(search.key(trial), plan.trial(search, trial)) for trial in search.trials}
        for search in extent.searches
    }
    return rungs, trials, jobs


def cost_of(plan: Plan, key: str) -> float:
    """Of a run, so that the expensive ones come first."""
    parts = key.split("/")
    return plan.flops[parts[2] if parts[0] == "search" else parts[-3]]


def loss_of(result: Mapping[str, Any]) -> float:
    return math.inf if result["validation_loss"] is None else float(result["validation_loss"])


def longer_where_needed(args: TransferArguments, plan: Plan, extent: Extent, losses: Losses) -> Extent:
    """One rung more at every end that a best point is at; and at a target, the best rung of its base."""
    ladders = {}
    for (spec, target), octaves in extent.ladders.items():
        curves, base = losses.curves(plan, spec, target), losses.curves(plan, spec, "base")
        rungs = longer(octaves, octaves[curves.best], args.octaves, args.extend if curves.edge else 0)
        start = base.octaves[base.best]
        low, high = min(*rungs, start), max(*rungs, start)
        ladders[spec, target] = tuple(sorted({*rungs, *(x for x in base.octaves if low <= x <= high)}))
    searches = tuple(
        search.grown(losses.trials[search], args.octaves, first.init_stds, args.extend)
        for search, first in zip(extent.searches, plan.searches)
    )
    return Extent(ladders, searches)


def rows_of(args: TransferArguments, plan: Plan, losses: Losses) -> Iterable[Row]:
    """Every target under every spec, beside its base."""
    for spec in plan.specs:
        base = losses.curves(plan, spec, "base")
        for target in plan.targets:
            yield compare(spec, target, base, losses.curves(plan, spec, target), args.bounds)


def costs_of(plan: Plan, losses: Losses) -> Iterable[Costs]:
    """Every target that was searched."""
    for target in dict.fromkeys(search.target for search in losses.trials):
        found = tuple(conclude(search, own) for search, own in losses.trials.items() if search.target == target)
        kept = {seed: losses.rungs[Run(plan.first, target, 0.0, seed)] for seed in found[0].search.seeds}
        yield Costs(target, plan.first, plan.flops["base"], plan.flops[target], plan.base_runs, kept, found)


def facts_of(
    args: TransferArguments, plan: Plan, done: Mapping[str, Mapping[str, Any]], command: str
) -> dict[str, Any]:
    """What was asked for, what every run gave, and where it ran."""
    return {
        "command": command,
        "settings": {**asdict(args), "axes": list(plan.targets), "specs": list(plan.specs)},
        "tokens": plan.tokens,
        "active_parameters": dict(plan.active),
        "base_runs_shared": sorted(plan.shared),
        "runs": {name: result["validation_loss"] for name, result in sorted(done.items())},
        "training_seconds": round(sum(result["seconds"] for result in done.values())),
        "hardware": hardware(),
        "versions": versions(),
    }
