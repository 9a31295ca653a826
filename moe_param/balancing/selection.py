"""Selection biases of routers that have none of their own: a small module under the router.

Being a module with a buffer, the bias is in every state dict, so in every save that the model, a Trainer or torch makes
of it; it moves and is copied with the model; and it stays in float32 where the model is cast. The config names the
routers, because transformers drops what it does not know: `require_selection_biases` tells when that has happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_param.balancing.gates import Gate, checked
from moe_param.errors import MoeParamError
from moe_param.optim.groups import plain_name

CONFIG = "moe_param_selection_biases"
"""The entry of the config: names of the routers with an injected bias."""
KEY = "selection.bias"
"""The bias in the state dict of its router."""


class BalanceError(MoeParamError):
    """A model that cannot be balanced as asked, or saved biases that do not belong to it."""


class Selection(nn.Module):
    """How one router selects: its own gate, with a bias (num_experts,) in float32 added to the scores."""

    bias: torch.Tensor

    def __init__(self, gate: Gate, num_experts: int, device: torch.device) -> None:
        super().__init__()
        self.gate = gate
        self.register_buffer("bias", torch.zeros(num_experts, device=device))

    def forward(self, logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights in `dtype`, indices) from logits (tokens, num_experts)."""
        return self.gate.route(logits, self.bias.to(logits.device), dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Selection:
        """Follows the model to its device, not to its dtype: in bfloat16 small steps of a bias would be lost."""
        exact = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != exact.dtype:
            self.bias = exact.to(self.bias.device)
        return self


def _select(router: nn.Module, args: Any, out: Any) -> Any:
    """The forward hook of a router with a `Selection`."""
    logits, weights, *_ = checked(out)
    selection: Any = router.selection
    return (logits, *selection(logits, weights.dtype))


def selection_of(router: nn.Module) -> Selection | None:
    found = getattr(router, "selection", None)
    return found if isinstance(found, Selection) else None


def place(model: PreTrainedModel, gates: dict[str, tuple[nn.Module, Gate, int]]) -> None:
    """Gives routers a selection bias of zero, where they have none yet, and names them in the config.

    Args:
        gates: by name of the router, the router itself, its gate and its number of experts.
    """
    for router, gate, num_experts in gates.values():
        if selection_of(router) is None:
            router.selection = Selection(gate, num_experts, next(router.parameters()).device)
            router.register_forward_hook(_select)
    if gates:
        setattr(model.config, CONFIG, list(gates))


def take_away(model: PreTrainedModel) -> None:
    """Undoes `place`: a plain model, and a plain config."""
    for module in model.modules():
        if selection_of(module) is not None:
            del module.selection
            for number in [n for n, hook in module._forward_hooks.items() if hook is _select]:
                del module._forward_hooks[number]
    if hasattr(model.config, CONFIG):
        delattr(model.config, CONFIG)


def named_routers(model: PreTrainedModel) -> list[str]:
    """The routers that the config says have an injected bias, as this model names them (with or without a head)."""
    modules = {plain_name(name) for name, _ in model.named_modules()}
    return [
        next((name for name in spellings(model, saved) if name in modules), saved)
        for saved in getattr(model.config, CONFIG, None) or []
    ]


def spellings(model: PreTrainedModel, name: str) -> tuple[str, str, str]:
    """A name as it is in this model, and in the same model without and with a head around it."""
    prefix = model.base_model_prefix + "."
    return name, name.removeprefix(prefix), prefix + name


def require_selection_biases(model: PreTrainedModel) -> None:
    """That a loaded model has the biases it was trained with.

    Raises:
        BalanceError: the config names selection biases and the model, loaded by plain transformers, lacks them.
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    lost = [name for name in named_routers(model) if name not in modules or selection_of(modules[name]) is None]
    if lost and model.config.name_or_path:  # of a model that was built afresh nothing is lost
        raise BalanceError(
            f"{model.config.name_or_path} was trained with selection biases in {len(lost)} routers ({lost[0]}, …). "
            "from_pretrained leaves them out, and without them this model computes something else: call "
            "moe_param.load_selection_biases(model). Where the weights are new, or to go on without the biases: "
            f"del model.config.{CONFIG}"
        )
