"""What a router is, where its selection bias lives, and how to give it one.

A router is the module that hands an experts module its indices (`moe_param.structure.trace`); its output starts
(logits, weights, indices). Its selection bias is the frozen tensor of one number per expert that it or its block holds;
where there is none, its declared gate (`gates`) is repeated with a bias in the selection. Both are held against a small
copy of the router (`probe`), so that a router which does something else is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from moe_param.balancing.gates import Gate, OutputError, RoutingError, declared_gate
from moe_param.balancing.probe import Probe
from moe_param.balancing.selection import Selection, selection_of
from moe_param.optim.groups import plain_name
from moe_param.structure.adapters import adapter_for
from moe_param.structure.dispatch import is_experts
from moe_param.structure.observations import Router
from moe_param.structure.trace import _quiet, trace_model


@dataclass
class Route:
    """One routed layer of a model.

    module: the live router. num_experts: what it chooses from, experts that compute nothing included. owner, leaf:
    where its selection bias is (the tensor is looked up each time: FSDP2 replaces parameters), None without one.
    gate: how to repeat the routing with a bias, where one was injected or is asked for.
    fixed: why this router cannot be biased, empty where it can.
    """

    name: str
    module: nn.Module
    num_experts: int
    top_k: int
    owner: nn.Module | None = None
    leaf: str = ""
    gate: Gate | None = None
    fixed: str = ""

    @property
    def native(self) -> torch.Tensor | None:
        return None if self.owner is None else getattr(self.owner, self.leaf)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP and torch.compile wrappers."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        found = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if found is None:
            raise RoutingError(f"{type(model).__name__} is not a transformers model, nor a wrapper around one")
        inner = found
    return inner


@torch.enable_grad()  # gradients of gates are compared too, also where the caller has them off
def find_routes(model: PreTrainedModel, *, inject: bool = False) -> list[Route]:
    """The routed layers of a model, first to last; none of a dense one.

    Args:
        model: live; sharded (FSDP2), compiled or checkpoint-wrapped inside as may be.
        inject: find out how to bias routers that have no selection bias of their own.

    Raises:
        RoutingError: a block that routes by itself, without a router module; experts that differ in number.
        StructureError: the model cannot be traced.
    """
    # fully_shard gives a model an ad-hoc class of its own: the one below it can be built.
    cls = next(c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and not issubclass(c, FSDPModule))
    _, trace = trace_model(cls, model.config)
    live = {plain_name(name): module for name, module in model.named_modules()}
    with _quiet(), torch.device("meta"):
        skeleton = cls(copy.deepcopy(model.config))
    routes: list[Route] = []
    seen: dict[Any, Any] = {}
    for router in trace.routers:
        within = f"{router.experts}.".startswith(f"{router.module}.")
        if within or type(skeleton.get_submodule(router.module)) is nn.Linear:
            raise _by_itself(router)
        try:
            found = selection_of(live[router.module]) or _examine(skeleton, router, inject, seen)
        except OutputError:
            raise _by_itself(router) from None
        route = Route(router.module, live[router.module], router.among, router.top_k)
        if isinstance(found, str):
            route.fixed = found
        elif isinstance(found, Gate):
            route.gate = found
        elif isinstance(found, Selection):
            route.owner, route.leaf, route.gate = found, "bias", found.gate
        else:
            owner, _, route.leaf = found[0].rpartition(".")
            route.owner = live[owner]
        routes.append(route)
    if len({route.num_experts for route in routes}) > 1:
        sizes = {route.name: route.num_experts for route in routes}
        raise RoutingError(f"layers have different numbers of experts, one number was expected: {sizes}")
    return routes


def _by_itself(router: Router) -> RoutingError:
    return RoutingError(
        f"{router.experts} gets its indices from its block, not from a router module that returns (logits, weights, "
        "indices), as those of transformers' experts interface do: its load cannot be counted from outside. In a model "
        "of your own let such a module choose; otherwise use the model's auxiliary loss."
    )


def check_routed(model: PreTrainedModel, routes: Sequence[Route]) -> None:
    """Refuses to balance a dense model.

    Raises:
        RoutingError: there are no routes.
    """
    if not routes:
        raise RoutingError(f"{type(model).__name__} is dense: it has no experts to balance or count")


def _examine(skeleton: PreTrainedModel, router: Router, inject: bool, seen: dict[Any, Any]) -> tuple[str] | Gate | str:
    """(full name of the selection bias,), the gate to repeat, or why the router can have neither.

    Raises:
        OutputError: a router that hands out something else than (logits, weights, indices).
    """
    name, block, num_experts = router.module, router.experts.rpartition(".")[0], router.among
    module = skeleton.get_submodule(name)
    candidates = []
    for owner in dict.fromkeys((name, block)):
        holder = skeleton.get_submodule(owner)
        experts_here = tuple(n + "." for n, m in holder.named_modules() if is_experts(m))
        for leaf, tensor in (*holder.named_parameters(), *holder.named_buffers()):
            full = f"{owner}.{leaf}"
            selects = tensor.numel() == num_experts and tensor.is_floating_point() and not tensor.requires_grad
            if selects and not leaf.startswith(experts_here) and full not in candidates:
                candidates.append(full)
    relative = [c.removeprefix(name + ".") if c.startswith(name + ".") else "" for c in candidates]
    # Layers of a kind have the same router: each kind is probed once.
    numbers = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str)) and "layer_id" not in k}
    shapes = tuple((k, tuple(t.shape)) for k, t in (*module.named_parameters(), *module.named_buffers()))
    key = (type(module), tuple(sorted(numbers.items(), key=str)), shapes, tuple(relative), num_experts)
    if key not in seen:
        try:
            probe = Probe(module, num_experts)
            seen[key] = probe.native(relative)
            if seen[key] is None and inject:
                seen[key] = declared_gate(module, router.top_k, adapter_for(skeleton.config).gate)
                probe.check(seen[key])
            elif seen[key] is None:
                seen[key] = "it has no selection bias of its own"
                probe.run()
        except OutputError:
            raise
        except RoutingError as error:
            seen[key] = str(error)
    found = seen[key]
    return (candidates[found],) if isinstance(found, int) else found
