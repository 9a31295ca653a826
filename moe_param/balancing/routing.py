"""What a router is, where its selection bias lives, and how to give it one.

A router is the module that hands an experts module its indices (`moe_param.structure.trace`); its output starts
(logits, weights, indices). Everything else is found by running a small copy of it on random inputs: the tensor that
takes part in selection only, or, where there is none, the arithmetic that leads from its logits to its weights and
indices, which then can be repeated with a bias in the selection.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from moe_param.balancing.gates import Gate, RoutingError, checked
from moe_param.balancing.selection import Selection, selection_of
from moe_param.optim.groups import plain_name
from moe_param.structure.trace import _quiet, is_experts, trace_model

PROBE_TOKENS = 64


@dataclass
class Route:
    """One routed layer of a model.

    module: the live router. owner, leaf: where its selection bias is (the tensor is looked up each time: FSDP2
    replaces parameters), None without one. gate: how to repeat the routing with a bias, where one was injected or is
    asked for.
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
    """The routed layers of a model, first to last.

    Args:
        model: live; sharded (FSDP2), compiled or checkpoint-wrapped inside as may be.
        inject: find out how to bias routers that have no selection bias of their own.

    Raises:
        RoutingError: a block that routes by itself, without a router module; experts that differ in number.
        StructureError: the model has no experts or cannot be traced.
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
        if router.module is None or type(skeleton.get_submodule(router.module)) is nn.Linear:
            raise RoutingError(
                f"{router.experts} gets its indices from its block, not from a router module: its load cannot be "
                "counted from outside. Newer versions of transformers give every family a router module: upgrade."
            )
        selection = selection_of(live[router.module])
        found = selection or _examine(skeleton, router.module, router.experts, inject, seen)
        experts: Any = skeleton.get_submodule(router.experts)
        route = Route(router.module, live[router.module], int(experts.num_experts), router.top_k)
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


# -- probing a copy of the router -------------------------------------------------------------------------------------
def _examine(
    skeleton: nn.Module, name: str, experts: str, inject: bool, seen: dict[Any, Any]
) -> tuple[str] | Gate | str:
    """(full name of the selection bias,), the gate to repeat, or why the router can have neither."""
    block = experts.rpartition(".")[0]
    module = skeleton.get_submodule(name)
    num_experts = int(skeleton.get_submodule(experts).num_experts)  # type: ignore[arg-type]
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
            probe = _Probe(module, num_experts)
            seen[key] = probe.native(relative)
            if seen[key] is None:
                seen[key] = probe.gate() if inject else "it has no selection bias of its own"
        except RoutingError as error:
            seen[key] = str(error)
    found = seen[key]
    return (candidates[found],) if isinstance(found, int) else found


class _Probe:
    """A copy of one router on the CPU, with random weights."""

    def __init__(self, module: nn.Module, num_experts: int) -> None:
        self.num_experts = num_experts
        self.generator = torch.Generator().manual_seed(0)
        self.router = copy.deepcopy(module).to_empty(device="cpu").eval()
        self.takes = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
        matrices = [p for p in module.parameters() if p.dim() == 2 and p.requires_grad]
        if not matrices:
            raise RoutingError("its forward pass holds no matrix: it does not score experts")
        self.width = int(matrices[0].shape[-1])
        for tensor in (*self.router.parameters(), *self.router.buffers()):
            if tensor.is_floating_point():
                std = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0
                with torch.no_grad():
                    tensor.copy_(torch.randn(tensor.shape, generator=self.generator) * std)

    def run(self, dtype: torch.dtype = torch.float32, *extra: torch.Tensor) -> tuple[torch.Tensor, ...]:
        needed = [p for p in self.takes if p.default is p.empty]
        if not len(needed) <= 1 + len(extra) <= len(self.takes):
            wants = ", ".join(p.name for p in needed)
            raise RoutingError(f"it does not choose by scores of hidden states alone: it takes ({wants})")
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(PROBE_TOKENS, self.width, generator=generator).to(dtype)
        out: Any = None
        for shaped in (hidden, hidden[None]):  # most routers take flat tokens, some only a batch of sequences
            try:
                out = self.router(shaped.clone(), *extra)
                break
            except (TypeError, ValueError, IndexError, RuntimeError) as error:
                failed = error
        if out is None:
            raise RoutingError(f"it could not be run on its own: {type(failed).__name__}: {failed}")
        return checked(out)

    def native(self, candidates: list[str]) -> int | None:
        """Which candidate (a name inside the router, "" for a tensor of the block) forces an expert's selection."""
        for which, name in enumerate(candidates):
            bias = torch.zeros(self.num_experts) if not name else self.tensor(name)
            if not name and len(self.takes) < 2:  # the block does not hand it to the router
                continue
            extra = () if name else (bias,)
            forced, kept = True, None
            for expert in (self.num_experts - 1, 0):
                with torch.no_grad():
                    bias.zero_().view(-1)[expert] = 1e4
                logits, weights, indices, *_ = self.run(torch.float32, *extra)
                forced &= bool((indices == expert).any(-1).all()) and (kept is None or torch.equal(kept, logits))
                # The weights of a biased choice stay of the size of weights: the bias is not among them.
                forced &= bool(weights.abs().max() < 1e3)
                kept = logits
            with torch.no_grad():
                bias.zero_()
            if forced:
                return which
        return None

    def tensor(self, name: str) -> torch.Tensor:
        owner, _, leaf = name.rpartition(".")
        found: torch.Tensor = getattr(self.router.get_submodule(owner), leaf)
        return found

    def gate(self) -> Gate:
        """The arithmetic that reproduces the router's weights, their gradients and its indices to the last bit.

        In float32, bfloat16 and under autocast: rounding shows the order of operations and casts.

        Raises:
            RoutingError: none of those known does.
        """
        runs = [self.run()]
        with torch.autocast("cpu", torch.bfloat16):
            runs.append(self.run())
        self.router.to(torch.bfloat16)
        runs.append(self.run(torch.bfloat16))
        logits, _, indices, *more = runs[0]
        if logits.shape[-1] != self.num_experts or logits.dim() != 2:
            raise RoutingError(f"its logits are of shape {tuple(logits.shape)}, (tokens, {self.num_experts}) expected")
        if more:
            raise RoutingError("it returns more than (logits, weights, indices), which a bias would have to follow")
        zero = torch.zeros(self.num_experts)
        for gate in self.gates(indices.shape[-1]):
            if all(self.same(gate, run, zero, autocast=i == 1) for i, run in enumerate(runs)):
                return gate
        raise RoutingError(
            "its weights and indices are not those of a softmax or sigmoid router: repeated from its logits they come "
            "out differently, so a bias would change more than the selection"
        )

    def same(self, gate: Gate, run: tuple[torch.Tensor, ...], zero: torch.Tensor, autocast: bool) -> bool:
        """Whether weights, indices and the gradients of the weights are the router's own."""
        logits, weights, indices = run
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours = gate.route(logits, zero, weights.dtype)
        if not torch.equal(ours[0], weights) or not torch.equal(ours[1], indices):
            return False
        random = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2)).to(weights.dtype)
        gradients = [torch.autograd.grad(w, logits, random, retain_graph=True)[0] for w in (weights, ours[0])]
        return torch.equal(*gradients)

    def gates(self, top_k: int) -> Iterator[Gate]:
        numbers = {
            float(v) for v in vars(self.router).values() if isinstance(v, (int, float)) and not isinstance(v, bool)
        }
        factors = [("mul", 1.0), *((how, v) for how in ("mul", "div") for v in sorted(numbers) if v not in (0.0, 1.0))]
        groups: list[tuple[int, int, str] | None] = [None]
        number, kept = (getattr(self.router, name, None) for name in ("num_group", "topk_group"))
        if isinstance(number, int) and isinstance(kept, int) and number > 0 and self.num_experts % number == 0:
            groups += [(number, kept, score) for score in ("max", "top2")]
        kinds, epsilons = ("softmax", "softmax_chosen", "sigmoid", "sigmoid_chosen"), (None, 0.0, 1e-20)
        for group, factor, kind, fp32, epsilon, ordered in itertools.product(
            groups, factors, kinds, (True, False), epsilons, (True, False)
        ):
            yield Gate(kind, fp32, epsilon, factor, group, ordered, top_k)
