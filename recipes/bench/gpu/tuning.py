"""`moe-param tune` on a base of 34M active parameters with one GPU worker, for the time that is left.

    python -m recipes.bench.gpu.tuning --out tuning.json

What it knows of that command is its name, the options in `search` and the two files in `results`. A kill in the middle
costs the run that was under way: the study is on disk, and the same command goes on with it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from recipes.bench.gpu.steps import NOT_BUILT_STATUS
from recipes.bench.gpu.training import SMALLEST, SMALLEST_MODEL
from recipes.bench.report import bench_report

CONFIG = Path(__file__).with_suffix(".yaml")
TUNE = (sys.executable, "-m", "moe_param.cli.main", "tune")
LADDER = {"log2_lrs": (-12, -11, -10, -9, -8, -7, -6), "init_stds": (0.02, 0.04)}
SMALLEST_LADDER = {"log2_lrs": (-9, -8)}
DEVICE = "--device"
"""The option of `moe-param tune` that says where its workers train; without it they train on the CPU."""


def search(device: str, smallest: bool, folder: Path) -> list[str]:
    """The command."""
    options: dict[str, Any] = {"output_dir": folder, "workers": 1, "seeds": 0}
    if smallest:
        model = yaml.safe_load(CONFIG.read_text("utf-8"))["overrides"] | SMALLEST_MODEL
        train = {name: value for name, value in SMALLEST.items() if name != "logging_steps"}
        options |= {"overrides": json.dumps(model), **train}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    for name, values in (SMALLEST_LADDER if smallest else LADDER).items():
        words += [f"--{name}", *map(str, values)]
    if device == "cuda":
        words += [DEVICE, "cuda"]
    return [*TUNE, str(CONFIG), *words]


def has_gpu_workers() -> bool:
    """Whether this `moe-param tune` can be told where to train."""
    said = subprocess.run([*TUNE, "--help"], capture_output=True, text=True, check=True).stdout
    return DEVICE in said.split()


def results(folder: Path) -> dict[str, Any]:
    """What the search found, from the files that it is documented to write."""
    tuned = yaml.safe_load((folder / "tuned.yaml").read_text("utf-8"))
    trials = json.loads((folder / "tune.json").read_text("utf-8"))["trials"]
    finished = [trial for trial in trials if trial.get("loss") is not None]
    return {
        "name": "tune",
        "trials": len(finished),
        "best_loss": min((trial["loss"] for trial in finished), default=None),
        **{name: tuned.get(name) for name in ("learning_rate", "init_std")},
        "seconds_of_runs": round(sum(trial["seconds"] for trial in finished), 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.gpu.tuning", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes; the study goes beside it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smallest", action="store_true", help="two runs of a tiny model: tries the code")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not has_gpu_workers():
        print(f"moe-param tune has no {DEVICE}: it trains on CPUs only")
        return NOT_BUILT_STATUS
    folder = arguments.out.with_suffix(".study")
    subprocess.run(search(arguments.device, arguments.smallest, folder), check=True)
    bench_report("recipes.bench.gpu.tuning", argv, arguments.smallest, [results(folder)], arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
