"""What a run leaves behind: a metrics file, a picture, and the facts needed to compare it with another."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import moe_param
from moe_param import Parameterization
from moe_param.ledger import read_lines


def finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    return total, total - routed + int(routed * (shape.sparsity or 0))


# Dense bfloat16 peaks of one device in TFLOP/s, without sparsity, from the makers' data sheets.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
}


def peak_flops(device: str) -> float | None:
    """FLOP/s of a device by its name, None where it is not known."""
    return next((1e12 * peak for name, peak in PEAKS.items() if name in device), None)


def flops_per_token(parameterization: Parameterization, seq_len: int, tied: bool) -> float:
    """Of a training step: 6 per active weight that is multiplied, and causal attention's products of activations.

    An embedding that is only looked up multiplies nothing. Recomputation (activation checkpointing) does not count.
    """
    _, active = active_parameters(parameterization)
    rules = parameterization.rules.values()
    lookup = 0 if tied else sum(math.prod(rule.shape) for rule in rules if rule.role == "embedding")
    heads = sum(rule.fan_in or 0 for rule in rules if rule.role == "attention_out")  # heads × head_dim, all layers
    return 6.0 * (active - lookup) + 6.0 * heads * seq_len


class Speed:
    """Tokens and FLOPs a second, in the time that training took (validation and checkpoints left out)."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, processes: int, peak: float | None) -> None:
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.processes, self.peak = processes, peak
        self.seconds, self.since = 0.0, time.perf_counter()

    def pause(self) -> None:
        self.seconds += time.perf_counter() - self.since

    def go_on(self) -> None:
        self.since = time.perf_counter()

    def metrics(self, steps: int) -> dict[str, float]:
        """Since the last call; MFU where the device's peak (of bfloat16, whatever the run computes in) is known."""
        rate = steps * self.tokens_per_step / max(self.seconds, 1e-9)
        self.seconds = 0.0
        flops = rate * self.flops_per_token
        found = {"tokens_per_second": rate, "tflops": flops / 1e12}
        return {**found, "mfu": flops / (self.peak * self.processes)} if self.peak else found


def versions() -> dict[str, str]:
    packages = {name: _installed(name) for name in ("torch", "transformers", "accelerate", "datasets")}
    return {"python": platform.python_version(), "moe_param": moe_param.__version__, **packages}


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"
