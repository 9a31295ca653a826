"""Real short training runs, `megablocks` against `grouped_mm`: the same loss, and how many tokens a second.

    python -m recipes.bench.gpu.training --out training.json

`moe-param train` on training.yaml beside this file, a model of 100M active parameters on the sources of the standard
library: the same start, the same data, another implementation. First with weights in bfloat16, where both multiply in
bfloat16: these two runs have goals. Then as most people train, float32 weights under autocast, which transformers'
`grouped_mm` multiplies in float32. What a run leaves is deleted, but its log.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_param.ledger import read_lines
from recipes.bench.goals import held
from recipes.bench.report import bench_report

CONFIG = Path(__file__).with_suffix(".yaml")
OURS, THEIRS = "megablocks", "grouped_mm"
WARM = 0.2
"""Share of the logged speeds, at the start, that does not count: kernels are tuned and memory is allocated there."""
SMALLEST_MODEL = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16},
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
SMALLEST = {
    **{"seq_len": 4, "validation_blocks": 1, "max_steps": 2, "warmup_steps": 1, "logging_steps": 1},
    **{"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1},
}


def train(implementation: str, dtype: str, device: str, smallest: bool, folder: Path) -> dict[str, Any]:
    """One run, and what it logged."""
    shutil.rmtree(folder, ignore_errors=True)
    model = yaml.safe_load(CONFIG.read_text("utf-8"))["overrides"] | (SMALLEST_MODEL if smallest else {})
    options = {
        "overrides": json.dumps(model | {"dtype": dtype}),
        "experts_implementation": implementation,
        "output_dir": folder,
        **(SMALLEST if smallest else {}),
        **({"use_cpu": True} if device == "cpu" else {}),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "moe_param.train", str(CONFIG), *words], check=True)
    found = {"name": f"{implementation}, {dtype} weights", **results(folder)}
    for weights in folder.glob("*.safetensors"):  # gigabytes
        weights.unlink()
    return found


def results(folder: Path) -> dict[str, Any]:
    """What a run left in metrics.jsonl and summary.json."""
    lines = read_lines(folder / "metrics.jsonl")
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    shares = [line["mfu"] for line in lines if "mfu" in line]  # where the device's peak is known
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    return {
        "tokens_per_second": round(statistics.median(speeds[round(WARM * len(speeds)) :]), 1),
        "mfu": round(statistics.median(shares), 4) if shares else None,
        "losses": [line["loss"] for line in lines if line.get("loss") is not None],
        **{name: summary[name] for name in ("validation_loss", "parameters", "active_parameters", "steps", "seconds")},
    }


def compare(ours: dict[str, Any], theirs: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Speed and loss of two runs beside each other; beside their goals where both multiply in bfloat16."""
    apart = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    speed = round(ours["tokens_per_second"] / theirs["tokens_per_second"], 4)
    difference = round(abs(ours["validation_loss"] - theirs["validation_loss"]), 5)
    goals = [held("training", speed), held("same loss", difference)] if dtype == "bfloat16" else []
    return {
        "name": f"{OURS} / {THEIRS}, {dtype} weights",
        "speed": speed,
        "validation_losses_apart": difference,
        "losses_apart": {"median": round(statistics.median(apart), 5), "most": round(max(apart), 5)},
        "goals": goals,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.gpu.training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes; the runs go beside it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smallest", action="store_true", help="two steps of a tiny model: tries the code")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for dtype in ("bfloat16",) if arguments.smallest else ("bfloat16", "float32"):
        for implementation in (OURS, THEIRS):
            folder = arguments.out.with_suffix(".runs") / f"{implementation}-{dtype}"
            rows.append(train(implementation, dtype, arguments.device, arguments.smallest, folder))
            if implementation == THEIRS:
                rows.append(compare(rows[-2], rows[-1], dtype))
            report = bench_report("recipes.bench.gpu.training", argv, arguments.smallest, rows, arguments.out)
    return report


if __name__ == "__main__":
    main()
