"""Which matrices a parameter holds: experts lie in stacks, gate and up, or queries, keys and values, may lie in one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Matrices:
    """The matrices of one parameter, each (fan_out, fan_in).

    copies: how many lie behind one another: the experts, also where a two-dimensional tensor holds them one below the
        other.
    transposed: they lie (fan_in, fan_out) there.
    parts: sizes along fan_out of what is a matrix of its own, e.g. (I, I) for gate and up; empty: all of it is one.
    interleaved: the parts take turns, row by row, instead of following one another.
    """

    copies: int = 1
    transposed: bool = False
    parts: tuple[int, ...] = ()
    interleaved: bool = False

    def views(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Of a tensor like the parameter: a view (copies, fan_out of the part, fan_in) for each part."""
        stack = tensor.unflatten(0, (self.copies, -1)) if tensor.dim() == 2 else tensor
        stack = stack.mT if self.transposed else stack
        if not self.parts:
            return [stack]
        if self.interleaved:
            return [stack[:, part :: len(self.parts)] for part in range(len(self.parts))]
        return list(stack.split(list(self.parts), 1))

    def fan_outs(self, fan_out: int) -> tuple[int, ...]:
        """Of the parts."""
        return self.parts or (fan_out,)


Piece = tuple[int, int, int]
"""Columns start:stop:step of what a weight makes, taken apart from the rest right where it is made."""


def arrangement(pieces: Sequence[Piece], fan_out: int) -> tuple[tuple[int, ...], bool] | None:
    """(parts, interleaved) of a weight whose product is taken apart into `pieces`; None where they do not cover it
    once, in parts that follow one another or take turns."""
    found = sorted(set(pieces))
    steps = {step for _, _, step in found}
    if steps == {1}:
        edges = [0, *itertools.accumulate(stop - start for start, stop, _ in found)]
        in_turn = all(start == edge for (start, _, _), edge in zip(found, edges))
        return (tuple(stop - start for start, stop, _ in found), False) if in_turn and edges[-1] == fan_out else None
    if steps == {len(found)} and [start for start, _, _ in found] == list(range(len(found))):
        return ((fan_out // len(found),) * len(found), True)
    return None
