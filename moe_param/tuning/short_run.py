"""One short training run in a plain loop: for sweeps, where a Trainer's set-up would cost more than the training."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from dataclasses import dataclass, fields

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import moe_param
from moe_param import Parameterization
from moe_param.errors import InputError
from moe_param.scaling.spec import ScalingSpec
from moe_param.structure.dispatch import is_experts
from moe_param.training.arguments import ModelArguments, PretrainArguments, set_horizon
from moe_param.training.data.packing import PackedDataset
from moe_param.training.data.text import DataArguments
from moe_param.tuning.loop import check_balancing, check_device, evaluate, learn
from moe_param.tuning.settings import ShortRun
from moe_param.tuning.text import batches, blocks_of, check_text, times_seen
from moe_param.tuning.workers import Watch

__all__ = ["Outcome", "ShortRun", "check_run", "short_run", "times_seen", "train"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    validation_loss: float  # inf for a run that left the finite numbers, NaN for one that was stopped
    training_loss: float  # mean over the last twentieth of the steps that were done
    seconds: float
    share: float = 1.0  # of the steps that were done
    stopped: bool = False  # by `watch`

    @property
    def diverged(self) -> bool:
        return self.validation_loss == math.inf


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
        optimizer=training.optimizer,
        matrix_lr_ratio=training.matrix_lr_ratio,
        init_std=model.init_std,
        constants=model.constants or None,  # type: ignore[arg-type]
        validation_blocks=data.validation_blocks,
        data=text or None,
        gradient_accumulation=horizon.batch // horizon.micro,
        balance_rate=training.balance_rate,
        balance_rule=training.balance_rule,
        inject_bias=training.inject_bias,
        experts=model.experts_implementation,
    )


def check_run(run: ShortRun) -> None:
    """All that can be wrong with the device, balancing and the text, found before the first run.

    Raises:
        MoeParamError: of any kind.
    """
    check_device(run)
    if note := check_balancing(run):
        logger.warning("%s", note)
    check_text(run)


def train(run: ShortRun, watch: Watch | None = None) -> Outcome:
    """Train, validate.

    Args:
        watch: called twenty times a run with (share of the steps done, mean training loss since the last call); where
            it returns False the run is stopped.
    """
    check_device(run)
    training, validation = blocks_of(run)
    with torch.cuda.device(run.device) if run.device.startswith("cuda") else contextlib.nullcontext():
        return _train(run, watch, training, validation)


def _train(run: ShortRun, watch: Watch | None, training: PackedDataset, validation: PackedDataset) -> Outcome:
    transformers.set_seed(run.seed)
    model, parameterization = build(run)
    optimizer = optimizer_for(run, model, parameterization)
    start = time.perf_counter()
    learned = learn(run, model, optimizer, batches(run, training), watch)
    loss = math.nan if learned.stopped else math.inf
    if not learned.stopped and math.isfinite(learned.loss):
        value = evaluate(run, model, validation)
        loss = value if math.isfinite(value) else math.inf
    return Outcome(loss, learned.loss, time.perf_counter() - start, learned.share, learned.stopped)


def build(run: ShortRun) -> tuple[PreTrainedModel, Parameterization]:
    """The model on its device, initialized by the rules."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**run.config))
    if run.device != "cpu":
        model.to(run.device)
    parameterization = moe_param.apply(
        model,
        AutoConfig.for_model(**run.base),
        spec=_spec(run.spec),
        init_std=run.init_std,
        constants=run.constants,
        seed=run.seed,
        experts=run.experts or ("auto" if run.device != "cpu" else None),
    )
    if run.experts is None and run.device == "cpu" and any(is_experts(module) for module in model.modules()):
        model.set_experts_implementation("grouped_mm")
    return model, parameterization


def optimizer_for(run: ShortRun, model: PreTrainedModel, parameterization: Parameterization) -> torch.optim.Optimizer:
    return parameterization.optimizer(
        model,
        optimizer=run.optimizer,
        lr=run.lr,
        eps=run.eps,
        betas=run.betas,
        weight_decay=run.weight_decay,
        matrix_lr_ratio=run.matrix_lr_ratio,
        fused=True,
    )


@functools.cache
def _spec(name: str) -> ScalingSpec:
    """Read once in a process: it takes longer than all else that `apply` does to a small model."""
    return ScalingSpec.load(name)
