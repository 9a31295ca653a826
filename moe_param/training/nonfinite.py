"""Where a NaN began: the batch once more, with a look at everything on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_param.errors import MoeParamError


class NonFiniteError(MoeParamError, ArithmeticError):
    """Gradients or a loss that are not finite; the message names the first place where that is so."""


def _bad(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.is_floating_point() and not bool(local.detach().isfinite().all())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for v in value.values() for t in _tensors(v))
    elif isinstance(value, list | tuple):
        yield from (t for v in value for t in _tensors(v))


def first_nonfinite(model: nn.Module, losses: Iterable[Callable[[], torch.Tensor]]) -> tuple[int, str] | None:
    """The first parameter, module output or gradient that is not finite, in words; each loss is run anew.

    Parameters come first (they are the cause where they are bad), then outputs in the order of the forward pass, then
    gradients in the order of the backward pass. The number says which of these: where processes see different things,
    the smallest is nearest to the cause.
    """
    for name, parameter in model.named_parameters():
        if _bad(parameter):
            return 0, f"the parameter {name} holds non-finite values"
    model.zero_grad(set_to_none=True)
    outputs: list[str] = []
    gradients: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not outputs and _bad(tensor):
                    fed = any(_bad(t) for t in _tensors(args))
                    outputs.append(f"the output of {name} ({type(module).__name__})" + " from a bad input" * fed)
                if tensor.requires_grad and tensor.is_floating_point():
                    tensor.register_hook(lambda grad: gradients.append(name) if _bad(grad) else None)

        return hook

    # Leaves fire before the modules around them, so the first is the innermost.
    handles = [module.register_forward_hook(watch(name or "the model")) for name, module in model.named_modules()]
    try:
        with torch.compiler.set_stance("force_eager"):
            for loss in losses:  # all of them: other processes take part in each
                value = loss()
                value.backward()
                if _bad(value) and not outputs:
                    outputs.append("the loss")
    finally:
        for handle in handles:
            handle.remove()
    if outputs:
        return 1, f"{outputs[0]} is the first non-finite value of the forward pass"
    if gradients:
        return 2, f"the gradient that reaches the output of {gradients[0]} is the first non-finite one backward"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and _bad(parameter.grad):
            return 3, f"the gradient of {name} holds non-finite values"
    return None
