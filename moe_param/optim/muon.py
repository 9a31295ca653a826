"""Muon for the matrices of a model and AdamW for the rest, as one optimizer: one state, one schedule, one checkpoint.

Muon (Keller Jordan's, https://kellerjordan.github.io/posts/muon/, as `torch.optim.Muon` has it) makes the momentum of a
matrix orthogonal before it is added. What is a matrix is not what is a tensor: experts lie in stacks, gate and up in
one tensor (`moe_param.structure.matrices`). Each is made orthogonal by itself, and those of one shape at once, over
experts and layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_param.structure.matrices import Matrices

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton–Schulz iteration, Keller Jordan's: the slope at 0 is as large as can be."""

MOMENTUM, STEPS, EPS = 0.95, 5, 1e-7
"""torch's own defaults."""

AT_ONCE = 2**27
"""Elements of updates from which on a batch is full: half a gigabyte in float32."""


def working_dtype(matrices: torch.Tensor) -> torch.dtype:
    """What the iteration is computed in: bfloat16 as torch's, which is fast on accelerators and accurate enough. On a
    CPU it is float32, which is many times faster where that has no units for bfloat16; float64 stays."""
    if matrices.dtype == torch.float64:
        return torch.float64
    return torch.float32 if matrices.device.type == "cpu" else torch.bfloat16


def orthogonalized(
    matrices: torch.Tensor, steps: int = STEPS, eps: float = EPS, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """U·S'·Vᵀ for U·S·Vᵀ, all singular values near 1, by Newton–Schulz.

    Args:
        matrices: (copies, rows, columns), in any dtype.
        dtype: to compute in; by default `working_dtype`.

    Returns:
        The same shape, in the dtype it was computed in.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype or working_dtype(matrices))
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon where a group says `matrices`, AdamW where it does not.

    Args:
        params: groups as `moe_param.optim.groups.param_groups` makes them. One with `matrices` holds, for each of its
            parameters, how its matrices lie (the fields of `Matrices`) and `scales`, the factor on the group's rate for
            each part.
        lr, betas, eps, weight_decay: as torch's AdamW; `weight_decay` is decoupled in both kinds of groups.
        momentum, nesterov, ns_steps: as `torch.optim.Muon`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        *,
        momentum: float = MOMENTUM,
        nesterov: bool = True,
        ns_steps: int = STEPS,
        **adam: Any,
    ) -> None:
        nothing = torch.zeros(())
        self._adam = torch.optim.AdamW([nothing], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **adam)
        muon = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "matrices": None}
        super().__init__(params, {**self._adam.defaults, **muon})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._matrices([group for group in self.param_groups if group["matrices"] is not None])
        self._adam.param_groups = [group for group in self.param_groups if group["matrices"] is None]
        self._adam.state = self.state
        self._adam.step()
        return loss

    def _matrices(self, groups: list[dict[str, Any]]) -> None:
        """Every matrix, in batches that bound the memory: a batch has its updates, whole, and copies to iterate on."""
        batch: list[tuple[Any, ...]] = []
        elements = 0
        for update in (update for group in groups for update in self._updates(group)):
            batch.append(update)
            elements += update[1].numel()
            if elements >= AT_ONCE:
                _apply(batch)
                batch, elements = [], 0
        _apply(batch)

    def _updates(self, group: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        """(parameter, its whole update, [(view of it, rate)] of its parts, steps of Newton–Schulz) of what has a
        gradient; momentum and decay are done."""
        for parameter, layout in zip(group["params"], group["matrices"], strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            momentum = state["momentum_buffer"]
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum.clone()
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            full = update.full_tensor() if isinstance(update, DTensor) else update
            matrices = matrices_of(layout)
            rates = [group["lr"] * scale for scale in layout["scales"]]
            yield parameter, full, list(zip(matrices.views(full), rates, strict=True)), group["ns_steps"]


def _apply(updates: list[tuple[Any, ...]]) -> None:
    """All matrices of one shape at once, then each parameter its update."""
    shapes: dict[Any, list[tuple[torch.Tensor, float]]] = {}
    for _, full, parts, steps in updates:
        for view, rate in parts:
            shapes.setdefault((view.shape[1:], full.dtype, full.device, steps), []).append((view, rate))
    for (*_, steps), members in shapes.items():
        done = orthogonalized(torch.cat([view for view, _ in members]), steps)
        for (view, rate), piece in zip(members, done.split([len(view) for view, _ in members])):
            view.copy_(piece).mul_(-rate)
    for parameter, full, *_ in updates:
        parameter.add_(_like(full, parameter))


def matrices_of(layout: dict[str, Any]) -> Matrices:
    """Of what a group says of one parameter; a checkpoint may have made lists of tuples."""
    fields: dict[str, Any] = {name: value for name, value in layout.items() if name != "scales"}
    return Matrices(**{**fields, "parts": tuple(fields["parts"])})


def _like(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return full
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
