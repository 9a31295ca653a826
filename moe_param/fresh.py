"""Whether weights are as a model's construction left them, or were loaded or trained since."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from transformers import PreTrainedModel

from moe_param.init import RANDOM, local_part
from moe_param.structure.laws import InitLaw

SAMPLE = 2**14
"""Numbers looked at of a randomly initialized parameter, at most."""

_BUILT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What a model may have been built in and cast from since: 0.01 is another number in each."""


def loaded(model: PreTrainedModel, kept: Collection[str] = ()) -> str | None:
    """The first parameter outside of `kept` that came out of a checkpoint, by the mark `from_pretrained` leaves on it;
    None without one.

    A config that was read from the Hub leaves no such mark. A wrapper that makes new parameters (FSDP2) loses it.
    """
    marked = (n for n, p in model.named_parameters() if getattr(p, "_is_hf_initialized", False))
    return next((n for n in marked if n not in kept), None)


@torch.no_grad()
def departure(model: PreTrainedModel, laws: Mapping[str, InitLaw]) -> str | None:
    """In words, the first parameter whose values are not what its law gives; None where all could be.

    A constant must be that constant in every element, as some floating-point type has it: one step of training moves
    norms and biases, so trained weights are told by them. A random one must have the law's root mean square to 1% and
    six standard errors, over `SAMPLE` numbers without the zeros of padding. "special" and "kept" laws, empty shards and
    meta tensors are passed over. What was trained without moving either is not seen: a step in bfloat16 can round to
    nothing.
    """
    for name, parameter in model.named_parameters():
        law = laws[name]
        if parameter.is_meta or not parameter.is_floating_point() or law.kind in ("special", "kept"):
            continue
        values = local_part(parameter.detach())[0]
        if values.numel() == 0:
            continue
        if law.kind == "constant":
            if not any((values == torch.tensor(law.value, dtype=built).to(values.dtype)).all() for built in _BUILT):
                return f"{name} is not {law.value:g} everywhere"
        elif law.kind in RANDOM:
            sample = _sample(values)
            found, wanted = sample.square().mean().sqrt().item(), _rms(law)
            if not abs(found - wanted) <= wanted * (0.01 + 6 / math.sqrt(2 * max(1, sample.numel()))):
                return f"{name} has root mean square {found:.3g}, not {wanted:.3g}"
    return None


@torch.no_grad()
def trained(model: PreTrainedModel, laws: Mapping[str, InitLaw]) -> bool:
    """Whether a parameter that starts at one constant holds different values now."""
    found = (local_part(p.detach())[0] for n, p in model.named_parameters() if laws[n].kind == "constant")
    return any(
        values.numel() > 0 and not values.is_meta and bool((values != values.flatten()[0]).any()) for values in found
    )


def _sample(values: torch.Tensor) -> torch.Tensor:
    while values.dim() > 2:  # of experts, the last one
        values = values[-1]
    if values.dim() == 2:
        values = values[-max(1, SAMPLE // values.shape[1]) :]
    values = values.flatten()[:SAMPLE].double()
    return values[values != 0]


def _rms(law: InitLaw) -> float:
    """Standard deviation of a law, after truncation."""
    if law.kind != "trunc_normal" or not math.isfinite(law.bound):
        return law.std
    cut = law.bound / law.std
    density = math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi)
    return law.std * math.sqrt(1 - 2 * cut * density / math.erf(cut / math.sqrt(2)))
