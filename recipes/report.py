"""What a run leaves behind: a metrics file, a picture, and the facts needed to compare it with another."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import moe_param
from moe_param import Parameterization


def finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines; a last one cut short by a crash is left out."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricsFile(TrainerCallback):
    """Everything Trainer logs, one JSON object a line, each step once however often the run was resumed."""

    name = "metrics.jsonl"

    def __init__(self, folder: Path, tokens_per_step: int) -> None:
        self.path, self.tokens_per_step = folder / self.name, tokens_per_step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            # What came after the checkpoint is about to be computed again.
            kept = [line for line in read_lines(self.path) if line["step"] <= state.global_step]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, "tokens": state.global_step * self.tokens_per_step, **logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(line)) + "\n")


def plot_losses(metrics: Path, picture: Path) -> None:
    from matplotlib.figure import Figure

    lines = read_lines(metrics)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(line["tokens"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=3)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)


def active_parameters(parameterization: Parameterization) -> tuple[int, int]:
    """(all parameters, those one token passes through): of the routed experts, top_k out of num_experts."""
    shape, rules = parameterization.shape, parameterization.rules.values()
    total = sum(math.prod(rule.shape) for rule in rules)
    routed = sum(math.prod(rule.shape) for rule in rules if rule.role in ("expert_up", "expert_down"))
    return total, total - routed + routed * shape.top_k // shape.num_experts


def versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}
    return {"python": platform.python_version(), "moe_param": moe_param.__version__, **packages}


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def bench_report(
    module: str, argv: Sequence[str] | None, smallest: bool, results: list[dict[str, Any]], out: Path | None
) -> dict[str, Any]:
    """What a benchmark leaves behind: its command, hardware, versions and results; written to `out` if given."""
    report = {
        "command": shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)]),
        "hardware": hardware(),
        "versions": versions(),
        "smallest": smallest,
        "results": results,
    }
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return report
