"""Which optimizers the rules hold for, and Adam's numbers at the base: given, tuned, or our defaults."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moe_param.errors import MoeParamError
from moe_param.naming import check_known
from moe_param.optim.muon import Muon
from moe_param.structure.adapters import MATRICES

if TYPE_CHECKING:
    from moe_param.tuned import TunedNumbers

DEFAULT_EPS = 1e-12
"""ε at the base where nobody says another (arXiv:2601.20205, training settings). torch's own 1e-8 is of the size of
real gradients: Adam's update then depends on their length, and numbers found with one ε do not hold with the other."""

DEFAULT_BETAS = (0.9, 0.95)
"""β1 and β2 at the base where nobody says others (arXiv:2601.20205, training settings); torch's are (0.9, 0.999)."""

ADAMS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "muon": Muon}
"""Optimizers by name. The rules fold multipliers into Adam's update, which does not depend on the gradient's length;
neither does Muon's."""


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
    if optimizer is torch.optim.Muon:
        raise OptimizerError(
            "torch.optim.Muon takes two-dimensional weights only, and scales its updates in ways that do not transfer "
            "across width: say optimizer='muon', which is torch's at the base"
        )
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


ADAM_ROLES = ("router",)
"""Roles of matrices that Adam trains beside Muon unless one says otherwise. Public recipes have routers on either."""


def matrix_numbers(
    optimizer_class: type[torch.optim.Optimizer],
    matrix_lr_ratio: float | None,
    adam_roles: Collection[str],
    batch_ratio: float,
) -> dict[str, Any]:
    """What `param_groups` is told of matrices: nothing for Adam.

    Raises:
        OptimizerError: a rate that is none, or one though the optimizer is Adam; a role that has no matrices; another
            batch than the base's, for which Muon has no rule.
    """
    if not issubclass(optimizer_class, Muon):
        if matrix_lr_ratio is not None:
            raise OptimizerError(
                f"matrix_lr_ratio is {matrix_lr_ratio}: only optimizer='muon' has a rate for matrices, leave it out"
            )
        if tuple(adam_roles) != ADAM_ROLES:
            raise OptimizerError(f"adam_roles are {tuple(adam_roles)}: only optimizer='muon' leaves roles to Adam")
        return {}
    check_known(adam_roles, MATRICES, "role", "adam_roles", OptimizerError)
    ratio = 1.0 if matrix_lr_ratio is None else matrix_lr_ratio
    if not 0 < ratio < math.inf:
        raise OptimizerError(
            f"matrix_lr_ratio is {ratio}: expected a number above 0, the base's rate of matrices over lr"
        )
    if batch_ratio != 1.0:
        raise OptimizerError(
            f"batch_ratio is {batch_ratio:g}: how Muon's rate and momentum change with the batch is not known. Keep "
            "the base's batch, or tune with this one"
        )
    return {"matrix_lr_ratio": ratio, "matrix_roles": [role for role in MATRICES if role not in adam_roles]}


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
