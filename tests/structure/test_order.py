"""What was read before makes no difference: all families in one process, in random order, twice."""

from __future__ import annotations

import os
import random
import weakref
from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

from moe_param import StructureError
from moe_param.structure import trace as tracing
from moe_param.structure.laws import InitLaw, InitWatcher
from moe_param.structure.roles import Structure, read_structure
from tests.models import DENSE, FAMILIES, classes, tiny_config

SEED = int(os.environ.get("ORDER_SEED", random.SystemRandom().randrange(10**6)))
"""Of the order; a failure prints it, and ORDER_SEED=… brings that order back."""


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last few models are remembered between calls; here each is read anew."""
    monkeypatch.setattr(tracing, "_recent", Forgets())


class Forgets(dict[Any, Any]):
    """Hands back what it was just given, once."""

    def __getitem__(self, key: Any) -> Any:
        return self.pop(key)


def read(family: str, order: str) -> Structure:
    try:
        return read_structure(classes(family)[0], tiny_config(family))
    except StructureError as error:
        raise AssertionError(f"{family}, {order}: {error}") from error


def differences(first: Structure, second: Structure) -> list[str]:
    """Fields of a structure that differ, of its parameters each by name."""
    found = [f.name for f in fields(Structure) if getattr(first, f.name) != getattr(second, f.name)]
    names = first.parameters.keys() | second.parameters.keys()
    return found + [n for n in sorted(names) if first.parameters.get(n) != second.parameters.get(n)]


@pytest.mark.slow
def test_all_families_in_random_order_twice() -> None:
    generator = random.Random(SEED)
    names = sorted([*FAMILIES, *DENSE])
    seen: dict[str, Structure] = {}
    for turn in ("first", "second"):
        for place, family in enumerate(generator.sample(names, len(names)), 1):
            order = f"number {place} of the {turn} turn with ORDER_SEED={SEED}"
            structure = read(family, order)
            different = differences(seen.setdefault(family, structure), structure)
            assert not different, f"{family}, {order}: other {different} than in the first turn"


def test_a_difference_is_seen_where_there_is_one() -> None:
    """Roles, fans and laws, of one parameter each."""
    config = tiny_config("mixtral")
    before = read_structure(classes("mixtral")[0], config)
    config.initializer_range *= 2
    after = read_structure(classes("mixtral")[0], config)
    assert "model.layers.0.self_attn.q_proj.weight" in differences(before, after)
    assert "model.norm.weight" not in differences(before, after)
    config.intermediate_size += 8
    wider = differences(after, read_structure(classes("mixtral")[0], config))
    assert {"shape", "model.layers.0.mlp.experts.down_proj"} <= set(wider)
    assert "model.layers.0.self_attn.q_proj.weight" not in wider


class MovesItsParts(MixtralForCausalLM):
    """As constructors do that hold some of their parts in another precision."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head.to(torch.float64)


def test_parts_that_move_under_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses to move what a weak reference points to: there must be none. With one the model is not read."""
    config = tiny_config("mixtral")
    read_structure(MovesItsParts, config)
    held = []
    remember = InitWatcher.remember

    def holds(self: InitWatcher, tensor: torch.Tensor, law: InitLaw) -> None:
        held.append(weakref.ref(tensor))
        remember(self, tensor, law)

    monkeypatch.setattr(InitWatcher, "remember", holds)
    with pytest.raises(StructureError, match="swap"):
        read_structure(MovesItsParts, config)
