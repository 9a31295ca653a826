"""Do the numbers found at the base hold at the target?

    python -m moe_param.tuning.transfer --config best.yaml --axes width=4 depth=4 --output_dir transfer

Trains a ladder of learning rates around the config's own at the base and at each target, on the same text and the same
number of tokens, under several parameterizations. Reports per axis how far the best learning rate moved (octaves) and
what keeping the base's costs (regret). Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import math
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, PretrainedConfig

import moe_param
from moe_param.errors import InputError
from moe_param.naming import parse_sizes
from moe_param.statistics import half_width, parabola_vertex
from moe_param.structure.shape import AXES, measure
from moe_param.structure.trace import model_class_for, trace_model
from moe_param.training import pretrain
from moe_param.training.report import active_parameters, finite, hardware, versions
from moe_param.tuning.ledger import cores, run_all
from moe_param.tuning.short_run import ShortRun, short_run, train

DRIFT, REGRET = 0.5, 0.01
"""What counts as transferred: the optimum within half an octave, at most 1% of the loss given up."""


@dataclass
class TransferArguments:
    config: str = field(
        metadata={
            "help": "best.yaml of moe_param.tuning.sweep, or any config of moe_param.training.pretrain: model, "
            "spec, learning rate."
        }
    )
    output_dir: str = field(default="transfer", metadata={"help": "Where transfer.json and transfer.png go."})
    axes: list[str] = field(
        default_factory=lambda: ["width=4", "depth=4", "num_experts=4", "expert_size=4"],
        metadata={
            "help": "Targets, as factors of the base: width (expert_size goes with it), depth, num_experts (top_k goes "
            "with it), expert_size; several with commas, e.g. width=2,depth=2."
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
        if len(self.octaves) < 3 or 0.0 not in self.octaves:
            raise InputError(
                f"octaves are {self.octaves}: a ladder needs three rungs, 0 (the config's rate) among them"
            )
        self.workers = self.workers or cores()


@dataclass(frozen=True)
class Run:
    """One rung of one ladder."""

    spec: str
    target: str  # "base", or as on the command line
    octave: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.spec}/{self.target}/{self.octave:g}/{self.seed}"


def targets(base: PretrainedConfig, axes: list[str]) -> dict[str, PretrainedConfig]:
    """The base and every target, by name."""
    shape = measure(*trace_model(model_class_for(base), base))
    found = {"base": base}
    for text in axes:
        grown = shape
        for axis, factor in parse_sizes(text, AXES, float, option="--axes").items():
            grown = grown.along(axis, factor)
        sizes = {axis: getattr(grown, axis) for axis in (*AXES, "top_k")}
        found[text] = moe_param.scale_config(base, **sizes)
    return found


def work(run: ShortRun) -> dict[str, Any]:
    """What a worker does: one run, in one thread."""
    torch.set_num_threads(1)
    return asdict(train(run))


def vertex(octaves: list[float], losses: list[float]) -> float:
    """Of the parabola through the best rung and its neighbours; the best rung itself at an end of the ladder."""
    best = int(np.argmin(losses))
    near = slice(max(0, best - 1), best + 2)
    x, y = np.array(octaves[near]), np.array(losses[near])
    if not np.isfinite(losses[best]):
        return math.nan
    if len(x) == 3 and np.isfinite(y).all():
        lowest = parabola_vertex(x, y)
        if lowest is not None:  # not three equal losses
            return float(np.clip(lowest, x[0], x[-1]))
    return float(octaves[best])


def summarize(args: TransferArguments, losses: dict[Run, float]) -> list[dict[str, Any]]:
    """Per spec and axis: where the best rate of base and target is, how far it moved, what keeping the base's costs."""

    def curve(spec: str, target: str, seed: int) -> list[float]:
        return [losses[Run(spec, target, octave, seed)] for octave in args.octaves]

    def mean_curve(spec: str, target: str) -> np.ndarray:
        return np.mean([curve(spec, target, seed) for seed in args.seeds], axis=0)  # inf if a seed diverged

    rows = []
    for spec, target in itertools.product(args.specs, args.axes):
        at_base, at_target = mean_curve(spec, "base"), mean_curve(spec, target)
        kept = int(np.argmin(at_base))  # what a user who swept the base would take
        best = int(np.argmin(at_target))
        # paired: a seed has the same batches at base and target
        drifts = [
            vertex(args.octaves, curve(spec, target, seed)) - vertex(args.octaves, curve(spec, "base", seed))
            for seed in args.seeds
        ]
        drift = statistics.mean(drifts)
        regret = (at_target[kept] - at_target[best]) / at_target[best] if np.isfinite(at_target[best]) else math.inf
        rows.append(
            {
                "spec": spec,
                "target": target,
                "losses": {"base": at_base.tolist(), "target": at_target.tolist()},
                "spread": {
                    name: [
                        statistics.stdev(column) if len(column) > 1 and np.isfinite(column).all() else 0.0
                        for column in zip(*(curve(spec, where, seed) for seed in args.seeds))
                    ]
                    for name, where in (("base", "base"), ("target", target))
                },
                "optimum": {
                    "base": vertex(args.octaves, at_base.tolist()),
                    "target": vertex(args.octaves, at_target.tolist()),
                },
                "drift_octaves": drift,
                "drift_interval": half_width(drifts),
                "drift_of_seeds": drifts,
                "regret": regret,
                "best_loss": float(at_target[best]),
                "at_edge": [
                    name for name, at in (("base", kept), ("target", best)) if at in (0, len(args.octaves) - 1)
                ],
                # an optimum at the ladder's end may lie beyond it
                "transferred": bool(abs(drift) <= DRIFT and regret <= REGRET)
                and 0 < kept < len(args.octaves) - 1
                and 0 < best < len(args.octaves) - 1,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    edge = "; * an optimum at the end of the ladder: give more --octaves" if any(row["at_edge"] for row in rows) else ""
    found = Table(
        title="Best learning rate: drift from base to target (octaves, 95% interval), regret of keeping the base's",
        caption=f"transfers: drift ≤ {DRIFT} and regret ≤ {REGRET:.0%}{edge}",
    )
    for heading in ("target", "spec"):
        found.add_column(heading, overflow="fold")
    for heading in ("drift", "regret", "best loss", "transfers"):
        found.add_column(heading, no_wrap=True)
    for row in sorted(rows, key=lambda row: row["target"]):
        half = "" if row["drift_interval"] is None else f" ± {row['drift_interval']:.2f}"
        found.add_row(
            row["target"],
            row["spec"],
            f"{row['drift_octaves']:+.2f}{half}{' *' if row['at_edge'] else ''}",
            f"{row['regret']:.2%}",
            f"{row['best_loss']:.4f}",
            "yes" if row["transferred"] else "no",
        )
    return found


def plot(args: TransferArguments, rows: list[dict[str, Any]], lr: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(args.axes), 3.0 * len(args.specs)), layout="constrained")
    panels = figure.subplots(len(args.specs), len(args.axes), squeeze=False, sharex=True, sharey="col")
    found = {(row["spec"], row["target"]): row for row in rows}
    rates = [lr * 2.0**octave for octave in args.octaves]
    for (i, spec), (j, target) in itertools.product(enumerate(args.specs), enumerate(args.axes)):
        axes, row = panels[i][j], found[spec, target]
        for name, colour in (("base", "tab:blue"), ("target", "tab:orange")):
            losses = np.array(row["losses"][name])
            label = "base" if name == "base" else target
            axes.errorbar(rates, losses, row["spread"][name], fmt="o-", ms=3, color=colour, label=label, capsize=2)
            axes.axvline(lr * 2.0 ** row["optimum"][name], color=colour, linestyle=":")
        low = min([*row["losses"]["base"], *row["losses"]["target"]])
        if math.isfinite(low):  # what diverges may leave the picture
            axes.set_ylim(top=min(axes.get_ylim()[1], low * 1.35))
        axes.set_xscale("log", base=2)
        axes.set_title(f"{spec}\ndrift {row['drift_octaves']:+.2f}, regret {row['regret']:.1%}", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("learning rate")
    for line in panels:
        line[0].set_ylabel("validation loss")
    figure.savefig(path, dpi=120)


def jobs(args: TransferArguments, read: tuple[Any, Any, Any]) -> tuple[dict[Run, ShortRun], dict[str, int], set[str]]:
    """(every run, active parameters of every target, specs that are the first one at the base)."""
    base, _ = pretrain.build_configs(read[0])
    configs = targets(base, args.axes)
    model_class = model_class_for(base)
    plans = {spec: moe_param.plan(model_class, base, base, spec=spec) for spec in args.specs}
    numbers = {
        spec: {name: (rule.init, rule.lr, rule.eps, rule.weight_decay) for name, rule in plan.rules.items()}
        for spec, plan in plans.items()
    }
    shared = {spec for spec in args.specs[1:] if numbers[spec] == numbers[args.specs[0]]}
    runs = [
        Run(spec, target, octave, seed)
        for spec, target, octave, seed in itertools.product(args.specs, configs, args.octaves, args.seeds)
        if not (target == "base" and spec in shared)
    ]
    costs = {name: active_parameters(moe_param.plan(model_class, config, base))[1] for name, config in configs.items()}
    template = short_run(*read, base)
    if args.smallest:
        template = replace(template, validation_blocks=8)
    found = {
        run: replace(
            template,
            config=configs[run.target].to_dict(),
            spec=run.spec,
            lr=template.lr * 2.0**run.octave,
            seed=run.seed,
        )
        for run in runs
    }
    return found, costs, shared


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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    (args,) = HfArgumentParser(TransferArguments, prog="moe-param transfer").parse_args_into_dataclasses(
        argv, look_for_args_file=False
    )
    small = ["--max_steps", "3", "--per_device_train_batch_size", "2"] if args.smallest else []
    read = pretrain.parse(["--config", args.config, "--output_dir", args.output_dir, *small])
    console, start = Console(), time.perf_counter()
    runs, costs, shared = jobs(args, read)
    output = Path(args.output_dir)
    done = run_all(
        work,
        {run.key: job for run, job in runs.items()},
        output / "runs.jsonl",
        settings={run.key: asdict(job) for run, job in runs.items()},
        costs={run.key: costs[run.target] for run in runs},
        workers=args.workers,
        console=console,
    )
    losses = {run: _loss(done[run.key]) for run in runs}
    rows = summarize(args, losses | at_base(losses, args.specs[0], shared))
    first = next(iter(runs.values()))
    record = {
        "command": shlex.join(["python", "-m", "moe_param.tuning.transfer", *argv]),
        "settings": asdict(args),
        "learning_rate": read[2].learning_rate,
        "tokens": first.steps * first.batch_size * first.seq_len,
        "active_parameters": costs,
        "base_runs_shared": sorted(shared),
        "summary": rows,
        "runs": {name: result["validation_loss"] for name, result in sorted(done.items())},
        "training_seconds": round(sum(result["seconds"] for result in done.values())),
        "seconds": round(time.perf_counter() - start, 1),
        "hardware": hardware(),
        "versions": versions(),
    }
    (output / "transfer.json").write_text(json.dumps(finite(record), indent=1) + "\n", "utf-8")
    plot(args, rows, read[2].learning_rate, output / "transfer.png")
    console.print(table(rows))
    console.print(f"numbers in {output / 'transfer.json'}, picture in {output / 'transfer.png'}")
    return record


if __name__ == "__main__":
    try:
        main()
    except pretrain.USER_ERRORS as error:
        sys.exit(f"error: {error}")
