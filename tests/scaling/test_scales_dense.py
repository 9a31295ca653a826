"""Activations of dense models change by the same amount at every width and depth; not so under standard."""

from __future__ import annotations

import functools

import pytest
import torch

from moe_param import Shape
from moe_param.checks.coordinates import CoordCheck, CoordCheckError, coord_check
from moe_param.checks.verdicts import GROW, floor
from moe_param.corpus import byte_windows, stdlib_files
from tests.models import families, tiny_config

SIZES = {
    "llama": {
        **{"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
        **{"intermediate_size": 64},
    },
    "gpt2": {"n_embd": 32, "n_head": 2},
}
TEXT = torch.from_numpy(byte_windows([path for _, path in stdlib_files()], 4, 32, seed=0, vocabulary=128))


pytestmark = pytest.mark.slow

PARTS = ("by_weight", "by_input")


@functools.cache
def check(family: str, axis: str, spec: str) -> CoordCheck:
    config = tiny_config(family, **SIZES[family])
    settings = {"factors": (1, 2, 4), "steps": 6, "seeds": 2, "lr": 2**-8, "batch": TEXT}
    return coord_check(config, Shape.from_config(config), axis=axis, spec=spec, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", ["width", "depth"])
@pytest.mark.parametrize("family", families(SIZES, ("llama",)))
def test_changes_neither_grow_nor_vanish(family: str, axis: str) -> None:
    result = check(family, axis, "moe-completep")
    change = {quantity: slope.value for quantity, slope in result.slopes["change"].items()}
    parts = {f"{whole}_{part}" for whole in ("attention_output", "mlp_output", "logits") for part in PARTS}
    assert set(change) == {"embedding", "attention_output", "mlp_output", "residual", "logits"} | parts
    assert abs(change["residual"]) <= 0.2
    assert all(floor(quantity, axis) <= value <= GROW for quantity, value in change.items()), change
    assert result.status != "failed", result.verdicts


@pytest.mark.parametrize("family", families(SIZES, ("llama",)))
def test_standard_parameterization_fails(family: str) -> None:
    width = {q: s.value for q, s in check(family, "width", "standard").slopes["change"].items()}
    assert all(width[quantity] > 0.4 for quantity in ("attention_output", "mlp_output", "residual", "logits")), width
    assert check(family, "depth", "standard").slopes["change"]["residual"].value > 0.4
    for axis in ("width", "depth"):
        assert not check(family, axis, "standard").passed


def test_axes_of_experts_are_refused() -> None:
    config = tiny_config("llama")
    with pytest.raises(CoordCheckError, match="'num_experts' is of experts, and a dense model has none"):
        coord_check(config, Shape.from_config(config), axis="num_experts")
