"""How does the best rate move when the same model trains longer?

    python -m recipes.evidence.transfer.horizon --bases mixtral-stdlib

A tuned base is trained for 1, 2, 4 and 8 times its steps, with the warm-up of the base in steps and a linear decay to
zero, each with a ladder of rates. The exponent e of lr ∝ tokens^−e is fitted to the optima of each seed: it is what
`tokens_ratio` is given as `tokens_exponent`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from moe_param.cli.tune import read
from moe_param.statistics import half_width, slope
from moe_param.training.report import hardware, versions
from moe_param.tuning.base import read_base
from moe_param.tuning.drift import Curves
from moe_param.tuning.ledger import cores, run_all
from moe_param.tuning.points import split
from moe_param.tuning.short_run import ShortRun
from moe_param.tuning.transfer import Train
from recipes.evidence.transfer.bases import BASES
from recipes.evidence.transfer.run import arguments, tuned_file, write

TIMES, OCTAVES, SEEDS = (1, 2, 4, 8), (-2.0, -1.0, 0.0, 1.0), (0, 1, 2)


def runs_of(first: ShortRun, smallest: bool) -> dict[str, ShortRun]:
    """Every horizon, rung and seed."""
    times, octaves, seeds = ((1, 2), (-1.0, 0.0, 1.0), (0,)) if smallest else (TIMES, OCTAVES, SEEDS)
    return {
        f"{longer}/{octave:g}/{seed}": replace(
            first,
            steps=first.steps * longer,
            warmup=first.warmup / longer,
            lr=first.lr * 2.0**octave,
            seed=seed,
        )
        for longer, octave, seed in itertools.product(times, octaves, seeds)
    }


def exponents(losses: Mapping[str, float]) -> tuple[dict[int, Curves], list[float]]:
    """(the ladder of each horizon, e of each seed): e is minus the slope of the best octave on log2 of the horizon."""
    parts = [(int(t), float(o), int(s)) for t, o, s in (key.split("/") for key in losses)]
    times, octaves, seeds = (tuple(sorted(set(values))) for values in zip(*parts))
    curves = {
        longer: Curves(octaves, tuple(tuple(losses[f"{longer}/{o:g}/{s}"] for o in octaves) for s in seeds))
        for longer in times
    }
    optima = [curves[longer].optima() for longer in times]
    doublings = [math.log2(longer) for longer in times]
    return curves, [-slope(doublings, of_seed) for of_seed in zip(*optima)]


def study(base: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The ladders of one base, and the exponent."""
    found = read_base(*read([str(tuned_file(base, args.runs, args.smallest)), "--output_dir", str(args.runs)]))
    rate, std, constants = split(found.start)
    jobs = runs_of(replace(found.run, lr=rate, init_std=std, constants=constants), args.smallest)
    done = run_all(
        Train(),
        jobs,
        args.runs / base / "horizon" / "runs.jsonl",
        settings={key: asdict(job) for key, job in jobs.items()},
        costs={key: float(job.steps) for key, job in jobs.items()},
        workers=args.workers or cores(),
        console=console,
    )
    losses = {key: math.inf if r["validation_loss"] is None else r["validation_loss"] for key, r in done.items()}
    curves, found_exponents = exponents(losses)
    return {
        "command": f"python -m recipes.evidence.transfer.horizon --bases {base}",
        "learning_rate": rate,
        "losses": {key: done[key]["validation_loss"] for key in jobs},
        "best_octaves": {longer: curve.optima() for longer, curve in curves.items()},
        "regret_of_the_base_s_rate": {
            longer: curve.mean[curve.octaves.index(0.0)] / min(curve.mean) - 1 for longer, curve in curves.items()
        },
        "exponent": statistics.fmean(found_exponents),
        "exponent_interval": half_width(found_exponents),
        "exponent_of_seeds": found_exponents,
        "hardware": hardware(),
        "versions": versions(),
    }


def main() -> None:
    """Every base that was named, and its exponent."""
    args, console = arguments(__doc__, BASES[:1]).parse_args(), Console()
    for base in args.bases:
        record = study(base, args, console)
        write(args.out / "horizon" / f"{base}.json", record)
        half = record["exponent_interval"]
        interval = "" if half is None else f" ± {half:.2f}"
        console.print(f"{base}: lr ∝ tokens^−e, e = {record['exponent']:.2f}{interval}")
        console.print(json.dumps(record["regret_of_the_base_s_rate"]))


if __name__ == "__main__":
    main()
