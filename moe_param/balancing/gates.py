"""How routers get from logits to weights and indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_param.errors import MoeParamError


class RoutingError(MoeParamError):
    """A router that cannot be counted or biased; the message says which one, and why."""


@dataclass(frozen=True)
class Gate:
    """From logits to weights and indices, as one of the routers in use does it.

    kind: "softmax" (over all experts), "softmax_chosen" (over the chosen ones), "sigmoid", "sigmoid_chosen" (after a
        selection by logits).
    fp32: whether it is computed in float32 whatever the dtype of the logits.
    normalize: the ε of a division by the sum of the chosen weights; None: no such division.
    factor: ("mul" or "div", number) the weights are scaled by.
    groups: (number of groups, groups kept, "max" or "top2" for a group's score) of group-limited routing.
    """

    kind: str
    fp32: bool
    normalize: float | None
    factor: tuple[str, float]
    groups: tuple[int, int, str] | None
    ordered: bool
    top_k: int

    def route(self, logits: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights in `dtype`, indices): selection sees the bias, weights do not.

        Softmax routers are biased in logit space, where a step means the same at any number of experts; sigmoid
        ones on the score.
        """
        act = torch.float32 if self.fp32 else None  # None: what the logits are, or what autocast makes of them
        if self.kind == "softmax":
            scores = logits.softmax(-1, dtype=act)
            choice = (logits + bias).to(logits.dtype if act is None else act).softmax(-1)
        elif self.kind == "softmax_chosen":
            scores, choice = logits, logits + bias
        elif self.kind == "sigmoid_chosen":  # selects by logits: float32 keeps apart what those keep apart
            scores, choice = logits, logits.float().sigmoid() + bias
        else:
            scores = logits.to(act).sigmoid() if act else logits.sigmoid()
            choice = scores + bias
        choice = choice.detach()  # selection carries no gradient
        if self.groups is not None:
            choice = self.limit(choice, *self.groups)
        indices = choice.topk(self.top_k, dim=-1, sorted=self.ordered).indices
        weights = scores.gather(-1, indices)
        if self.kind == "softmax_chosen":
            weights = weights.softmax(-1, dtype=act)
        elif self.kind == "sigmoid_chosen":
            weights = weights.to(act).sigmoid() if act else weights.sigmoid()
        if self.normalize is not None:
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total + self.normalize if self.normalize else total)
        how, number = self.factor
        if number != 1:
            weights = weights * number if how == "mul" else weights / number
        return weights.to(dtype), indices

    @staticmethod
    def limit(choice: torch.Tensor, groups: int, kept: int, score: str) -> torch.Tensor:
        grouped = choice.unflatten(-1, (groups, -1))
        of_group = grouped.amax(-1) if score == "max" else grouped.topk(2, dim=-1).values.sum(-1)
        best = of_group.topk(kept, dim=-1, sorted=False).indices
        outside = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(outside.unsqueeze(-1), 0.0).flatten(-2)


def checked(out: Any) -> tuple[torch.Tensor, ...]:
    """A router's output, if it starts (logits, weights, indices)."""
    if (
        not isinstance(out, tuple)
        or len(out) < 3
        or not all(isinstance(t, torch.Tensor) for t in out[:3])
        or out[2].is_floating_point()
        or out[1].shape != out[2].shape
    ):
        raise RoutingError("its output does not start (logits, weights, indices), as transformers' routers' do")
    return out
