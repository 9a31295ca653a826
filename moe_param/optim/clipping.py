"""Gradient clipping by a norm that means the same at every scale.

The norm of the whole gradient grows with the number of parameters and falls with the multipliers in front of them, so a
threshold found on the base clips the target always or never. Here each parameter's gradient is divided by the scale
that the parameterization expects of it (`Rule.eps`, which is what Adam's epsilon follows), and its elements are counted
as the base has them (`Rule.share`):

    norm² = Σ_p  share_p · ‖grad_p / eps_p‖²

At the base this is the plain global norm. All gradients are multiplied by the same number, so their direction stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_param.optim.adam import OptimizerError
from moe_param.optim.groups import mesh_of, trained

if TYPE_CHECKING:
    from moe_param.parameterization import Parameterization
    from moe_param.scaling.rules import Rule


@torch.no_grad()
def clip_grad_norm_(
    parameterization: Parameterization | Mapping[str, Rule], model: torch.nn.Module, max_norm: float
) -> torch.Tensor:
    """Scales all gradients of `model` down where their scale-free norm is above `max_norm`; returns the norm before.

    Call it where `torch.nn.utils.clip_grad_norm_` would stand. Wrapped and sharded models work; the host waits for
    nothing. `max_norm=inf` only measures. A norm that is not finite is returned as it is, and spreads to all gradients.

    Args:
        parameterization: what `apply` returned, or its rules.
        max_norm: the threshold, as found at the base.

    Raises:
        OptimizerError: a threshold that is not positive, a model that is not the one parameterized, no gradients, or
            rules from a record too old to know the base's numbers of elements.
    """
    _check_threshold(max_norm)
    rules = parameterization if isinstance(parameterization, Mapping) else parameterization.rules
    # One norm per mesh and weight: torch's own fused norm, and one reduction where gradients are sharded.
    groups: dict[Any, list[torch.nn.Parameter]] = {}
    for name, parameter, rule in trained(rules, model):
        if parameter.grad is None:
            continue
        if rule.share is None:
            raise OptimizerError(
                f"the rule of {name} does not say how many elements the base has: config.moe_param was written by an "
                "older moe_param. Make the rules anew: moe_param.apply(model, base_shape, reinit=False)"
            )
        weight = math.sqrt(rule.share) / rule.eps
        groups.setdefault((mesh_of(parameter.grad), float(f"{weight:.12g}")), []).append(parameter)
    if not groups:
        raise OptimizerError("no parameter has a gradient: clip after backward and before the optimizer's step")
    norms = []
    for (_, weight), parameters in groups.items():
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        norms.append(weight * (norm.full_tensor() if isinstance(norm, DTensor) else norm).float())
    total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    if max_norm < math.inf:
        for parameters in groups.values():
            clip_grads_with_norm_(parameters, max_norm, total)
    return total


def _check_threshold(max_norm: Any) -> None:
    if isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not max_norm > 0:
        raise OptimizerError(f"max_norm must be > 0 (inf only measures), got {max_norm!r}")


class ScaleFreeClipping(TrainerCallback):
    """`clip_grad_norm_` in a `Trainer`, before each optimizer step; logs `scale_free_grad_norm`.

    The norm is of the last step before the log, and before clipping. `max_norm=inf` only logs it, which is how a
    threshold is chosen on the base. Trainer's own clipping must be off (`max_grad_norm=0`); the `grad_norm` that
    Trainer logs by itself is the plain norm before clipping.
    """

    def __init__(self, parameterization: Parameterization | Mapping[str, Rule], max_norm: float) -> None:
        _check_threshold(max_norm)
        self.parameterization = parameterization
        self.max_norm = max_norm
        self.norm: torch.Tensor | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.max_grad_norm:
            raise OptimizerError(
                f"ScaleFreeClipping clips, and so would Trainer at max_grad_norm {args.max_grad_norm}: set it to 0"
            )
        if args.fp16 or args.deepspeed:
            raise OptimizerError(
                f"ScaleFreeClipping does not see {'unscaled' if args.fp16 else 'all'} gradients under "
                f"{'fp16: use bf16' if args.fp16 else 'DeepSpeed: use FSDP2'}"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.norm = clip_grad_norm_(self.parameterization, kwargs["model"], self.max_norm)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.norm is not None and logs is not None and "loss" in logs:
            logs["scale_free_grad_norm"] = state.log_history[-1]["scale_free_grad_norm"] = self.norm.item()
