"""Do the numbers found at the base hold at the target?

    moe-param transfer runs/base/tuned.yaml --axes width=4 depth=4 --output_dir runs/transfer

Trains a ladder of learning rates around the config's own at the base and at each target, on the same text and the same
number of tokens, under several parameterizations. Reports per axis how far the best learning rate moved (octaves) and
what keeping the base's costs (regret). Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PretrainedConfig

import moe_param
from moe_param import Parameterization
from moe_param.errors import InputError
from moe_param.folder_lock import folder_lock
from moe_param.naming import parse_sizes
from moe_param.structure.shape import AXES, measure
from moe_param.structure.trace import model_class_for, trace_model
from moe_param.training.arguments import build_configs, parse
from moe_param.training.report import active_parameters, finite, hardware, versions
from moe_param.tuning.drift import Ladder, Run, plot, summarize, table
from moe_param.tuning.ledger import cores, run_all
from moe_param.tuning.page import write
from moe_param.tuning.reports import transfer_page
from moe_param.tuning.short_run import ShortRun, check_run, short_run, times_seen, train
from moe_param.tuning.workers import Watch

CONFIG = "tuned.yaml of `moe-param tune`, or any YAML file of `moe-param train`: model, text, horizon, learning rate."


@dataclass
class TransferArguments:
    """What `moe-param transfer` can be told. Model, text and horizon are the file's."""

    config: str = field(metadata={"help": CONFIG})
    output_dir: str = field(default="transfer", metadata={"help": "Where transfer.json and transfer.png go."})
    axes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Targets, as factors of the base: width (expert_size goes with it), depth, num_experts (top_k goes "
            "with it), expert_size; several with commas, e.g. width=2,depth=2. Default: each there is, times 4."
        },
    )
    specs: list[str] = field(
        default_factory=lambda: ["moe-completep", "standard"], metadata={"help": "Parameterizations to compare."}
    )
    octaves: list[float] = field(
        default_factory=lambda: [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0],
        metadata={"help": "The ladder: learning rates in octaves from the config's own."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the weights and the batches."})
    workers: int = field(default=0, metadata={"help": "Runs at a time, one thread each. 0: one per core."})
    smallest: bool = field(default=False, metadata={"help": "A few steps, one seed; proves nothing."})

    def __post_init__(self) -> None:
        if self.smallest:
            self.octaves, self.seeds = [-1.0, 0.0, 1.0], [0]
        self.octaves, self.seeds = sorted(set(self.octaves)), sorted(set(self.seeds))
        if not all(-100 < octave < 100 for octave in self.octaves):
            raise InputError(f"octaves are {self.octaves}: expected numbers like -1 or 0.5, between -100 and 100")
        if len(self.octaves) < 3 or 0.0 not in self.octaves:
            raise InputError(
                f"octaves are {self.octaves}: a ladder needs three rungs, 0 (the config's rate) among them"
            )
        for name in ("specs", "seeds"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty: give at least one, or leave it out")
        if self.workers < 0:
            raise InputError(f"workers is {self.workers}: expected at least 1, or 0 for one per core")
        self.axes, self.specs = list(dict.fromkeys(self.axes)), list(dict.fromkeys(self.specs))
        self.workers = self.workers or cores()


@dataclass(frozen=True)
class Plan:
    """Everything that is to be run, checked before the first run."""

    ladder: Ladder
    runs: dict[Run, ShortRun]
    costs: dict[str, int]  # active parameters of the base and every target
    shared: set[str]  # specs that are the first one at the base, which is run once
    learning_rate: float

    @property
    def tokens(self) -> int:
        """Of one run."""
        run = next(iter(self.runs.values()))
        return run.steps * run.batch_size * run.seq_len


def targets(base: PretrainedConfig, axes: Sequence[str]) -> dict[str, PretrainedConfig]:
    """The base and every target, by name; without `axes`, every axis that the base has, times 4."""
    model_class = model_class_for(base)
    shape = measure(*trace_model(model_class, base))
    found = {"base": base}
    for text in axes or [f"{axis}=4" for axis in shape.axes]:
        grown = shape
        for axis, factor in parse_sizes(text, AXES, float, option="--axes").items():
            grown = grown.along(axis, factor)
        found[text] = moe_param.scale_config(base, **grown.sizes, model_class=model_class)
    return found


def plan_runs(args: TransferArguments) -> Plan:
    """Reads the file, builds every target's plan under every spec.

    Raises:
        MoeParamError: whatever is wrong with the file, the axes or the specs.
    """
    small = ["--max_steps", "3", "--per_device_train_batch_size", "2"] if args.smallest else []
    model, data, training = parse(["--config", args.config, "--output_dir", args.output_dir, *small])
    base, _ = build_configs(model)
    template = short_run(model, data, training, base)
    if args.smallest:
        template = replace(template, validation_blocks=8)
    configs = targets(base, args.axes)
    plans = {
        (spec, name): moe_param.plan(
            model_class_for(base),
            config,
            base,
            spec=spec,
            init_std=template.init_std,
            constants=template.constants,
        )
        for spec, (name, config) in itertools.product(args.specs, configs.items())
    }
    first = args.specs[0]
    shared = {spec for spec in args.specs[1:] if numbers(plans[spec, "base"]) == numbers(plans[first, "base"])}
    runs = {
        Run(spec, target, octave, seed): replace(
            template, config=configs[target].to_dict(), spec=spec, lr=template.lr * 2.0**octave, seed=seed
        )
        for spec, target, octave, seed in itertools.product(args.specs, configs, args.octaves, args.seeds)
        if not (target == "base" and spec in shared)
    }
    costs = {name: active_parameters(plans[first, name])[1] for name in configs}
    axes = tuple(name for name in configs if name != "base")
    ladder = Ladder(tuple(args.specs), axes, tuple(args.octaves), tuple(args.seeds))
    return Plan(ladder, runs, costs, shared, template.lr)


def numbers(plan: Parameterization) -> dict[str, tuple[Any, ...]]:
    """All that the training of a model takes from its rules."""
    return {name: (rule.init, rule.lr, rule.eps, rule.weight_decay) for name, rule in plan.rules.items()}


def work(run: ShortRun, watch: Watch) -> dict[str, Any]:
    """What a worker does: one run, in one thread."""
    torch.set_num_threads(1)
    found: dict[str, Any] = finite(asdict(train(run)))
    return found


def at_base(losses: dict[Run, float], first: str, shared: set[str]) -> dict[Run, float]:
    """Of the specs that are one and the same training at the base: it was run once, under the first."""
    return {
        replace(run, spec=spec): loss
        for run, loss in losses.items()
        if run.target == "base" and run.spec == first
        for spec in shared
    }


def _loss(result: dict[str, Any]) -> float:
    return math.inf if result["validation_loss"] is None else result["validation_loss"]


def transfer(args: TransferArguments, *, command: str) -> dict[str, Any]:
    """Runs the ladders and writes transfer.json and transfer.png to the output folder; returns the former.

    Args:
        command: what was typed, for the record.

    Raises:
        MoeParamError: before the first run, whatever is wrong with the arguments or the text; an output folder in use
            or of other settings; a run that cannot be done.
    """
    console, start = Console(), time.perf_counter()
    plan, output = plan_runs(args), Path(args.output_dir)
    check_run(first := next(iter(plan.runs.values())))
    if seen := times_seen(first):
        console.print(seen)
    with folder_lock(output, "moe-param transfer"):
        done = run_all(
            work,
            {run.key: job for run, job in plan.runs.items()},
            output / "runs.jsonl",
            settings={run.key: asdict(job) for run, job in plan.runs.items()},
            costs={run.key: plan.costs[run.target] for run in plan.runs},
            workers=args.workers,
            console=console,
        )
        losses = {run: _loss(done[run.key]) for run in plan.runs}
        rows = summarize(plan.ladder, losses | at_base(losses, args.specs[0], plan.shared))
        record = {
            **record_of(args, plan, done, command),
            "summary": rows,
            "seconds": round(time.perf_counter() - start, 1),
        }
        (output / "transfer.json").write_text(json.dumps(finite(record), indent=1) + "\n", "utf-8")
        plot(plan.ladder, rows, plan.learning_rate, output / "transfer.png")
        write(output / "transfer.html", transfer_page(record))
    console.print(table(rows))
    console.print(f"numbers in {output / 'transfer.json'}, report in {output / 'transfer.html'}")
    return record


def record_of(
    args: TransferArguments, plan: Plan, done: Mapping[str, Mapping[str, Any]], command: str
) -> dict[str, Any]:
    """What was asked for, what every run gave, and where it ran."""
    return {
        "command": command,
        "settings": {**asdict(args), "axes": list(plan.ladder.targets)},
        "learning_rate": plan.learning_rate,
        "tokens": plan.tokens,
        "active_parameters": plan.costs,
        "base_runs_shared": sorted(plan.shared),
        "runs": {name: result["validation_loss"] for name, result in sorted(done.items())},
        "training_seconds": round(sum(result["seconds"] for result in done.values())),
        "hardware": hardware(),
        "versions": versions(),
    }
