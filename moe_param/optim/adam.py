"""Which optimizers the rules hold for, and Adam's numbers at the base: given, tuned, or our defaults."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_param.errors import MoeParamError

if TYPE_CHECKING:
    from moe_param.tuned import TunedNumbers

DEFAULT_EPS = 1e-12
"""ε at the base where nobody says another (arXiv:2601.20205, training settings). torch's own 1e-8 is of the size of
real gradients: Adam's update then depends on their length, and numbers found with one ε do not hold with the other."""

DEFAULT_BETAS = (0.9, 0.95)
"""β1 and β2 at the base where nobody says others (arXiv:2601.20205, training settings); torch's are (0.9, 0.999)."""

ADAMS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
"""Optimizers by name. The rules fold multipliers into Adam's update, which does not depend on the gradient's length."""


class OptimizerError(MoeParamError):
    """An optimizer or groups that cannot be built for this model or with these numbers."""


@dataclass(frozen=True)
class AdamNumbers:
    """The base model's numbers, all decided. decay: see `moe_param.optim.groups.param_groups`."""

    lr: float
    eps: float
    betas: tuple[float, float]
    weight_decay: float
    decay: str


def adam_numbers(
    tuned: TunedNumbers | None,
    *,
    lr: float | None = None,
    eps: float | None = None,
    betas: tuple[float, float] | None = None,
    weight_decay: float | None = None,
    decay: str | None = None,
) -> AdamNumbers:
    """Each number as it is given, else as it was tuned at the base, else our default; a rate has none.

    Raises:
        OptimizerError: no learning rate, neither given nor tuned.
    """

    def first(given: Any, field: str, default: Any) -> Any:
        found = getattr(tuned, field, None) if given is None else given
        return default if found is None else found

    lr = first(lr, "learning_rate", None)
    if lr is None:
        raise OptimizerError(
            "no learning rate: none was given and none was tuned. Give lr=, the base's, or parameterize from the file "
            "that tuning wrote: apply(model, 'tuned.yaml')"
        )
    if betas is None:
        betas = (first(None, "adam_beta1", DEFAULT_BETAS[0]), first(None, "adam_beta2", DEFAULT_BETAS[1]))
    return AdamNumbers(
        lr=lr,
        eps=first(eps, "adam_epsilon", DEFAULT_EPS),
        betas=betas,
        weight_decay=first(weight_decay, "weight_decay", 0.0),
        decay=first(decay, "decay", "independent"),
    )


def adam_class(optimizer: str | type[torch.optim.Optimizer], adam_like: bool = False) -> type[torch.optim.Optimizer]:
    """The class of that name, or the class itself if the rules hold for it.

    Args:
        optimizer: "adamw", "adam", or `torch.optim.AdamW`, `torch.optim.Adam` or what derives from them.
        adam_like: the caller's word that another class makes Adam's update with decoupled weight decay
            (bitsandbytes, apex, torchao, …).

    Raises:
        OptimizerError: anything else. SGD, RMSprop, Lion or Adafactor need rules that we do not have.
    """
    known = f"optimizer {optimizer!r} is not one that the rules hold for: {', '.join(map(repr, ADAMS))}"
    if isinstance(optimizer, str):
        if optimizer.lower() not in ADAMS:
            raise OptimizerError(f"{known}, or a class that derives from torch.optim.AdamW or Adam")
        return ADAMS[optimizer.lower()]
    if not isinstance(optimizer, type):
        raise OptimizerError(f"{known}, or a class, not an instance")
    if adam_like:
        missing = {"lr", "betas", "eps", "weight_decay"} - set(inspect.signature(optimizer).parameters)
        if missing:
            raise OptimizerError(
                f"adam_like=True says that {optimizer.__name__} makes Adam's update, but it takes no "
                f"{', '.join(sorted(missing))}"
            )
    elif not issubclass(optimizer, tuple(ADAMS.values())):
        raise OptimizerError(
            f"{optimizer.__name__} is not Adam: the rules fold multipliers into Adam's update and do not hold for "
            "others. Use torch.optim.AdamW, Adam or what derives from them; if it makes Adam's update with decoupled "
            "weight decay under another name, say adam_like=True"
        )
    return optimizer


def check_decoupled(optimizer_class: type[torch.optim.Optimizer], weight_decay: float, options: dict[str, Any]) -> None:
    """Refuses weight decay that is added to the gradient: Adam then normalizes it away, and lr·λ means nothing.

    Raises:
        OptimizerError: `torch.optim.Adam` with weight decay, unless options have decoupled_weight_decay=True.
    """
    coupled = issubclass(optimizer_class, torch.optim.Adam) and not issubclass(optimizer_class, torch.optim.AdamW)
    if weight_decay and coupled and not options.get("decoupled_weight_decay"):
        raise OptimizerError(
            f"{optimizer_class.__name__} adds weight_decay {weight_decay:g} to the gradient, which no rule scales: use "
            "'adamw', or weight_decay=0"
        )
