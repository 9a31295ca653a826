"""How transformers itself initializes each parameter, seen while a model is being built on fake tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class InitLaw:
    """How transformers itself initializes a parameter.

    kind: "normal" (std), "uniform" (half-width `std`·√3 around 0, so that std means the same), "trunc_normal"
        (std before truncation, cut at ±bound), "constant" (value), "special" (anything else; left to transformers) or
        "kept" (whatever is there: of parameters that are left alone).
    tied: all along the first dimension, the experts of a stack, start with the same values.
    """

    kind: str
    std: float = 0.0
    value: float = 0.0
    bound: float = 0.0
    tied: bool = False


class InitWatcher(TorchDispatchMode):
    """Remembers the last initializer of every tensor while a model is being built.

    By identity, and the tensors are kept: constructors that move modules (`Module.to`) swap the contents of
    parameters, which torch refuses to where something holds a weak reference to one. The fake tensors' own mode holds
    some, to find the fake of a real tensor again, which nobody asks for here: they are dropped after every operation.
    """

    def __init__(self, fakes: FakeTensorMode) -> None:
        super().__init__()
        self.fakes = fakes
        self.laws: dict[int, tuple[torch.Tensor, InitLaw]] = {}

    def law(self, tensor: torch.Tensor) -> InitLaw | None:
        """The last initializer of a tensor, None where none was seen."""
        found = self.laws.get(id(tensor))
        return found[1] if found else None

    def remember(self, tensor: torch.Tensor, law: InitLaw) -> None:
        self.laws[id(tensor)] = (tensor, law)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = func is torch.ops.aten._local_scalar_dense.default
        if asked and self.law(args[0]) == InitLaw("beyond"):
            return False  # nothing is left beyond the bounds, so nothing is drawn again
        operands = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        if operands and not any(isinstance(a, FakeTensor) for a in operands):  # sizes that are computed with tensors
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self.fakes.fake_tensor_converter.tensor_memo.clear()
        op = func.overloadpacket.__name__
        if not args or not isinstance(args[0], torch.Tensor):
            return out
        values = [a for a in args[1:] if isinstance(a, (int, float))]
        before = self.law(args[0]) or InitLaw("")
        if op in ("mul", "div") and values:  # a copy at another scale, to be copied back
            factor = values[0] if op == "mul" else 1 / values[0]
            if before.kind in ("normal", "uniform"):
                self.remember(out, replace(before, std=before.std * abs(factor)))
            return out
        # torch 2.13 truncates by drawing again what is beyond the bounds
        if op in ("lt", "gt") and values and before.kind in ("normal", "trunc_normal"):
            self.remember(args[0], InitLaw("trunc_normal", std=before.std, bound=abs(float(f"{values[0]:.7g}"))))
            self.remember(out, InitLaw("beyond"))
        elif op in ("__or__", "bitwise_or", "any") and before.kind == "beyond":
            self.remember(out, before)
        if not op.endswith("_") or op == "__or__":
            return out
        if op == "normal_":
            law = InitLaw("normal", std=float(values[1] if len(values) > 1 else kwargs.get("std", 1.0)))
            if values and values[0] != 0:
                law = InitLaw("special")
        elif op == "uniform_":
            low, high = (*values, 0.0, 1.0)[:2] if values else (0.0, 1.0)
            law = InitLaw("uniform", std=(high - low) / 2 / math.sqrt(3)) if low == -high else InitLaw("special")
        elif op == "zero_":
            law = InitLaw("constant", value=0.0)
        elif op == "copy_":
            law = self.law(args[1]) or InitLaw("special")
        elif op == "fill_" and len(args) > 1 and isinstance(args[1], (int, float)):
            law = InitLaw("constant", value=float(args[1]))
        elif (op == "erfinv_" and before.kind == "uniform") or (
            op in ("mul_", "add_", "clamp_") and before.kind == "trunc_normal"
        ):
            law = _truncated(op, before, values, kwargs)
        else:
            law = InitLaw("special")
        self.remember(args[0], law)
        return out


def _truncated(op: str, before: InitLaw, values: list[float], kwargs: dict[str, Any]) -> InitLaw:
    """Before torch 2.13 `trunc_normal_` is uniform_, erfinv_, mul_(std·√2), add_(mean), clamp_(low, high)."""
    if op == "erfinv_":
        return InitLaw("trunc_normal", std=1 / math.sqrt(2))
    if op == "mul_":
        return InitLaw("trunc_normal", std=before.std * values[0])
    if op == "clamp_":
        high = values[1] if len(values) > 1 else kwargs.get("max", math.inf)
        return InitLaw("trunc_normal", std=before.std, bound=float(high))
    return before if not values or values[0] == 0 else InitLaw("special")
