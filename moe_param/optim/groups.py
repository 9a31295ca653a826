"""Optimizer groups: which parameters share which numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from moe_param.errors import MoeParamError
from moe_param.optim.adam import DEFAULT_EPS, OptimizerError
from moe_param.scaling.horizon import TOKENS_EXPONENT, HorizonFactors, horizon_factors

if TYPE_CHECKING:
    from moe_param.scaling.rules import Rule

DECAYS = ("independent", "ema", "none")
"""Conventions of weight decay by name; see `param_groups`."""

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """The name a parameter had before DDP, torch.compile, FSDP or checkpoint wrappers put theirs in front."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def check_adapters(model: torch.nn.Module, error: type[MoeParamError]) -> None:
    """Raises `error` where PEFT has put adapters into a model, wrapped or not."""
    flags = ("peft_config", "_hf_peft_config_loaded")
    if any(getattr(module, flag, False) for module in model.modules() for flag in flags):
        raise error(
            f"{type(model).__name__} has PEFT adapters, for which there is no rule: PEFT freezes the base weights, and "
            "LoRA weights have no counterpart at a base. Parameterize the base model before it is wrapped, and give "
            "the adapters a learning rate of PEFT's own kind (e.g. peft.optimizers.create_loraplus_optimizer)"
        )


def trained(rules: Mapping[str, Rule], model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter, Rule]]:
    """Name, parameter and rule of all that is optimized in `model`.

    A parameter that has a rate and is frozen now is left out: training a part of a model is fine.

    Raises:
        OptimizerError: a parameter without a rule, a rule without its parameter, or a parameter that requires a
            gradient though its rule says that it is not trained (built frozen, unfrozen later).
    """
    found, unknown, seen = [], [], set()
    for full_name, parameter in model.named_parameters():
        name = plain_name(full_name)
        rule = rules.get(name)
        seen.add(name)
        if rule is None:
            unknown.append(full_name)
        elif parameter.requires_grad and rule.role != "selection_bias":  # balancing moves it; loading lets it "train"
            found.append((name, parameter, rule))
    missing = sorted(set(rules) - seen)
    if unknown or missing:
        check_adapters(model, OptimizerError)
        raise OptimizerError(
            f"the model is not the one that was parameterized: no rule for {unknown[:5] or 'none'}, "
            f"no parameter for {missing[:5] or 'none'}"
        )
    thawed = [name for name, _, rule in found if not rule.lr]
    if thawed:
        raise OptimizerError(
            f"no rate for {thawed[:5]}: the model's class builds {len(thawed)} parameters frozen, and now they require "
            "a gradient. Freeze them again (requires_grad_(False)), or have the class build them trainable, which is "
            "where apply looks"
        )
    return found


def mesh_of(tensor: torch.Tensor) -> Any:
    """The device mesh a tensor is sharded over; foreach operations take tensors of one mesh at a time."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def param_groups(
    rules: Mapping[str, Rule],
    model: torch.nn.Module,
    *,
    lr: float,
    eps: float = DEFAULT_EPS,
    weight_decay: float = 0.0,
    decay: str = "independent",
    steps: int | None = None,
    base_steps: int | None = None,
    batch_ratio: float = 1.0,
    tokens_ratio: float = 1.0,
    tokens_exponent: float = TOKENS_EXPONENT,
    betas: tuple[float, float] | None = None,
    matrix_lr_ratio: float = 1.0,
    matrix_roles: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Adam groups: parameters with equal factors share a group; the group that Trainer logs (the first) has ratio 1.

    Args:
        rules: name -> Rule. Names decide, so wrapped (DDP, compile) and sharded (FSDP2) models work.
        model: the model that is trained.
        lr, eps, weight_decay: the base model's numbers. ε is the paper's by default, not torch's 1e-8.
        betas: the base's. Given, groups hold them, and those of the optimizer's constructor do not count; left out, the
            constructor's do, which for torch are (0.9, 0.999) unless you say otherwise.
        decay: what of weight decay stays constant, in every group and at every scale: "independent": lr·λ, the
            shrinkage of a step. "ema": lr·λ·steps, the shrinkage of the run, whose inverse is the share of the run
            that weights average over (arXiv:2405.13698). "none": there is none, as in arXiv:2601.20205.
        steps, base_steps: of this run and of the base's; for "ema" and only there.
        batch_ratio, tokens_ratio: tokens per step and tokens of the run over the base's; 1 is off. They scale lr, eps,
            betas, and with "independent" also weight decay, by `moe_param.scaling.horizon.horizon_factors`.
        tokens_exponent: lr ∝ tokens^−this; 0, the paper's finding, leaves everything as it is along tokens.
        matrix_roles: roles whose matrices `moe_param.optim.muon.Muon` makes orthogonal; their groups hold `matrices`.
        matrix_lr_ratio: the base's rate of those over lr.

    Returns:
        Groups with `params`, `names` (in the same order), `lr`, `eps`, `weight_decay` and, if given, `betas`.

    Raises:
        OptimizerError: a model that is not the one parameterized (see `trained`), numbers out of range.
        HorizonError: ratios that the square root rules do not cover.
    """
    horizon, factor = check_numbers(
        lr=lr,
        eps=eps,
        betas=betas,
        weight_decay=weight_decay,
        decay=decay,
        steps=steps,
        base_steps=base_steps,
        batch_ratio=batch_ratio,
        tokens_ratio=tokens_ratio,
        tokens_exponent=tokens_exponent,
    )
    weight_decay *= factor
    groups: dict[Any, dict[str, Any]] = {}
    orthogonal: dict[Any, dict[str, Any]] = {}
    for name, parameter, rule in trained(rules, model):
        if rule.role in matrix_roles and len(rule.shape) > 1:
            _add_matrices(orthogonal, name, parameter, rule, bool(weight_decay))
            continue
        factors = tuple(float(f"{x:.12g}") for x in (rule.lr, rule.eps, rule.weight_decay if weight_decay else 0.0))
        group = groups.setdefault((factors, mesh_of(parameter)), {"params": [], "names": [], "factors": factors})
        group["params"].append(parameter)
        group["names"].append(name)
    ordered = sorted(groups.values(), key=lambda g: (g["factors"][0] != 1.0, g["factors"][1] != 1.0))
    for group in ordered:
        lr_factor, eps_factor, decay_factor = group.pop("factors")
        group.update(
            lr=lr * horizon.lr * lr_factor,
            eps=eps * horizon.eps * eps_factor,
            weight_decay=weight_decay * decay_factor,
        )
        if betas is not None:
            group["betas"] = horizon.betas(betas)
    for group in orthogonal.values():
        factor, decayed = group.pop("factors")
        group["lr"] = lr * matrix_lr_ratio * horizon.lr * factor
        group.update(eps=eps, weight_decay=weight_decay / factor if decayed else 0.0)
        if betas is not None:
            group["betas"] = betas
    return [*ordered, *orthogonal.values()]


def _add_matrices(groups: dict[Any, Any], name: str, parameter: torch.nn.Parameter, rule: Rule, decay: bool) -> None:
    """Puts a parameter into the group of its rate; the group's is that of its first part.

    Raises:
        OptimizerError: there is no rule for it, or it is not known which matrices it holds.
    """
    if rule.muon is None or rule.matrices is None:
        why = (
            rule.no_muon or "the rules were recorded by an older version: apply(model, base, reinit=False) renews them"
        )
        raise OptimizerError(
            f"{name} ({rule.role}) cannot be made orthogonal: {why}. Leave its role to Adam (adam_roles)"
        )
    factor = float(f"{rule.muon[0]:.12g}")
    scales = [float(f"{part / rule.muon[0]:.12g}") for part in rule.muon]
    key = factor, decay and bool(rule.weight_decay), mesh_of(parameter)
    group = groups.setdefault(key, {"params": [], "names": [], "matrices": [], "factors": key[:2]})
    group["params"].append(parameter)
    group["names"].append(name)
    group["matrices"].append({**asdict(rule.matrices), "parts": list(rule.matrices.parts), "scales": scales})


def check_numbers(
    *,
    lr: float,
    eps: float,
    betas: tuple[float, float] | None,
    weight_decay: float,
    decay: str,
    steps: int | None,
    base_steps: int | None,
    batch_ratio: float,
    tokens_ratio: float,
    tokens_exponent: float,
) -> tuple[HorizonFactors, float]:
    """The factors of batch and tokens, and the one on weight decay that all groups share. Errors as there."""
    try:
        valid = 0 < lr < math.inf and 0 <= eps < math.inf and 0 <= weight_decay < math.inf
        valid = valid and (betas is None or (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)))
    except TypeError:
        valid = False
    if not valid:
        raise OptimizerError(
            "lr must be > 0, eps and weight_decay ≥ 0, betas two numbers from 0 to below 1: "
            f"got lr {lr!r}, eps {eps!r}, weight_decay {weight_decay!r}, betas {betas!r}"
        )
    horizon = horizon_factors(batch_ratio, tokens_ratio, tokens_exponent=tokens_exponent)
    if horizon.beta != 1.0 and betas is None:
        raise OptimizerError(
            f"batch_ratio {batch_ratio:g} and tokens_ratio {tokens_ratio:g} scale Adam's betas too: "
            "give betas, the base's"
        )
    return horizon, _decay_factor(decay, weight_decay, steps, base_steps, horizon, tokens_ratio / batch_ratio)


def _decay_factor(
    decay: str, weight_decay: float, steps: int | None, base_steps: int | None, horizon: HorizonFactors, ratio: float
) -> float:
    """The factor on λ that all groups share; each group's own, 1 / (its factor on lr), is in its rule."""
    if decay not in DECAYS:
        raise OptimizerError(f"decay {decay!r} is not a convention: choose one of {', '.join(DECAYS)}")
    if decay == "none" and weight_decay:
        raise OptimizerError(f"decay 'none' with weight_decay {weight_decay:g}: set it to 0, or choose another decay")
    if decay != "ema":
        if steps is not None or base_steps is not None:
            raise OptimizerError(f"steps and base_steps belong to decay 'ema'; decay {decay!r} does not use them")
        return horizon.weight_decay
    if not steps or not base_steps or steps < 0 or base_steps < 0:
        raise OptimizerError(
            "decay 'ema' keeps lr·λ·steps constant and needs steps (of this run) and base_steps (of the run that "
            f"weight_decay was found on), both positive: got steps {steps}, base_steps {base_steps}"
        )
    if ratio != 1.0 and not math.isclose(steps / base_steps, ratio, rel_tol=0.05):
        raise OptimizerError(
            f"tokens_ratio / batch_ratio = {ratio:g} is the ratio of steps, but steps / base_steps = "
            f"{steps / base_steps:g}: one of the four is wrong"
        )
    return base_steps / steps / horizon.lr
