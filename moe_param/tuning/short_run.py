"""One short training run in a plain loop: for sweeps, where a Trainer's set-up would cost more than the training."""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import moe_param
from moe_param.errors import InputError
from moe_param.structure.dispatch import is_experts
from moe_param.training.arguments import ModelArguments, PretrainArguments, set_horizon
from moe_param.training.data.loading import load_data
from moe_param.training.data.packing import PackedDataset
from moe_param.training.data.text import ByteTokenizer, DataArguments, load_tokenizer, stdlib_tokens

VALIDATION_BATCH = 32


@dataclass(frozen=True)
class ShortRun:
    """Training on `stdlib`, byte by byte, or on `data`. `config` and `base` are `PretrainedConfig.to_dict()`s."""

    config: dict[str, Any]
    base: dict[str, Any]
    spec: str
    lr: float
    steps: int
    batch_size: int
    seq_len: int
    warmup: float = 0.25  # share of the steps
    schedule: str = "linear"  # what follows, by transformers' name; this one falls to zero
    schedule_options: dict[str, Any] | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-12
    weight_decay: float = 0.0
    init_std: float | None = None  # default: the config's
    constants: dict[str, dict[str, float]] | None = None  # per role, as `moe_param.apply` takes them
    seed: int = 0
    validation_blocks: int = 256
    data: dict[str, Any] | None = None  # `DataArguments` of another text, read up front


@dataclass(frozen=True)
class Outcome:
    validation_loss: float  # inf for a run that left the finite numbers
    training_loss: float
    seconds: float

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.validation_loss)


def short_run(
    model: ModelArguments, data: DataArguments, training: PretrainArguments, base: PretrainedConfig
) -> ShortRun:
    """The run that `moe-param train` would make of these arguments at `base`, in a plain loop.

    Raises:
        InputError: clipping, another batch or horizon than the base's: short runs do not do these.
    """
    for name, off in (("max_grad_norm", 0.0), ("clip", None), ("batch_ratio", 1.0), ("tokens_ratio", 1.0)):
        if getattr(training, name) != off:
            what = "scale batch and horizon" if name.endswith("ratio") else "clip"
            raise InputError(f"{name} is set: short runs do not {what}, leave it out")
    schedule = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    moe_param.check_schedule(schedule)
    horizon = set_horizon(training, data.seq_len, 1)
    same = training.decay == "independent" or (training.decay == "ema" and training.base_steps == horizon.steps)
    if training.weight_decay and not same:
        raise InputError(
            f"decay is {training.decay!r}: short runs are the base's, of {horizon.steps} steps; leave decay out, or "
            "set 'ema' with this number as base_steps"
        )
    text = {f.name: getattr(data, f.name) for f in fields(DataArguments) if getattr(data, f.name) != f.default}
    text = {name: value for name, value in text.items() if name not in ("seq_len", "validation_blocks")}
    return ShortRun(
        config=base.to_dict(),
        base=base.to_dict(),
        spec=model.spec,
        lr=training.learning_rate,
        steps=horizon.steps,
        batch_size=horizon.batch,
        seq_len=data.seq_len,
        warmup=training.get_warmup_steps(horizon.steps) / horizon.steps,
        schedule=schedule,
        schedule_options=dict(training.lr_scheduler_kwargs or {}) or None,  # type: ignore[arg-type]
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
        weight_decay=training.weight_decay,
        init_std=model.init_std,
        constants=model.constants or None,  # type: ignore[arg-type]
        validation_blocks=data.validation_blocks,
        data=text or None,
    )


def config_from(values: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(**values)


@functools.cache
def corpus(seq_len: int, validation_blocks: int = 256) -> tuple[PackedDataset, PackedDataset]:
    """(training, held-out) blocks of the standard library's sources."""
    train, held_out = stdlib_tokens(ByteTokenizer())
    return PackedDataset(train, seq_len), PackedDataset(held_out, seq_len, max_blocks=validation_blocks)


@functools.cache
def _text(arguments: str) -> tuple[PackedDataset, PackedDataset]:
    data = load_data(DataArguments(**json.loads(arguments)))
    if not isinstance(data.train, PackedDataset):
        raise InputError("short runs read their text up front: set streaming: false, or give train_files")
    return data.train, data.validation


def _schedule(run: ShortRun, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return transformers.get_scheduler(
        run.schedule,
        optimizer,
        num_warmup_steps=round(run.steps * run.warmup),
        num_training_steps=run.steps,
        scheduler_specific_kwargs=run.schedule_options,
    )


def check_text(run: ShortRun) -> None:
    """Reads the text as the workers will.

    Raises:
        InputError: a text that cannot be read, of more ids than the model has, or too short.
    """
    if run.data and run.data.get("streaming"):
        raise InputError("short runs read their text up front: set streaming: false, or give train_files")
    vocabulary = load_tokenizer((run.data or {}).get("tokenizer", "bytes")).vocab_size
    known = config_from(run.config).get_text_config().vocab_size
    if vocabulary > known:
        raise InputError(f"the tokenizer has {vocabulary} ids, the model {known}: set overrides.vocab_size")
    blocks_of(run)


def blocks_of(run: ShortRun) -> tuple[PackedDataset, PackedDataset]:
    """(training, held-out) blocks of a run's text.

    Raises:
        InputError: a text that cannot be read, or too short: no run sees a block twice.
    """
    if run.data:
        sizes = {"seq_len": run.seq_len, "validation_blocks": run.validation_blocks}
        training, validation = _text(json.dumps(run.data | sizes))
    else:
        training, validation = corpus(run.seq_len, run.validation_blocks)
    if run.steps * run.batch_size > len(training):
        steps = len(training) // run.batch_size
        raise InputError(
            f"{run.steps} steps of {run.batch_size} blocks need more than one epoch of the text, which has "
            f"{len(training)} blocks of {run.seq_len} tokens: "
            + (f"at most {steps} steps, or a smaller batch" if steps else "a smaller batch, or more text")
        )
    return training, validation


def train(run: ShortRun) -> Outcome:
    """Train, validate."""
    training, validation = blocks_of(run)
    transformers.set_seed(run.seed)
    model = AutoModelForCausalLM.from_config(config_from(run.config))
    parameterization = moe_param.apply(
        model,
        config_from(run.base),
        spec=run.spec,
        init_std=run.init_std,
        constants=run.constants,
        seed=run.seed,
        experts=None,
    )
    if any(is_experts(module) for module in model.modules()):
        model.set_experts_implementation("grouped_mm")
    groups = parameterization.param_groups(model, lr=run.lr, eps=run.eps, weight_decay=run.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=run.betas, fused=True)
    schedule = _schedule(run, optimizer)

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
