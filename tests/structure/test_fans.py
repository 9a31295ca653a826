"""Fan-in, told by what a weight does: a linear sums over its inputs. A step on a direction that no input has changes
nothing, however large; one on a direction that no gradient has changes nothing to first order only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_param.structure.roles import Structure
from tests.models import FAMILIES, KeepDouble, families, tokens
from tests.models import output as output_of
from tests.structure.test_families import real_model, structure_of

TOKENS, LOSSES, STEP = 3, 4, 30.0
"""Fewer tokens than any fan-in, so that some direction is in no input; enough losses to see every token."""


def once(model: Any, structure: Structure) -> Iterator[str]:
    """The matrices that are trained and used, one of those that differ in numbers alone (of layer or expert).

    Convolutions are left out: their shapes do not name what they sum over.
    """
    convolutions = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv1d)}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    each = torch.autograd.grad(output(model).square().sum(), list(parameters.values()), allow_unused=True)
    trained = {name for name, gradient in zip(parameters, each) if gradient is not None and gradient.any()}
    seen = set()
    for name, info in structure.parameters.items():
        key = (re.sub(r"\.\d+\.", ".*.", name), info.shape)
        if info.fan_in is None or info.role == "embedding" or name not in trained or key in seen:
            continue
        if name.rpartition(".")[0] not in convolutions:
            seen.add(key)
            yield name


def output(model: Any) -> torch.Tensor:
    with KeepDouble():
        return output_of(model, tokens(100, 1, TOKENS))


def gradients(model: Any, names: list[str]) -> dict[str, torch.Tensor]:
    """(losses, *shape) of each parameter, for as many random losses."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(5)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for _ in range(LOSSES):
        out = output(model)
        loss = (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
        each = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, each, strict=True):
            found[name].append(torch.zeros_like(parameters[name]) if gradient is None else gradient)
    return {name: torch.stack(each) for name, each in found.items()}


def unseen(gradients_LAB: torch.Tensor, axis: int) -> torch.Tensor | None:
    """A direction along the axis (0: A, 1: B) that all gradients are orthogonal to; None where there is none, or where
    most of the axis is out of use, as distances are that so few tokens do not have."""
    rows = gradients_LAB.transpose(-1, -2).flatten(0, 1) if axis == 0 else gradients_LAB.flatten(0, 1)
    used = (rows != 0).any(0)
    if len(rows) > len(used):
        rows = torch.linalg.qr(rows).R  # the same directions
    _, values, directions = torch.linalg.svd(rows[:, used], full_matrices=True)
    flat = directions[int((values > 1e-9 * values[0]).sum()) :]
    if not len(flat) or used.sum() < len(used) / 2:
        return None
    found = torch.zeros(len(used), dtype=rows.dtype)
    found[used] = torch.randn(len(flat), generator=torch.Generator().manual_seed(6), dtype=rows.dtype) @ flat
    return found


def change(model: Any, weight: torch.Tensor, where: Any, step: torch.Tensor, before: torch.Tensor) -> float:
    """How much the output moves with a step of the weight, there or back."""
    kept, moved = weight.detach().clone(), 0.0
    with torch.no_grad():
        for sign in (1, -1):
            weight[where] += sign * step
            moved = max(moved, (output(model) - before).abs().max().item())
            weight.copy_(kept)
    return moved


def contracted(model: Any, name: str, gradient: torch.Tensor, before: torch.Tensor, copies: int) -> int | None:
    """Which of the last two axes of a matrix (or a stack of them) is summed over; None where it cannot be told.

    On the axis of the inputs there is a direction that nothing comes in on, and steps on it change nothing. On the
    other one there may be none, or one on which losses are flat: steps are so large that this does not last.
    """
    weight = dict(model.named_parameters())[name]
    if copies > 1:  # rows of so many experts, one after another
        weight, gradient = weight.detach().view(copies, -1, weight.shape[-1]), gradient.unflatten(1, (copies, -1))
    where = ()
    while gradient.dim() > 3:  # of a stack, the matrix that was used most
        index = int(gradient.square().flatten(2).sum((0, 2)).argmax())
        gradient, where = gradient[:, index], (*where, index)
    if gradient.dim() != 3 or gradient.abs().max() == 0:
        return None
    generator = torch.Generator().manual_seed(6)
    moved = []
    for axis in (0, 1):
        direction = unseen(gradient, axis)
        if direction is None:
            moved.append(torch.inf)
            continue
        other = STEP * torch.randn(gradient.shape[2 - axis], generator=generator, dtype=gradient.dtype)
        step = torch.outer(direction, other) if axis == 0 else torch.outer(other, direction)
        moved.append(change(model, weight, where, step, before))
    still = [axis for axis in (0, 1) if moved[axis] < 1e-8 * before.abs().max().item()]
    return still[0] if len(still) == 1 else None


def told(family: str, structure: Structure) -> set[str]:
    """The roles of the matrices whose fan-in could be told; that of each is the structure's.

    Raises:
        AssertionError: one that is not.
    """
    model, stacked = real_model(family), structure_of(family)[2].stacked
    names = list(once(model, structure))
    found, before = gradients(model, names), output(model).detach()
    roles = set()
    for name in names:
        info, copies = structure.parameters[name], stacked.get(name, 1)
        axis = contracted(model, name, found[name], before, copies)
        if axis is not None:
            sizes = (info.shape[-2] // copies, info.shape[-1])
            assert info.fan_in == sizes[axis], name
            if info.role.endswith(("_up", "_down")):  # whose rules read it
                assert info.fan_out == sizes[1 - axis], name
            roles.add(info.role)
    return roles


@pytest.mark.parametrize("family", families(FAMILIES))
def test_fan_in_is_what_a_weight_sums_over(family: str) -> None:
    roles = told(family, structure_of(family)[1])
    # Off training, phimoe's gates do not depend on its router.
    assert roles >= {"expert_up", "expert_down", *(() if family == "phimoe" else ("router",))}
