"""Does the best learning rate stay put?  `make demo`, or  python -m recipes.demo

Sweeps the learning rate of a small base model and of one 4× as wide, on the same text, with the same numbers,
under `moe-completep` and under `standard` (transformers' own initialization, one rate for every parameter).
Runs on the CPU, one thread per run.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoConfig, HfArgumentParser, MixtralForCausalLM, PretrainedConfig

import moe_param
from recipes.report import active_parameters, finite, hardware, versions
from recipes.short_run import Outcome, ShortRun, train

SPECS = ("moe-completep", "standard")
MODELS = ("base", "target")

Key = tuple[str, str, int, int]  # spec, model, log2 of the learning rate, seed
Results = dict[Key, Outcome]


@dataclass
class DemoArguments:
    output_dir: str = field(default="demo", metadata={"help": "Where demo.png and demo.json go."})
    smallest: bool = field(default=False, metadata={"help": "Seconds instead of minutes; proves nothing."})
    base_width: int = field(default=32, metadata={"help": "Width and expert size of the base."})
    factor: int = field(default=4, metadata={"help": "Width and expert size of the target over the base's."})
    log2_lrs: list[int] = field(
        default_factory=lambda: list(range(-10, -4)), metadata={"help": "Learning rates, as powers of 2."}
    )
    steps: int = field(default=300, metadata={"help": "Optimizer steps of a run."})
    batch_size: int = field(default=16, metadata={"help": "Blocks per step."})
    seq_len: int = field(default=64, metadata={"help": "Bytes per block."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1],
        metadata={"help": "Of the initialization and the order of the data; losses are averaged over them."},
    )
    workers: int = field(
        default=min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2),
        metadata={"help": "Runs at a time."},
    )

    def __post_init__(self) -> None:
        self.log2_lrs = sorted(set(self.log2_lrs))
        if self.smallest:
            self.log2_lrs, self.steps, self.base_width, self.seeds = [-8, -6], 4, 16, [0]


@dataclass(frozen=True)
class Optimum:
    """Where the loss is lowest over log2(learning rate)."""

    log2_lr: float  # of the best run
    fitted: float  # vertex of the parabola through the best run and its neighbours
    loss: float
    at_edge: bool  # the best run is the first or last one: the optimum may lie outside the sweep


def find_optimum(log2_lrs: list[int], losses: list[float]) -> Optimum:
    best = int(np.argmin(losses))  # inf where a run diverged
    if not math.isfinite(losses[best]):
        return Optimum(math.nan, math.nan, math.inf, True)
    near = slice(max(0, best - 1), best + 2)
    x, y = np.array(log2_lrs[near], float), np.array(losses[near])
    fitted = x[np.argmin(y)]
    if len(x) == 3 and np.isfinite(y).all():
        curvature, slope, _ = np.polyfit(x, y, 2)
        if curvature > 0:  # not three equal losses
            fitted = -slope / (2 * curvature)
    return Optimum(float(log2_lrs[best]), float(fitted), losses[best], best in (0, len(losses) - 1))


def base_config(width: int) -> PretrainedConfig:
    return AutoConfig.for_model(
        "mixtral",
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        use_cache=False,
    )


def same_training(config: PretrainedConfig) -> bool:
    """Whether the two parameterizations are one and the same at this (base) config: same init, rates and ε."""
    plans = [moe_param.plan(MixtralForCausalLM, config, config, spec=spec) for spec in SPECS]
    first, second = (
        {name: (rule.init, rule.lr, rule.eps, rule.weight_decay) for name, rule in plan.rules.items()} for plan in plans
    )
    return first == second


def sweep(args: DemoArguments, console: Console) -> Results:
    base = base_config(args.base_width)
    width = args.base_width * args.factor
    configs = {"target": moe_param.scale_config(base, width=width, expert_size=width), "base": base}
    shared = same_training(base)
    jobs = {}
    for model, config in configs.items():  # targets first: the long runs should not be the last ones
        for spec in SPECS[:1] if model == "base" and shared else SPECS:
            for log2_lr, seed in itertools.product(args.log2_lrs, args.seeds):
                jobs[spec, model, log2_lr, seed] = ShortRun(
                    config=config.to_dict(),
                    base=base.to_dict(),
                    spec=spec,
                    lr=2.0**log2_lr,
                    steps=args.steps,
                    batch_size=args.batch_size,
                    seq_len=args.seq_len,
                    seed=seed,
                    validation_blocks=8 if args.smallest else 256,
                )
    plans = {model: moe_param.plan(MixtralForCausalLM, config, base) for model, config in configs.items()}
    costs = {model: active_parameters(plan)[1] for model, plan in plans.items()}
    outcomes: Results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    os.environ["OMP_NUM_THREADS"] = "1"  # before the workers start; they are the parallelism
    with (
        Progress(*columns, console=console) as progress,
        multiprocessing.get_context("spawn").Pool(args.workers, torch.set_num_threads, (1,)) as pool,
    ):
        task = progress.add_task(f"0/{len(jobs)} runs", total=sum(costs[model] for _, model, _, _ in jobs))
        for key, outcome in pool.imap_unordered(_work, jobs.items()):
            outcomes[key] = outcome
            progress.update(task, advance=costs[key[1]], description=f"{len(outcomes)}/{len(jobs)} runs")
    if shared:
        outcomes |= {(SPECS[1], *key[1:]): outcome for key, outcome in outcomes.items() if key[1] == "base"}
    return outcomes


def _work(job: tuple[Key, ShortRun]) -> tuple[Key, Outcome]:
    return job[0], train(job[1])


def mean_losses(args: DemoArguments, results: Results, spec: str, model: str) -> list[float]:
    """For every learning rate the mean over the seeds: inf if one of them diverged."""
    return [
        float(np.mean([results[spec, model, x, seed].validation_loss for seed in args.seeds])) for x in args.log2_lrs
    ]


def summarize(args: DemoArguments, results: Results) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for spec in SPECS:
        losses = {model: mean_losses(args, results, spec, model) for model in MODELS}
        optima = {model: find_optimum(args.log2_lrs, values) for model, values in losses.items()}
        kept = dict(zip(map(float, args.log2_lrs), losses["target"])).get(optima["base"].log2_lr, math.inf)
        summary[spec] = {
            "losses": losses,
            "optimum": {model: asdict(optimum) for model, optimum in optima.items()},
            "drift_octaves": optima["target"].fitted - optima["base"].fitted,
            "drift_grid": optima["target"].log2_lr - optima["base"].log2_lr,
            # what it costs the target to be trained at the base's best rate
            "loss_of_keeping_the_rate": kept - optima["target"].loss,
        }
    return summary


def tables(args: DemoArguments, summary: dict[str, Any]) -> dict[str, Table]:
    found = {}
    for spec, numbers in summary.items():
        table = Table(title=f"{spec}: validation loss (nats per byte)")
        table.add_column("learning rate")
        for model in MODELS:
            table.add_column(f"{model}, width {width_of(args, model)}", justify="right")
        for i, log2_lr in enumerate(args.log2_lrs):
            cells = []
            for model in MODELS:
                loss = numbers["losses"][model][i]
                text = f"{loss:.3f}" if math.isfinite(loss) else "diverged"
                best = log2_lr == numbers["optimum"][model]["log2_lr"]
                cells.append(f"[bold green]★ {text}[/]" if best else text)
            table.add_row(f"2^{log2_lr}", *cells)
        table.add_section()
        table.add_row("optimum (parabola)", *(f"2^{numbers['optimum'][m]['fitted']:.2f}" for m in MODELS))
        found[spec] = table
    return found


def width_of(args: DemoArguments, model: str) -> int:
    return args.base_width * (args.factor if model == "target" else 1)


def verdict(summary: dict[str, Any]) -> str:
    lost = [model for model, optimum in summary["optimum"].items() if not math.isfinite(optimum["loss"])]
    if lost:
        return f"every run of the {' and '.join(lost)} diverged"
    text = f"optimum moved by {summary['drift_octaves']:+.2f} octaves ({summary['drift_grid']:+.0f} on the grid); "
    text += f"at the base's best rate the target's loss is {summary['loss_of_keeping_the_rate']:.3f} above its best"
    edges = [model for model, optimum in summary["optimum"].items() if optimum["at_edge"]]
    return text + (f"; the best run of the {' and '.join(edges)} is at the edge of the sweep" if edges else "")


def plot(args: DemoArguments, summary: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    every = [loss for numbers in summary.values() for losses in numbers["losses"].values() for loss in losses]
    top = max(filter(math.isfinite, every), default=1.0)
    for axes, (spec, numbers) in zip(panels, summary.items()):
        for model, colour in zip(MODELS, ("tab:blue", "tab:orange")):
            runs = [(2.0**x, loss) for x, loss in zip(args.log2_lrs, numbers["losses"][model])]
            points = [run for run in runs if math.isfinite(run[1])]
            gone = [lr for lr, loss in runs if not math.isfinite(loss)]
            best = numbers["optimum"][model]
            if points:
                label = f"{model}, width {width_of(args, model)}"
                axes.plot(*zip(*points), "o-", color=colour, markersize=4, label=label)
                axes.plot(2.0 ** best["log2_lr"], best["loss"], "*", color=colour, markersize=14)
                axes.axvline(2.0 ** best["fitted"], color=colour, linestyle=":")
            if gone:
                axes.plot(gone, [top] * len(gone), "x", color=colour, label=f"{model}: diverged")
        axes.set_xscale("log", base=2)
        axes.set(title=f"{spec}: optimum moves {numbers['drift_octaves']:+.2f} octaves", xlabel="learning rate")
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("validation loss (nats per byte)")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    (args,) = HfArgumentParser(DemoArguments, prog="python -m recipes.demo").parse_args_into_dataclasses(
        argv, look_for_args_file=False
    )
    console = Console()
    start = time.perf_counter()
    results = sweep(args, console)
    summary = summarize(args, results)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "command": shlex.join(["python", "-m", "recipes.demo", *argv]),
        "settings": asdict(args),
        "model": base_config(args.base_width).to_diff_dict(),
        "summary": summary,
        "runs": [
            {"spec": spec, "model": model, "log2_lr": log2_lr, "seed": seed, "diverged": outcome.diverged}
            | asdict(outcome)
            for (spec, model, log2_lr, seed), outcome in sorted(results.items())
        ],
        # one and the same at the base, so run once and listed under both
        "base_runs_shared": same_training(base_config(args.base_width)),
        "seconds": round(time.perf_counter() - start, 1),
        "hardware": hardware(),
        "versions": versions(),
    }
    (output / "demo.json").write_text(json.dumps(finite(record), indent=2) + "\n")
    plot(args, summary, output / "demo.png")
    for spec, table in tables(args, summary).items():
        console.print(table)
        console.print(f"{spec}: {verdict(summary[spec])}\n", soft_wrap=True)
    console.print(f"{record['seconds']:.0f} s; numbers in {output / 'demo.json'}, picture in {output / 'demo.png'}")
    return record


if __name__ == "__main__":
    main()
