"""Batch size and tokens: the rules' closed forms, and Adam on a noisy quadratic whose batch is four times as large."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import moe_param
from moe_param import HorizonError, OptimizerError, Parameterization, Rule, Shape, horizon_factors
from moe_param.optim.groups import param_groups
from moe_param.scaling.spec import ScalingSpec
from moe_param.structure.laws import InitLaw
from tests.models import build, tiny_config

LR, EPS, DECAY, BETAS = 0.01, 3.0, 0.3, (0.95, 0.99)
SIGMA, STEPS, ELEMENTS = 3.0, 448, 20_000
RULES = {"w": Rule("unembedding", (ELEMENTS,), InitLaw("constant", value=1.0))}
SHAPE = Shape(width=1, depth=1, num_experts=1, top_k=1, expert_size=1)
ONE = Parameterization(RULES, ScalingSpec.load("standard"), SHAPE, SHAPE)


class Quadratic(nn.Module):
    """Independent copies of w²/2, whose gradient is seen through noise of variance σ²/batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(ELEMENTS))


@functools.cache
def curve(batch: int, **settings: Any) -> torch.Tensor:
    """Mean and mean square of w after each quarter of the same number of samples."""
    model, generator = Quadratic(), torch.Generator().manual_seed(batch)
    base = {"lr": LR, "eps": EPS, "weight_decay": DECAY, "betas": BETAS}
    optimizer = ONE.optimizer(model, **{**base, **settings})
    rows = []
    for step in range(1, STEPS // batch + 1):
        model.w.grad = model.w.detach() + SIGMA / batch**0.5 * torch.randn(ELEMENTS, generator=generator)
        optimizer.step()
        if step % (STEPS // batch // 4) == 0:
            rows.append([model.w.mean().item(), model.w.square().mean().item()])
    return torch.tensor(rows)


def distance(found: torch.Tensor) -> float:
    return (found / curve(1) - 1).abs().max().item()


def test_a_larger_batch_sees_the_same_run() -> None:
    assert curve(1)[-1, 0] < 0.4  # the quadratic is being solved
    assert distance(curve(4, batch_ratio=4.0)) < 0.05
    assert distance(curve(4)) > 0.3
    # As is the rule's word for the tokens: four times of both is nothing new per step.
    same = curve(4, batch_ratio=4.0, tokens_ratio=4.0, tokens_exponent=0.5)
    torch.testing.assert_close(same, curve(4), rtol=0, atol=0)


@pytest.mark.parametrize("left_alone", ["lr", "eps", "weight_decay", "betas"])
def test_every_part_of_the_rule_is_needed(left_alone: str) -> None:
    scaled: dict[str, Any] = {"lr": 2 * LR, "eps": EPS / 2, "weight_decay": 2 * DECAY, "betas": (0.8, 0.96)}
    assert distance(curve(4, **scaled)) == pytest.approx(distance(curve(4, batch_ratio=4.0)), rel=1e-3)
    del scaled[left_alone]
    assert distance(curve(4, **scaled)) > 0.1


def test_what_stays_constant_along_both() -> None:
    for batch, tokens in ((4, 1), (1, 4), (2, 16), (0.5, 1)):
        factors = horizon_factors(batch, tokens, tokens_exponent=0.5)
        steps = tokens / batch
        assert factors.lr * factors.weight_decay * steps == pytest.approx(1)
        assert factors.beta * steps == pytest.approx(1)
        assert factors.lr * factors.eps == pytest.approx(1)
        assert factors.lr == pytest.approx((batch / tokens) ** 0.5)
    assert horizon_factors(3, 3, tokens_exponent=0.5) == horizon_factors() == moe_param.HorizonFactors()
    assert horizon_factors(4).betas((0.9, 0.95)) == pytest.approx((0.6, 0.8))


def test_the_exponent_of_tokens() -> None:
    """By default more tokens change nothing, as the paper found; others' exponents are lr's, at a fixed batch."""
    assert horizon_factors(tokens_ratio=40.0) == moe_param.HorizonFactors()
    assert horizon_factors(4.0, 40.0) == horizon_factors(4.0)
    for exponent in (0.3, 0.32, 0.5, 1.0):
        assert horizon_factors(tokens_ratio=16.0, tokens_exponent=exponent).lr == pytest.approx(16.0**-exponent)
    for exponent in (-0.1, 1.5, float("nan")):
        with pytest.raises(HorizonError, match=r"tokens_exponent is .* 0 \(the rate stays\) to 1"):
            horizon_factors(tokens_exponent=exponent)


def test_groups_take_the_factors_and_without_ratios_nothing_changes() -> None:
    model = build("mixtral", hidden_size=128, num_attention_heads=8, num_key_value_heads=4)
    plan = moe_param.plan(type(model), model.config, tiny_config("mixtral"))
    base = plan.param_groups(model, lr=LR, eps=EPS, weight_decay=DECAY)
    assert "betas" not in base[0]
    off = plan.param_groups(model, lr=LR, eps=EPS, weight_decay=DECAY, batch_ratio=1.0, tokens_ratio=1.0)
    assert [{**g, "params": None} for g in off] == [{**g, "params": None} for g in base]
    factory = plan.optimizer_factory(torch.optim.AdamW)()
    ratios: dict[str, float] = {"tokens_ratio": 4.0, "tokens_exponent": 0.5}
    optimizer = factory(model, lr=LR, eps=EPS, weight_decay=DECAY, betas=(0.8, 0.96), **ratios)
    for found, group in zip(optimizer.param_groups, base, strict=True):
        assert found["names"] == group["names"]
        assert found["betas"] == pytest.approx((0.95, 0.99))
        assert found["lr"] == pytest.approx(group["lr"] / 2)
        assert found["weight_decay"] == pytest.approx(group["weight_decay"] / 2)
        assert found["eps"] == pytest.approx(group["eps"] * 2)
    # With the same steps as the rules mean, `ema` says the same of weight decay.
    same = param_groups(
        *(plan.rules, model),
        **{"lr": LR, "weight_decay": DECAY, "decay": "ema", "steps": 400, "base_steps": 100},
        **{**ratios, "betas": BETAS},
    )
    assert [g["weight_decay"] for g in same] == pytest.approx([g["weight_decay"] for g in optimizer.param_groups])
    default = factory(model, lr=LR, **ratios)  # the base's betas are the paper's where none are given
    assert default.param_groups[0]["betas"] == pytest.approx((0.975, 0.9875))


def test_bad_ratios() -> None:
    for ratio in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(HorizonError, match="batch_ratio is target / base and must be a positive number"):
            horizon_factors(batch_ratio=ratio)
    with pytest.raises(HorizonError, match=r"takes betas \(0.9, 0.95\) to .* the square root rule ends at 10"):
        horizon_factors(16).betas((0.9, 0.95))
    with pytest.raises(OptimizerError, match="scale Adam's betas too: give betas"):
        param_groups(RULES, Quadratic(), lr=LR, batch_ratio=2.0)
    numbers: dict[str, Any] = {"lr": LR, "weight_decay": 0.1, "decay": "ema", "betas": BETAS, "tokens_ratio": 4.0}
    with pytest.raises(OptimizerError, match="is the ratio of steps, but steps / base_steps = 1"):
        param_groups(RULES, Quadratic(), **numbers, steps=100, base_steps=100)
