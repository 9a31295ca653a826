"""Adam's epsilon follows the scale of the gradient: measured slopes against the exponents of the tables."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch

import moe_param
from moe_param import ScalingSpec
from tests.models import build, tiny_config, tokens
from tests.scaling.test_scales import BASE, FAMILIES, _Hashable, changed

# Gradient scales as derived from the papers' desiderata, unfolded: {role: {axis: exponent}}; top_k follows num_experts.
EXPECTED = {
    "embedding": {"width": -1, "depth": 0, "num_experts": 0, "expert_size": 0},
    "attention_out": {"width": -1, "depth": -1, "num_experts": 0, "expert_size": 0},
    "expert_up": {"width": 0, "depth": -1, "num_experts": -1, "expert_size": -1},
    "expert_down": {"width": -1, "depth": -1, "num_experts": -1, "expert_size": 0},
    "norm": {"width": -1, "depth": -1, "num_experts": 0, "expert_size": 0},
    "final_norm": {"width": -1, "depth": 0, "num_experts": 0, "expert_size": 0},
    "attention_in": {"width": -1, "depth": -1, "num_experts": 0, "expert_size": 0},
    "query_norm": {"width": 0, "depth": -1, "num_experts": 0, "expert_size": 0},
}


@functools.cache
def measured(family: str, axis: str, spec: str | ScalingSpec = "moe-completep") -> dict[str, tuple[float, float]]:
    """{role: (slope of the unfolded gradient's RMS after 2 steps, slope of the unfolded epsilon)}."""
    config = tiny_config(family, **BASE, **FAMILIES[family])
    shape = moe_param.Shape.from_config(config)
    points: dict[str, list[tuple[float, float, float]]] = {}
    for factor in (1, 2, 4, 8):
        scaled = moe_param.scale_config(config, **{axis: getattr(shape, axis) * factor})
        squares: dict[str, list[float]] = {}
        epsilons: dict[str, list[float]] = {}
        for seed in range(2):
            model = build(family, copy.deepcopy(scaled))
            parameterization = moe_param.apply(model, shape, seed=seed, experts=None, spec=spec)
            optimizer = torch.optim.AdamW(parameterization.param_groups(model, lr=2**-8, eps=1e-12))
            batch = tokens(128, 4, 32, seed)
            for _ in range(3):
                optimizer.step()
                optimizer.zero_grad()
                model(input_ids=batch, labels=batch).loss.backward()
            for name, p in model.named_parameters():
                rule = parameterization.rules[name]
                if p.grad is not None and rule.role in EXPECTED:
                    squares.setdefault(rule.role, []).append(p.grad.square().mean().item() * rule.multiplier**2)
                    epsilons.setdefault(rule.role, []).append(rule.eps * rule.multiplier)
        for role, values in squares.items():
            rms = math.sqrt(sum(values) / len(values))
            points.setdefault(role, []).append((math.log(factor), math.log(rms), math.log(epsilons[role][0])))
    return {role: (slope([(x, y) for x, y, _ in p]), slope([(x, e) for x, _, e in p])) for role, p in points.items()}


def slope(points: list[tuple[float, float]]) -> float:
    x0 = sum(x for x, _ in points) / len(points)
    return sum((x - x0) * y for x, y in points) / sum((x - x0) ** 2 for x, _ in points)


@pytest.mark.parametrize("axis", ["width", "depth", "num_experts", "expert_size"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_gradients_scale_as_the_table_says(family: str, axis: str) -> None:
    found = measured(family, axis)
    for role, (gradient, epsilon) in found.items():
        assert gradient == pytest.approx(EXPECTED[role][axis], abs=0.3), (role, found)
        assert epsilon == pytest.approx(EXPECTED[role][axis], abs=1e-9), role
    assert {"embedding", "attention_out", "expert_up", "expert_down"} <= set(found)


def test_an_epsilon_that_does_not_scale_misses_the_gradient() -> None:
    constant = _Hashable.of(changed("constant epsilon", **{role: {"eps": {}} for role in EXPECTED}))
    found = measured("mixtral", "width", constant)
    for role in ("embedding", "attention_out", "expert_down"):
        gradient, epsilon = found[role]
        assert abs(gradient - epsilon) > 0.3, found
