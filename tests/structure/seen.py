"""What the trace sees of a few lines of torch, and whether what it claims of them is so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe_param.structure import trace as tracing
from moe_param.structure.adapters import Adapter
from moe_param.structure.flow import Activation, Flow
from moe_param.structure.observations import Trace
from moe_param.structure.operations import Call

Lines = Callable[..., Any]
"""(p, x, …) -> tensor, where p has the parameters as attributes and x, … are made of the tokens."""


@dataclass
class Seen:
    """The flow of the result, what was observed on the way and the operations that carried something."""

    flow: Any
    trace: Trace
    ops: list[str]


def seen(lines: Lines, parameters: Mapping[str, Tensor], *inputs: Tensor, start: Flow | None = None) -> Seen:
    """Runs some lines on fake tensors as a model is run. The inputs flow as `start` says (an activation by default)."""
    ops: list[str] = []
    handle = tracing.result_of

    def listen(call: Call) -> Flow:
        ops.append(call.op)
        return handle(call)

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as fakes:
        module = nn.Module()
        for name, value in parameters.items():
            module.register_parameter(name, nn.Parameter(fakes.from_tensor(value, static_shapes=True)))
        watcher = tracing.Watcher(module, Adapter())
        watcher.trace.shapes.update({name: tuple(value.shape) for name, value in parameters.items()})
        given = [fakes.from_tensor(x, static_shapes=True) for x in inputs]
        for x in given:
            watcher.set(x, Activation() if start is None else start)
        tracing.result_of = listen
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), watcher:
                out = lines(SimpleNamespace(**dict(module.named_parameters())), *given)
        finally:
            tracing.result_of = handle
        return Seen(watcher.flow(out), watcher.trace, ops)


def run(lines: Lines, parameters: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
    """The same lines for real."""
    with torch.no_grad():
        return lines(
            SimpleNamespace(**{name: p.clone() for name, p in parameters.items()}), *(x.clone() for x in inputs)
        )


def is_homogeneous(
    lines: Lines,
    parameters: Mapping[str, Tensor],
    names: set[str],
    degree: float,
    *inputs: Tensor,
    offset: bool = False,
) -> bool:
    """Whether the named parameters, scaled by c together, scale the result by c**degree. offset: not w but 1 + w is
    scaled."""
    shift = 1.0 if offset else 0.0
    before = run(lines, parameters, *inputs)
    for c in (3.0, 0.25):
        scaled = {n: (p + shift) * c - shift if n in names else p for n, p in parameters.items()}
        if not torch.allclose(run(lines, scaled, *inputs), c**degree * before, rtol=1e-9, atol=1e-12):
            return False
    return True
