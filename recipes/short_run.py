"""One short training run in a plain loop: for sweeps, where a Trainer's set-up would cost more than the training."""

from __future__ import annotations

import functools
import itertools
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import moe_param
from recipes.data import ByteTokenizer, InputError, PackedDataset, stdlib_tokens

VALIDATION_BATCH = 32


@dataclass(frozen=True)
class ShortRun:
    """Byte-level training on `stdlib`. `config` and `base` are `PretrainedConfig.to_dict()`s: they pickle well."""

    config: dict[str, Any]
    base: dict[str, Any]
    spec: str
    lr: float
    steps: int
    batch_size: int
    seq_len: int
    warmup: float = 0.25  # share of the steps; then linear decay to zero
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-12
    weight_decay: float = 0.0
    seed: int = 0
    validation_blocks: int = 256


@dataclass(frozen=True)
class Outcome:
    validation_loss: float  # inf for a run that left the finite numbers
    training_loss: float
    seconds: float

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.validation_loss)


def config_from(values: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(**values)


@functools.cache
def corpus(seq_len: int, validation_blocks: int = 256) -> tuple[PackedDataset, PackedDataset]:
    """(training, held-out) blocks of the standard library's sources."""
    train, held_out = stdlib_tokens(ByteTokenizer())
    return PackedDataset(train, seq_len), PackedDataset(held_out, seq_len, max_blocks=validation_blocks)


def factor(run: ShortRun, step: int) -> float:
    """The learning rate's schedule: linear warm-up, then linear decay to zero."""
    warmup = max(1, round(run.steps * run.warmup))
    return min((step + 1) / warmup, (run.steps - step) / max(1, run.steps - warmup))


def train(run: ShortRun) -> Outcome:
    """Train, validate."""
    training, validation = corpus(run.seq_len, run.validation_blocks)
    if run.steps * run.batch_size > len(training):
        raise InputError(f"{run.steps} steps need more than one epoch of stdlib: fewer steps or a smaller batch_size")
    transformers.set_seed(run.seed)
    model = AutoModelForCausalLM.from_config(config_from(run.config), experts_implementation="grouped_mm")
    parameterization = moe_param.apply(model, config_from(run.base), spec=run.spec, seed=run.seed, experts=None)
    groups = parameterization.param_groups(model, lr=run.lr, eps=run.eps, weight_decay=run.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=run.betas, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(factor, run))

    start, losses = time.perf_counter(), []
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
    value = evaluate(model, validation) if math.isfinite(losses[-1]) else math.inf
    recent = losses[-max(1, run.steps // 20) :]
    seconds = time.perf_counter() - start
    return Outcome(value if math.isfinite(value) else math.inf, sum(recent) / len(recent), seconds)


@torch.no_grad()
def evaluate(model: torch.nn.Module, validation: PackedDataset) -> float:
    model.eval()
    total = 0.0
    for start in range(0, len(validation), VALIDATION_BATCH):
        ids = validation.batch(range(start, min(start + VALIDATION_BATCH, len(validation))))
        total += model(input_ids=ids, labels=ids).loss.item() * len(ids)  # blocks are equally long
    return total / len(validation)
