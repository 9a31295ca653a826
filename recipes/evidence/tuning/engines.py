"""Which search finds the better base for as many runs?

    python -m recipes.evidence.tuning.engines --out recipes/evidence/tuning/results

Every engine of `moe-param tune` gets the same budget on every base, then its point is trained with seeds that no search
saw: the mean held-out loss of those is what counts. The plain way, a whole grid of rates and stds with all seeds and
then the paper's coordinate pass, is one of them, with as many runs as it takes. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from moe_param import tune
from moe_param.cli.tune import read
from moe_param.folder_lock import folder_lock
from moe_param.training.report import hardware, versions
from moe_param.tuning.base import read_base
from moe_param.tuning.points import split
from moe_param.tuning.short_run import train
from recipes.evidence.transfer.bases import STEPS, config_of

BUDGET = 60
UNSEEN = (100, 101, 102)
"""Seeds that no search trains with."""

BASES = ("mixtral", "qwen3_moe")
"""Families of the bases of `recipes.evidence.transfer`, on the standard library."""

ENGINES: dict[str, list[dict[str, Any]]] = {
    "stages": [{"mode": "stages", "budget": BUDGET}],
    "tpe": [{"mode": "tpe", "budget": BUDGET}],
    "gp": [{"mode": "gp", "budget": BUDGET}],
    "cmaes": [{"mode": "cmaes", "budget": BUDGET}],
    "plain": [
        {"mode": "grid", "log2_lrs": [-9, -8, -7, -6, -5, -4], "init_stds": [0.02, 0.04, 0.08]},
        {"mode": "coordinate"},
    ],
}
"""Name → the searches that follow one another, each from what the one before it found."""


def search(base: str, engine: str, folder: Path, steps: int, smallest: bool) -> dict[str, Any]:
    """One engine on one base: the runs it cost, and its point's loss with unseen seeds."""
    config = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(config_of(f"{base}-stdlib", steps)))
    source, spent = config, 0.0
    for i, options in enumerate(ENGINES[engine]):
        if smallest:
            options = {**options, **SMALLEST.get(options["mode"], {"budget": 20, "seeds": (0,)})}
        output = folder / f"search-{i}"
        if not (output / "tuned.yaml").exists():
            tune(source, output_dir=output, **options)
        spent += json.loads((output / "tune.json").read_text())["full_runs"]
        source = output / "tuned.yaml"
    found = read_base(*read([str(source), "--output_dir", str(folder)]))
    rate, std, constants = split(found.start)
    run = replace(found.run, lr=rate, init_std=std, constants=constants)
    losses = [train(replace(run, seed=seed)).validation_loss for seed in (UNSEEN[:1] if smallest else UNSEEN)]
    return {"point": found.start, "full_runs": round(spent, 2), "losses": losses, "mean": statistics.fmean(losses)}


SMALLEST: dict[str, dict[str, Any]] = {
    "grid": {"log2_lrs": [-7, -6], "init_stds": [0.02], "seeds": (0,)},
    "coordinate": {"roles": ["router"], "seeds": (0, 1)},
}


def main() -> None:
    """Runs what is not in the folder yet, writes engines.json and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/evidence/tuning/results"))
    parser.add_argument("--runs", type=Path, default=Path("runs/engines"), help="where the searches are kept")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--smallest", action="store_true", help="a few steps; proves nothing")
    args = parser.parse_args()
    steps = 3 if args.smallest else STEPS
    found: dict[str, dict[str, Any]] = {}
    with folder_lock(args.runs, "the comparison of searches"):
        for base in args.bases:
            for engine in args.engines:
                found.setdefault(base, {})[engine] = search(
                    base, engine, args.runs / base / engine, steps, args.smallest
                )
    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "budget": BUDGET,
        "unseen_seeds": UNSEEN,
        "results": found,
        "hardware": hardware(),
        "versions": versions(),
    }
    (args.out / "engines.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for base, engines in found.items():
        for engine, values in engines.items():
            print(f"{base:12} {engine:8} {values['full_runs']:7.1f} runs  {values['mean']:.4f} nats")


if __name__ == "__main__":
    main()
