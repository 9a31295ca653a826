"""The loop of a short run: forward, backward, optimizer, balancing, and a look at the loss twenty times a run."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_param.balancing.balancer import LoadBalancer
from moe_param.errors import InputError
from moe_param.training.balance import Balance, balance_of
from moe_param.training.data.packing import PackedDataset
from moe_param.tuning.settings import ShortRun
from moe_param.tuning.workers import Watch

LOOKS = 20
"""Times in a run that the loss is looked at; nothing waits for the device in between."""
VALIDATION_BATCH = 32


@dataclass(frozen=True)
class Learned:
    """What the steps came to. loss: mean of the training losses since the look before the last."""

    loss: float
    share: float
    stopped: bool


def learn(
    run: ShortRun,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[torch.Tensor],
    watch: Watch | None,
) -> Learned:
    """All steps, or those until the loss is no finite number or `watch` says that it is enough."""
    factor, rates = schedule_of(run), [group["lr"] for group in optimizer.param_groups]
    looks = {math.ceil(run.steps * look / LOOKS) for look in range(1, LOOKS + 1)}
    balancer = balancer_for(run, model)
    device, precision, options = model.device, precision_of(run), options_of(model)
    part = torch.tensor(1 / run.gradient_accumulation, device=device)
    total, before = torch.zeros((), device=device), 0
    model.train()
    for step in range(1, run.steps + 1):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * factor(step - 1)
        for _ in range(run.gradient_accumulation):
            ids = on(device, next(batches))
            with precision():
                loss = model(input_ids=ids, labels=ids, **options).loss
            loss.backward(part)
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if balancer is not None:
            balancer.step()
        if step in looks:
            mean = total.item() / ((step - before) * run.gradient_accumulation)
            if not math.isfinite(mean):
                return Learned(mean, step / run.steps, stopped=False)
            go_on = watch is None or watch(step / run.steps, mean)
            if not go_on and step < run.steps:
                return Learned(mean, step / run.steps, stopped=True)
            total.zero_()
            before = step
    if balancer is not None:
        balancer.stop()
    return Learned(mean, 1.0, stopped=False)


@torch.no_grad()
def evaluate(run: ShortRun, model: PreTrainedModel, validation: PackedDataset) -> float:
    """The mean loss over the held-out blocks, which are equally long."""
    model.eval()
    precision, options = precision_of(run), options_of(model)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for start in range(0, len(validation), VALIDATION_BATCH):
        ids = on(model.device, validation.batch(range(start, min(start + VALIDATION_BATCH, len(validation)))))
        with precision():
            total += model(input_ids=ids, labels=ids, **options).loss * len(ids)
    return total.item() / len(validation)


def options_of(model: PreTrainedModel) -> dict[str, bool]:
    """No cache of keys and values, which most configs ask for and only generation reads; Trainer has none either."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def schedule_of(run: ShortRun) -> Callable[[int], float]:
    """The factor on all learning rates after so many steps: transformers' own, which asks for an optimizer."""
    anything = torch.optim.AdamW([torch.zeros(1)], lr=run.lr)
    schedule: Any = transformers.get_scheduler(
        run.schedule,
        anything,
        num_warmup_steps=round(run.steps * run.warmup),
        num_training_steps=run.steps,
        scheduler_specific_kwargs=run.schedule_options,
    )
    found: Callable[[int], float] = schedule.lr_lambdas[0]
    return found


# -- balancing -------------------------------------------------------------------------------------------------------
def balancer_for(run: ShortRun, model: PreTrainedModel) -> LoadBalancer | None:
    """As `moe-param train` balances, but for what it would only count: a short run has nowhere to show it."""
    rate = _balance(json.dumps(run.config), run.balance_rate, run.inject_bias).rate
    rule: Any = run.balance_rule
    return LoadBalancer(model, rate=rate, rule=rule, inject=run.inject_bias) if rate else None


@functools.cache  # every run of a search has the same answer
def _balance(config: str, rate: float | None, inject: bool) -> Balance:
    return balance_of(_without_memory(json.loads(config)), rate, inject)


def check_balancing(run: ShortRun) -> str:
    """What the user should know of it, empty mostly.

    Raises:
        MoeParamError: balancing was asked for, and cannot be.
    """
    balancer_for(run, _without_memory(run.config))
    return _balance(json.dumps(run.config), run.balance_rate, run.inject_bias).note


def _without_memory(config: dict[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return model


# -- the device ------------------------------------------------------------------------------------------------------
def check_device(run: ShortRun) -> None:
    """That the run's device is there, and computes in its dtype.

    Raises:
        InputError: naming the devices that are there.
    """
    there = ["cpu"]
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        there += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    if run.device not in there:
        raise InputError(f"device is {run.device!r}: there is no such device here, only {', '.join(there)}")
    if run.dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype is {run.dtype!r}: expected float32, or bfloat16 (autocast over float32 weights)")
    if run.dtype == "bfloat16" and run.device.startswith("cuda") and not torch.cuda.is_bf16_supported(False):
        raise InputError(f"dtype is 'bfloat16', which {torch.cuda.get_device_name(run.device)} lacks: set 'float32'")


def precision_of(run: ShortRun) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The context of a forward pass."""
    if run.dtype == "float32":
        return contextlib.nullcontext
    return functools.partial(torch.autocast, torch.device(run.device).type, dtype=getattr(torch, run.dtype))


def on(device: torch.device, ids: torch.Tensor) -> torch.Tensor:
    """A batch on the device, without waiting for it."""
    if device.type == "cpu":
        return ids
    return (ids.pin_memory() if device.type == "cuda" else ids).to(device, non_blocking=True)
