"""A model with folded weights and a reference of its equations: given the same weights, trained, and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.models import tokens

Tensors = Mapping[str, tuple[torch.Tensor, float]]
"""For each parameter of the reference: the model's tensor, and the multiplier that stands beside it unfolded."""


@torch.no_grad()
def take_weights(reference: nn.Module, folded: Tensors) -> None:
    """The reference becomes the same function: its weights are the model's without the folds."""
    for name, parameter in reference.named_parameters():
        value, multiplier = folded[name]
        parameter.copy_(value / multiplier)


def loss_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A transformers model's loss on a batch of ids."""
    return lambda batch: model(input_ids=batch, labels=batch).loss


def train(
    loss: Callable[[torch.Tensor], torch.Tensor],
    groups: list[dict[str, Any]],
    vocabulary: int,
    steps: int,
    after: Callable[[], Any] = lambda: None,
) -> list[float]:
    """The losses of so many steps of AdamW on four batches in turn; `after` each step."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        found = loss(tokens(vocabulary, batch=2, length=12, seed=step % 4))
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        after()
        losses.append(found.item())
    return losses


def check_weights(reference: nn.Module, folded: Tensors, tolerance: float) -> None:
    """Every weight of the model is the reference's times what was folded into it."""
    for name, parameter in reference.named_parameters():
        value, multiplier = folded[name]
        error = (value - parameter * multiplier).norm() / value.norm()
        assert error < tolerance, f"{name}: {error:.2e}"
