"""Bases that are suggested, against models that are really built; the regime of a shape."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import AutoConfig

import moe_param
from moe_param import InputError, Shape, ShapeError, StructureError, scale_config, suggest_base
from moe_param.structure.regime import regime
from moe_param.structure.roles import read_structure
from moe_param.structure.shape import SIZES
from moe_param.structure.trace import model_class_for
from tests.models import build, tiny_config


def check(config: Any, **arguments: Any) -> moe_param.BaseSuggestion:
    """A suggestion, every base of which is planned for, divides, and keeps what it must keep."""
    found = suggest_base(config, **arguments)
    target = found.target.shape
    assert target == Shape.from_config(config)
    shares = [base.share for base in found.bases]
    assert shares == sorted(shares, reverse=True)
    for base in found.bases:
        assert base.shape != target
        assert base.shape.sparsity == target.sparsity
        assert base.shape.head_dim == target.head_dim
        assert base.shape.top_k >= min(2, target.top_k)
        moe_param.plan(model_class_for(config), config, base.shape)  # every layer has a counterpart
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "jamba"])
def test_bases_of_a_family(family: str) -> None:
    found = check(tiny_config(family), cost=0.5)
    assert found.best.share <= 0.5
    best = scale_config(tiny_config(family), **{size: getattr(found.best.shape, size) for size in SIZES})
    model = build(family, best)
    assert found.best.parameters == sum(p.numel() for p in model.parameters())


def test_a_large_public_config() -> None:
    """`explain deepseek_v3 --base width=512` has no way on; these bases divide for it, and cost what was asked."""
    config = AutoConfig.for_model("deepseek_v3")
    found = suggest_base(config)
    assert found.target.parameters == pytest.approx(671e9, rel=1e-3)  # the published counts
    assert found.target.active == pytest.approx(37e9, rel=0.03)
    assert 0.003 < found.best.share <= 0.01
    assert any(base.share < found.best.share for base in found.bases)
    assert any(base.share > found.best.share for base in found.bases)
    assert "best" in str(found) and found.best.sizes in str(found)
    assert all(base.shape.width % 56 == 0 for base in found.bases)


def test_flops_are_counted_by_hand() -> None:
    """Mixtral: every matrix once, the experts as often as a token visits them; q·k and a·v over half the context."""
    config = tiny_config("mixtral")
    counted = suggest_base(config, cost=0.4, context=32).target
    attention = 2 * 64 * 64 + 2 * 64 * 32  # q and o, k and v over 2 of 4 heads of 16
    expert = 3 * 64 * config.intermediate_size
    matrices = config.num_hidden_layers * (attention + 64 * 8 + 2 * expert) + 64 * 128
    scores = config.num_hidden_layers * 2 * 64 * (32 / 2)
    assert counted.flops == 6 * (matrices + scores)
    gains = (2 * config.num_hidden_layers + 1) * 64
    assert counted.active == matrices + 128 * 64 + gains
    assert counted.parameters == counted.active + config.num_hidden_layers * 6 * expert


def test_no_base_has_one_expert_per_token() -> None:
    """8 experts with 2 per token: 4 with 1 divides, and its router would not learn."""
    found = check(tiny_config("mixtral"), cost=0.05)
    assert {base.shape.top_k for base in found.bases} == {2}
    assert "top_k at least 2" in found.blocked["num_experts"]


def test_what_is_in_the_way_is_named() -> None:
    config = tiny_config("mixtral", num_attention_heads=1, num_key_value_heads=1, head_dim=16, num_hidden_layers=1)
    with pytest.raises(ShapeError, match=r"no smaller .*width: num_attention_heads = 1 is whole .*num_experts:"):
        suggest_base(config)
    deeper = tiny_config("mixtral", num_attention_heads=1, num_key_value_heads=1, head_dim=16)
    found = suggest_base(deeper, cost=0.001)  # only the depth is left, and it does not suffice
    assert {base.shape.depth for base in found.bases} == {1}
    assert "No base costs 0.10% or less" in str(found)
    assert found.best.share > 0.001


def test_depth_keeps_every_kind_of_layer() -> None:
    """Jamba has attention in one of eight layers and experts in every second: no base leaves one out."""
    config = tiny_config("jamba")
    kinds = set(read_structure(model_class_for(config), config).kinds)
    for base in suggest_base(config, cost=0.4).bases:
        scaled = scale_config(config, **{size: getattr(base.shape, size) for size in SIZES})
        assert set(read_structure(model_class_for(config), scaled).kinds) == kinds


@pytest.mark.parametrize("cost", [0, 1, -0.1, 2.0, "cheap", math.nan])
def test_impossible_costs(cost: Any) -> None:
    with pytest.raises(InputError, match="cost must be a share"):
        suggest_base(tiny_config("mixtral"), cost=cost)


def test_a_target_whose_router_cannot_learn() -> None:
    with pytest.raises(StructureError, match="the target has top_k = 1"):
        suggest_base(tiny_config("mixtral", num_experts_per_tok=1))


def test_plain_values() -> None:
    import json

    found = suggest_base(tiny_config("mixtral"), cost=0.4)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["bases"][document["best"]]["shape"] == found.best.to_dict()["shape"]
    assert document["target"]["share"] == 1.0
    assert document["target"]["regime"]["asymptotic"] is False


# -- the regime ------------------------------------------------------------------------------------------------------
def test_the_side_of_the_crossover() -> None:
    """Mixtral 8x7B (14336 over 4096) lies above, fine-grained DeepSeek-V3 (2048 over 7168) far below."""
    coarse = regime(Shape(width=4096, depth=32, num_experts=8, top_k=2, expert_size=14336))
    fine = regime(Shape(width=7168, depth=61, num_experts=256, top_k=8, expert_size=2048))
    assert (coarse.alpha_ffn, coarse.asymptotic) == (3.5, True)
    assert (round(fine.alpha_ffn, 3), fine.asymptotic) == (0.286, False)
    assert fine.alpha_star == pytest.approx(2.24e-4, rel=1e-3)
    assert "below the crossover" in str(fine)


def test_explain_says_it_of_base_and_target() -> None:
    from moe_param.explain import regimes

    config = tiny_config("mixtral")
    plan = moe_param.plan(model_class_for(config), config, scale_config(config, expert_size=192))
    found = regimes(plan)
    assert (found["base"]["asymptotic"], found["target"]["asymptotic"]) == (True, False)
    assert "base: α_ffn 3 (at or above the crossover" in " ".join(plan.table().split())
