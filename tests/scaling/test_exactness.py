"""Folded training on the untouched model equals training with explicit multipliers on unfolded weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moe_param
from tests.models import KeepDouble, build, tiny_config, tokens
from tests.reference.multipliers import Ratios, add_multipliers, lines

LR, EPS, DECAY, STEPS = 3e-3, 1e-3, 0.1, 20
BASE = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
TARGET = {**BASE, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6, "num_hidden_layers": 4}
LORA = ({"q_lora_rank": 8, "kv_lora_rank": 8}, {"q_lora_rank": 24, "kv_lora_rank": 24})
HEADS = ({"head_dim": 8}, {"head_dim": 16})
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float, bool]] = {
    # name: family, base sizes, target sizes, head_dim ratio, normalized gates
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "intermediate_size": 16, **HEADS[0]},
        {"num_local_experts": 12, "num_experts_per_tok": 6, "intermediate_size": 48, **HEADS[1]},
        2.0,
        True,
    ),
    "mixtral_tied": (
        "mixtral",
        {"num_local_experts": 4, "intermediate_size": 16, "tie_word_embeddings": True},
        {"num_local_experts": 12, "num_experts_per_tok": 6, "intermediate_size": 48, "tie_word_embeddings": True},
        1.0,
        True,
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_local_experts": 4,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
            **HEADS[0],
        },
        {
            **{"num_local_experts": 12, "num_experts_per_tok": 6, "moe_intermediate_size": 48, "norm_topk_prob": True},
            **{"mlp_only_layers": [], **HEADS[1]},
        },
        2.0,
        True,
    ),
    "olmoe": (
        "olmoe",
        {"num_experts": 4, "intermediate_size": 16},
        {"num_experts": 12, "num_experts_per_tok": 6, "intermediate_size": 48},
        1.0,
        True,
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {"n_routed_experts": 4, "moe_intermediate_size": 16, "intermediate_size": 32, **LORA[0]},
        {
            **{"n_routed_experts": 12, "num_experts_per_tok": 6, "moe_intermediate_size": 48},
            **{"intermediate_size": 96, "topk_group": 2, **LORA[1]},
        },
        1.0,
        True,
    ),
    "deepseek_v3_unnormalized": (
        "deepseek_v3",
        {
            **{"n_routed_experts": 4, "moe_intermediate_size": 16, "intermediate_size": 32, "norm_topk_prob": False},
            **LORA[0],
        },
        {
            **{"n_routed_experts": 12, "num_experts_per_tok": 6, "moe_intermediate_size": 48, "norm_topk_prob": False},
            **{"intermediate_size": 96, "topk_group": 2, **LORA[1]},
        },
        1.0,
        False,
    ),
    "gpt_oss": (
        "gpt_oss",
        {"num_local_experts": 4, "intermediate_size": 16, "layer_types": ["full_attention"] * 2, **HEADS[0]},
        {
            **{"num_local_experts": 12, "num_experts_per_tok": 6, "intermediate_size": 48},
            **{"layer_types": ["full_attention"] * 4, **HEADS[1]},
        },
        2.0,
        True,
    ),
}


def train(model: Any, groups: list[dict[str, Any]], steps: int = STEPS) -> list[float]:
    return losses_of(model, torch.optim.AdamW(groups, betas=(0.9, 0.95)).step, steps)


def losses_of(model: Any, step: Callable[[], Any], steps: int = STEPS) -> list[float]:
    """The losses of training in float64, a `step` of the optimizer after every backward pass."""
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    losses = []
    with KeepDouble():
        for i in range(steps):
            batch = tokens(64, batch=2, length=12, seed=i % 4)
            loss = model(input_ids=batch, labels=batch).loss
            model.zero_grad()
            loss.backward()
            step()
            losses.append(loss.item())
    return losses


def check_weights(folded: Any, twin: Any, table: dict[str, Any], tolerance: float) -> None:
    """Every weight of the folded model is the twin's times what was folded into it."""
    weights = dict(folded.named_parameters())
    for name, p in twin.named_parameters():
        expected = p * table[name].multiplier
        error = (weights[name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error:.2e}"


def setup(case: str, spec: str = "moe-completep") -> tuple[Any, Any, Any, Ratios, bool]:
    family, base_sizes, target_sizes, d, normalized = CASES[case]
    base_config = tiny_config(family, **{**BASE, **base_sizes})
    folded = build(family, tiny_config(family, **{**TARGET, **target_sizes})).double()
    parameterization = moe_param.apply(folded, base_config, seed=1, experts=None, spec=spec)
    with torch.no_grad():  # leave the special points 0 and 1, where a wrong factor could hide
        for name, p in sorted(folded.named_parameters()):
            if p.dim() < 2 and p.requires_grad and not ("gate" in name or "router" in name):
                p.add_(
                    p.abs().mean().clamp(min=0.01)
                    * 0.1
                    * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
                )
    base = build(family, base_config)
    return folded, base, parameterization, Ratios(n=3.0, l=2.0, k=3.0, h=3.0, d=d), normalized


def explicit_twin(case: str, folded: Any, base: Any, r: Ratios, normalized: bool) -> tuple[Any, Any, dict[str, Any]]:
    family, _, target_sizes, _, _ = CASES[case]
    twin = build(family, tiny_config(family, **{**TARGET, **target_sizes})).double()
    table = lines(twin, base, r, normalized)
    weights = dict(folded.named_parameters())
    groups = []
    with torch.no_grad():
        for name, p in twin.named_parameters():
            rule = table[name]
            p.copy_(weights[name] / rule.multiplier)
            decay = DECAY / rule.lr if rule.decay else 0.0
            groups.append({"params": [p], "lr": LR * rule.lr, "eps": EPS * rule.eps, "weight_decay": decay})
    add_multipliers(twin, r, normalized)
    return twin, groups, table


@pytest.mark.parametrize("case", CASES)
def test_folded_training_equals_explicit_multipliers(case: str) -> None:
    folded, base, parameterization, r, normalized = setup(case)
    twin, groups, table = explicit_twin(case, folded, base, r, normalized)
    ours = train(folded, parameterization.param_groups(folded, lr=LR, eps=EPS, weight_decay=DECAY))
    theirs = train(twin, groups)
    assert ours[0] - ours[-1] > 0.05, "the run must go somewhere for the comparison to mean anything"
    assert ours == pytest.approx(theirs, rel=1e-9)
    check_weights(folded, twin, table, 1e-9)


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "deepseek_v3_unnormalized"])
@pytest.mark.parametrize("spec", ["standard", "mup", "completep"])
def test_other_parameterizations_do_not_pass_for_ours(case: str, spec: str) -> None:
    folded, base, parameterization, r, normalized = setup(case, spec)
    twin, groups, _ = explicit_twin(case, folded, base, r, normalized)
    ours = train(folded, parameterization.param_groups(folded, lr=LR, eps=EPS, weight_decay=DECAY), steps=4)
    theirs = train(twin, groups, steps=4)
    assert ours != pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("case", ["mixtral_tied", "deepseek_v3_unnormalized"])
def test_rates_without_folds_are_those_of_a_twin_whose_weights_are_larger(case: str) -> None:
    """Weights that were not trained under the rules are, in a model with multipliers a in its forward pass, 1/a times
    too large. Without folds every step is then 1/a times the table's, as large against its weight as the rules mean."""
    family, base_sizes, target_sizes, d, normalized = CASES[case]
    base_config = tiny_config(family, **{**BASE, **base_sizes})
    base, r = build(family, base_config), Ratios(n=3.0, l=2.0, k=3.0, h=3.0, d=d)
    plain = build(family, tiny_config(family, **{**TARGET, **target_sizes})).double()
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    twin, groups, table = explicit_twin(case, plain, base, r, normalized)
    for (_, line), group in zip(table.items(), groups, strict=True):
        group["lr"] /= line.multiplier
        group["weight_decay"] *= line.multiplier  # a step shrinks as before
    theirs = train(twin, groups, steps=8)
    losses = {}
    for folds in (False, True):
        plain.load_state_dict(start, strict=False)
        rates = moe_param.apply(plain, base_config, reinit=False, folds=folds)
        losses[folds] = train(plain, rates.param_groups(plain, lr=LR, eps=EPS, weight_decay=DECAY), steps=8)
    assert losses[False][0] - losses[False][-1] > 0.05
    assert losses[False] == pytest.approx(theirs, rel=1e-9)
    assert losses[True] != pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_initial_scales_are_those_of_the_tables(case: str) -> None:
    folded, base, parameterization, r, normalized = setup(case)
    for name, rule in lines(folded, base, r, normalized).items():
        ours = parameterization.rules[name]
        if ours.init_std is not None and "bias" not in name:
            assert ours.init_std == pytest.approx(0.02 * rule.std * rule.multiplier, rel=1e-12), name
            values = dict(build_again(case).named_parameters())[name].detach()
            spread = 5 / (2 * values.numel()) ** 0.5  # five standard errors of a sample standard deviation
            assert values.square().mean().sqrt().item() == pytest.approx(ours.init_std, rel=spread), name


_again: dict[str, Any] = {}


def build_again(case: str) -> Any:
    if case not in _again:
        family, base_sizes, target_sizes, _, _ = CASES[case]
        _again[case] = build(family, tiny_config(family, **{**TARGET, **target_sizes}))
        base_config = tiny_config(family, **{**BASE, **base_sizes})
        moe_param.apply(_again[case], base_config, seed=1, experts=None)
    return _again[case]
