"""Optimizer groups and the factory that `Trainer` calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from moe_param.rules import Rule

RATIO_BREAKING_SCHEDULES = ("reduce_lr_on_plateau", "ReduceLROnPlateau", "greedy", "GreedyLR")
"""Schedules that set learning rates by a floor or a probe per group, so that ratios between groups drift."""

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class OptimizerError(ValueError):
    """Groups that cannot be built for this model or with these numbers."""


def plain_name(name: str) -> str:
    """The name a parameter had before DDP, torch.compile, FSDP or checkpoint wrappers put theirs in front."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def param_groups(
    rules: Mapping[str, Rule],
    model: torch.nn.Module,
    *,
    lr: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Adam groups: parameters with equal factors share a group; the group that Trainer logs (the first) has ratio 1.

    Args:
        rules: name -> Rule. Names decide, so wrapped (DDP, compile) and sharded (FSDP2) models work.
        model: the model that is trained.
        lr, eps, weight_decay: the base model's numbers.

    Returns:
        Groups with `params`, `names` (in the same order), `lr`, `eps`, `weight_decay`. lr·weight_decay is the same in
        every decayed group, so that the shrinkage of a step does not depend on the scale.

    Raises:
        OptimizerError: a trainable parameter without a rule, a rule without its parameter, numbers out of range.
    """
    if not lr > 0 or not eps >= 0 or not weight_decay >= 0:
        raise OptimizerError(f"lr must be > 0, eps and weight_decay ≥ 0: got {lr}, {eps}, {weight_decay}")
    groups: dict[Any, dict[str, Any]] = {}
    unknown, seen = [], set()
    for full_name, parameter in model.named_parameters():
        name = plain_name(full_name)
        rule = rules.get(name)
        seen.add(name)
        if rule is None:
            unknown.append(full_name)
        elif parameter.requires_grad and rule.lr:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            factors = tuple(float(f"{x:.12g}") for x in (rule.lr, rule.eps, rule.weight_decay if weight_decay else 0.0))
            group = groups.setdefault((factors, mesh), {"params": [], "names": [], "factors": factors})
            group["params"].append(parameter)
            group["names"].append(name)
    missing = sorted(set(rules) - seen)
    if unknown or missing:
        raise OptimizerError(
            f"the model is not the one that was parameterized: no rule for {unknown[:5] or 'none'}, "
            f"no parameter for {missing[:5] or 'none'}"
        )
    ordered = sorted(groups.values(), key=lambda g: (g["factors"][0] != 1.0, g["factors"][1] != 1.0))
    for group in ordered:
        lr_factor, eps_factor, decay_factor = group.pop("factors")
        group.update(lr=lr * lr_factor, eps=eps * eps_factor, weight_decay=weight_decay * decay_factor)
    return ordered


def optimizer_factory(rules: Mapping[str, Rule], optimizer_class: type[torch.optim.Optimizer]) -> type:
    """A class that `Trainer(optimizer_cls_and_kwargs=(factory, kwargs))` instantiates and calls with the model.

    kwargs: `lr` (required), `eps`, `weight_decay` and whatever else `optimizer_class` takes (betas, fused, …). The
    model is the one being trained, so this works under FSDP2, where `Trainer(optimizers=…)` is refused.
    """

    class Factory:
        def __call__(
            self,
            model: torch.nn.Module,
            *,
            lr: float,
            eps: float = 1e-8,
            weight_decay: float = 0.0,
            **kwargs: Any,
        ) -> torch.optim.Optimizer:
            groups = param_groups(rules, model, lr=lr, eps=eps, weight_decay=weight_decay)
            return optimizer_class(groups, lr=lr, eps=eps, weight_decay=weight_decay, **kwargs)  # type: ignore[call-arg]

    Factory.__name__ = f"{optimizer_class.__name__}Factory"
    return Factory


def check_schedule(name: str) -> None:
    """Refuses learning-rate schedules that would change the ratios between groups.

    Raises:
        OptimizerError: for ReduceLROnPlateau and Greedy, by the name transformers gives them.
    """
    name = str(getattr(name, "value", name))  # transformers' SchedulerType is an enum
    if name in RATIO_BREAKING_SCHEDULES:
        raise OptimizerError(
            f"the schedule {name} sets each group's learning rate by itself, so the ratios between groups, which are "
            "the parameterization, would drift: use a multiplicative schedule (constant, linear, cosine, wsd)"
        )
