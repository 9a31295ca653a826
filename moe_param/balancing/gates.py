"""Gates: how a router gets from its logits to weights and indices, repeated with a bias in the selection.

Which gate a router has is declared: by attributes that transformers gives its routers, and where those do not tell, by
the `gate` entry of the family in `structure/adapters.yaml`. `Probe.check` holds the declaration against the router.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_param.errors import MoeParamError


class RoutingError(MoeParamError):
    """A router that cannot be counted or biased; the message says which one, and why."""


@dataclass(frozen=True)
class Gate:
    """From logits (tokens, num_experts) to weights and indices (tokens, top_k).

    scores: "softmax" or "sigmoid". chosen: whether scores are taken of the chosen logits alone, after the selection.
    float32: whether a softmax is computed in float32 whatever the dtype of the logits.
    normalize: whether weights are divided by their sum. scale, divide: factor and divisor of the weights, last of all.
    groups: (number of groups, groups kept, "max" or "top2" for a group's score) of group-limited routing.
    ordered: whether the chosen come sorted by their score; sums over them round accordingly.
    """

    scores: str
    top_k: int
    chosen: bool = False
    float32: bool = True
    normalize: bool = False
    scale: float = 1.0
    divide: float = 1.0
    groups: tuple[int, int, str] | None = None
    ordered: bool = True

    def score(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scores == "sigmoid":
            return logits.sigmoid()
        return logits.softmax(-1, dtype=torch.float32 if self.float32 else None)  # None: or what autocast makes of it

    def route(self, logits: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights in `dtype`, indices): selection sees the bias, weights do not, and it carries no gradient."""
        indices = self.select(logits.detach(), bias)
        if self.chosen:
            weights = self.score(logits.gather(-1, indices))
        else:
            weights = self.score(logits).gather(-1, indices)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        if self.scale != 1:
            weights = weights * self.scale
        if self.divide != 1:
            weights = weights / self.divide
        return weights.to(dtype), indices

    def select(self, logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Softmax gates are biased in logit space, where a step means the same at any number of experts; sigmoid ones
        on the score."""
        if self.scores == "sigmoid":
            # Those that select by logits keep apart what float32 keeps apart.
            choice = self.score(logits.float() if self.chosen else logits) + bias
        elif self.chosen:
            choice = logits + bias
        else:
            biased = logits + bias
            choice = self.score(biased if self.float32 else biased.to(logits.dtype))
        if self.groups is not None:
            choice = _limit(choice, *self.groups)
        return choice.topk(self.top_k, dim=-1, sorted=self.ordered).indices


def _limit(choice: torch.Tensor, groups: int, kept: int, score: str) -> torch.Tensor:
    """Zero outside of the `kept` best groups."""
    grouped = choice.unflatten(-1, (groups, -1))
    of_group = grouped.amax(-1) if score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
    best = of_group.topk(kept, dim=-1, sorted=False).indices
    outside = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(outside.unsqueeze(-1), 0.0).flatten(-2)


def declared_gate(router: nn.Module, top_k: int, entry: Mapping[str, Any] | str) -> Gate:
    """The gate of a router, by its attributes and by its family's entry (the keys are explained in `adapters.yaml`).

    Raises:
        RoutingError: the entry says why these gates cannot be repeated.
    """
    if isinstance(entry, str):
        raise RoutingError(entry)
    scores = str(entry.get("scores") or getattr(router, "expert_selection_fn", "softmax"))
    chosen = entry.get("over") == "chosen"
    normalize = entry.get("normalize", getattr(router, "norm_topk_prob", False))
    number, kept = getattr(router, "num_group", None) or 1, getattr(router, "topk_group", None) or 1
    limited = number > 1 and getattr(router, "topk_method", "group_limited_greedy") == "group_limited_greedy"
    return Gate(
        scores=scores,
        top_k=top_k,
        chosen=chosen,
        float32=entry.get("float32", True),
        normalize=normalize and not (chosen and scores == "softmax"),  # which sums to one by itself
        scale=float(getattr(router, "routed_scaling_factor", 1.0)),
        divide=float(getattr(router, entry["divide"])) if "divide" in entry else 1.0,
        groups=(int(number), int(kept), entry.get("groups", "top2")) if limited else None,
        ordered=entry.get("ordered", True),
    )


class OutputError(RoutingError):
    """A router whose output does not tell where tokens go."""


def checked(out: Any) -> tuple[torch.Tensor, ...]:
    """A router's output, if it starts (logits, weights, indices).

    Raises:
        OutputError: it does not.
    """
    if (
        not isinstance(out, tuple)
        or len(out) < 3
        or not all(isinstance(t, torch.Tensor) for t in out[:3])
        or out[2].is_floating_point()
        or out[1].shape != out[2].shape
    ):
        raise OutputError("its output does not start (logits, weights, indices), as transformers' routers' do")
    return out
