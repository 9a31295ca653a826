"""A short run (`moe_param.tuning.short_run`) against the plain loop it was before: time and losses.

    OMP_NUM_THREADS=1 python -m recipes.bench.short_run --out recipes/bench/results/short_run.json

Both sides train the same model from the same weights on the same batches, in one process and one thread, taking turns;
a number is the median over rounds. Losses are compared over the whole run. The time of a step leaves building,
validation and reading the text out; that of building is compared by itself.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moe_param
from moe_param import Parameterization
from moe_param.structure.dispatch import is_experts
from moe_param.training.arguments import build_configs, parse
from moe_param.tuning.loop import LOOKS, evaluate, learn
from moe_param.tuning.short_run import ShortRun, build, optimizer_for, short_run
from moe_param.tuning.text import batches, blocks_of
from recipes.bench.report import bench_report

DESCRIPTION = "A short run against the plain loop it was before."
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
FASTER, SAME, CLOSE = 1.3, 1.0, 1e-5
"""Goals: steps per second over the plain loop's on the demo's base, on its target, and how far losses may differ."""


@dataclass(frozen=True)
class Trained:
    """Seconds of CPU time, so that a busy machine does not count: of the steps alone, and of building the model."""

    losses: list[float]
    validation_loss: float
    seconds: float
    build_seconds: float


def plain(run: ShortRun) -> Trained:
    """The loop of before, for what it did: float32 on the CPU, one epoch, nothing balanced, nobody watching."""
    training, validation = blocks_of(run)
    begin = time.process_time()
    transformers.set_seed(run.seed)
    model, parameterization = plainly_built(run)
    groups = parameterization.param_groups(model, lr=run.lr, eps=run.eps, weight_decay=run.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=run.betas, fused=True)
    schedule = transformers.get_scheduler(
        run.schedule,
        optimizer,
        num_warmup_steps=round(run.steps * run.warmup),
        num_training_steps=run.steps,
        scheduler_specific_kwargs=run.schedule_options,
    )
    start, losses = time.process_time(), []
    model.train()
    for ids in itertools.islice(training.batches(run.batch_size, run.seed), run.steps):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    end, total = time.process_time(), 0.0
    model.eval()
    with torch.no_grad():
        for first in range(0, len(validation), 32):
            ids = validation.batch(range(first, min(first + 32, len(validation))))
            total += model(input_ids=ids, labels=ids).loss.item() * len(ids)
    return Trained(losses, total / len(validation), end - start, start - begin)


def plainly_built(run: ShortRun) -> tuple[PreTrainedModel, Parameterization]:
    """As it was."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**run.config))
    base = AutoConfig.for_model(**run.base)
    parameterization = moe_param.apply(
        model,
        base,
        spec=run.spec,
        init_std=run.init_std,
        constants=run.constants,
        seed=run.seed,
        experts=None,
    )
    if any(is_experts(module) for module in model.modules()):
        model.set_experts_implementation("grouped_mm")
    return model, parameterization


def ours(run: ShortRun) -> Trained:
    """The loop of now; a loss is the mean over the steps since the last look."""
    training, validation = blocks_of(run)
    losses: list[float] = []

    def watch(_: float, loss: float) -> bool:
        losses.append(loss)
        return True

    begin = time.process_time()
    transformers.set_seed(run.seed)
    model, parameterization = build(run)
    optimizer = optimizer_for(run, model, parameterization)
    start = time.process_time()
    learn(run, model, optimizer, batches(run, training), watch)
    end = time.process_time()
    return Trained(losses, evaluate(run, model, validation), end - start, start - begin)


def looks(losses: Sequence[float]) -> list[float]:
    """What the looks of a run see of its losses."""
    ends = sorted({math.ceil(len(losses) * look / LOOKS) for look in range(1, LOOKS + 1)})
    return [statistics.fmean(losses[first:end]) for first, end in zip([0, *ends], ends)]


def difference(new: Trained, old: Trained) -> float:
    """The largest relative difference of two losses, over the run and at its end."""
    pairs = [*zip(new.losses, looks(old.losses), strict=True), (new.validation_loss, old.validation_loss)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def compare(name: str, run: ShortRun, rounds: int, goal: float) -> dict[str, Any]:
    """Both loops on one run, in turns, each as often first."""
    sides: dict[Callable[[ShortRun], Trained], list[Trained]] = {plain: [], ours: []}
    for _ in range(rounds):
        for side in sides:
            sides[side].append(side(run))
        sides = dict(reversed(sides.items()))
    steps = [old.seconds / new.seconds for new, old in zip(sides[ours], sides[plain])]
    builds = [old.build_seconds / new.build_seconds for new, old in zip(sides[ours], sides[plain])]
    speed, apart = statistics.median(steps), max(map(difference, sides[ours], sides[plain]))
    return {
        "name": name,
        "steps": run.steps,
        "steps per second, ours / plain": round(speed, 4),
        "of each round": [round(ratio, 4) for ratio in steps],
        "ms a step": {side.__name__: round(1e3 * least(found) / run.steps, 2) for side, found in sides.items()},
        "build, plain / ours": round(statistics.median(builds), 3),
        "largest relative difference of a loss": apart,
        "target": {"speed": goal, "difference": CLOSE},
        "passed": {"speed": speed >= goal, "difference": apart <= CLOSE},
    }


def least(found: Sequence[Trained]) -> float:
    return min(trained.seconds for trained in found)


def runs(smallest: bool) -> dict[str, tuple[ShortRun, float]]:
    """The demo's base, and its target of four times the width and expert size, each with its goal."""
    model, data, training = parse(["--config", str(DEMO)])
    base, _ = build_configs(model)
    run = short_run(model, data, training, base)
    if smallest:
        run = replace(run, steps=3, batch_size=2, validation_blocks=2)
    target = moe_param.scale_config(base, width=128, expert_size=128)
    return {"base": (run, FASTER), "target": (replace(run, config=target.to_dict()), SAME)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.short_run", description=DESCRIPTION)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--smallest", action="store_true", help="three steps, two rounds: does it run at all")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = []
    for name, (run, goal) in runs(arguments.smallest).items():
        results.append(compare(name, run, 2 if arguments.smallest else arguments.rounds, goal))
        print(results[-1], flush=True)
    return bench_report("recipes.bench.short_run", argv, arguments.smallest, results, arguments.out)


if __name__ == "__main__":
    main()
