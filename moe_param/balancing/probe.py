"""Holds what is declared of a router against the router: a small copy of it is run on random inputs."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from moe_param.balancing.gates import Gate, RoutingError, checked

PROBE_TOKENS = 64


class Probe:
    """A copy of one router on the CPU, with random weights, that is run by itself."""

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

    def check(self, gate: Gate) -> None:
        """That the gate reproduces the router's weights, their gradients and its indices to the last bit.

        In float32, bfloat16 and under autocast: rounding shows the order of operations and casts.

        Raises:
            RoutingError: it does not.
        """
        runs = [self.run()]
        with torch.autocast("cpu", torch.bfloat16):
            runs.append(self.run())
        self.router.to(torch.bfloat16)
        runs.append(self.run(torch.bfloat16))
        logits, _, _, *more = runs[0]
        if logits.shape[-1] != self.num_experts or logits.dim() != 2:
            raise RoutingError(f"its logits are of shape {tuple(logits.shape)}, (tokens, {self.num_experts}) expected")
        if more:
            raise RoutingError("it returns more than (logits, weights, indices), which a bias would have to follow")
        if not all(self.same(gate, run, autocast=i == 1) for i, run in enumerate(runs)):
            raise RoutingError(
                f"its weights and indices are not those of {gate}: repeated from its logits they come out differently, "
                "so a bias would change more than the selection"
            )

    def same(self, gate: Gate, run: tuple[torch.Tensor, ...], autocast: bool) -> bool:
        """Whether weights, indices and the gradients of the weights are the router's own."""
        logits, weights, indices = run
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours = gate.route(logits, torch.zeros(self.num_experts), weights.dtype)
        if not torch.equal(ours[0], weights) or not torch.equal(ours[1], indices):
            return False
        random = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2)).to(weights.dtype)
        gradients = [torch.autograd.grad(w, logits, random, retain_graph=True)[0] for w in (weights, ours[0])]
        return torch.equal(*gradients)
