"""What runs take turns on, and the ratio that comes of it: the models of the benchmarks and their rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import MixtralConfig

import moe_param

GPU_TARGET = (1024, 8, 1408, 32000)
"""Width, depth, expert size and vocabulary of the model whose steps are timed on a GPU."""


def config(width: int, depth: int, expert_size: int, vocab_size: int) -> MixtralConfig:
    return MixtralConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        intermediate_size=expert_size,
        num_attention_heads=max(4, width // 64),
        num_key_value_heads=max(4, width // 64),
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=vocab_size,
        use_cache=False,
    )


def base_of(target: MixtralConfig) -> moe_param.Shape:
    """A base at which everything is scaled: a quarter of the width, half the depth and expert size, twice the
    experts."""
    return moe_param.Shape(
        width=target.hidden_size // 4,
        depth=target.num_hidden_layers // 2,
        num_experts=2 * target.num_local_experts,
        top_k=2 * target.num_experts_per_tok,
        expert_size=target.intermediate_size // 2,
    )


def compare(measure: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds per name and round; every round runs all names, each time beginning with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in measure}
    names = list(measure)
    for i in range(rounds):
        start = i % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(measure[name]())
    return seconds


def ratio(seconds: dict[str, list[float]], ours: str, theirs: str) -> dict[str, Any]:
    """The median over rounds of ours / theirs, its quartiles, and the medians of both."""
    ratios = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return {
        "ratio": round(statistics.median(ratios), 4),
        "quartiles": [round(low, 4), round(high, 4)],
        "rounds": len(ratios),
        "ours": ours,
        "theirs": theirs,
        "seconds": [round(statistics.median(seconds[name]), 4) for name in (ours, theirs)],
    }


def forward_and_backward(model: Any, ids: torch.Tensor) -> None:
    """The part of a step that is the model's; on a GPU under autocast to bfloat16."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
