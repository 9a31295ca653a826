"""Initial values: transformers' own law, decided by (seed, name) and by nothing else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import moe_param
from moe_param import Parameterization, scale_config
from moe_param.init import BLOCK
from tests.models import CORE, FAMILIES, build, classes, initialized, tiny_config

SOME = ("mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "jamba")


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def parameterized(family: str, seed: int = 1, **changes: Any) -> tuple[Any, Parameterization]:
    """A tiny model twice as wide, deep, many and large as its base."""
    base = tiny_config(family)
    shape = moe_param.Shape.from_config(base)
    target = scale_config(base, width=128, depth=2 * shape.depth, num_experts=16, expert_size=2 * shape.expert_size)
    model = build(family, target, seed=changes.pop("built", 0))
    return model, moe_param.apply(model, base, seed=seed, experts=None, **changes)


def pooled(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By name with the layer number left out: enough numbers to tell two distributions apart."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in values.items():
        found.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(tensor.flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Two-sample Kolmogorov-Smirnov statistic times √(nm/(n+m)): above 2.3 with probability 5e-5 for equal laws."""
    x, y = np.sort(a.double().numpy()), np.sort(b.double().numpy())
    both = np.concatenate([x, y])
    gap = np.abs(np.searchsorted(x, both, side="right") / len(x) - np.searchsorted(y, both, side="right") / len(y))
    return float(gap.max() * math.sqrt(len(x) * len(y) / (len(x) + len(y))))


# -- at the base: what transformers does -----------------------------------------------------------------------------
@pytest.mark.parametrize("family", CORE)
def test_at_the_base_the_initialization_is_that_of_transformers(family: str) -> None:
    config = tiny_config(initialized(family), initializer_range=0.035)
    theirs = pooled(weights(build(family, config)))
    model = build(family, config, seed=1)
    built = pooled(weights(model))
    parameterization = moe_param.apply(model, config, seed=7, experts=None)
    ours = pooled(weights(model))
    random = 0
    for name, values in ours.items():
        if torch.equal(theirs[name], built[name]):  # transformers itself draws no numbers
            assert torch.equal(values, theirs[name]), name
        else:
            random += 1
            assert not torch.equal(values, built[name]), name
            if values.numel() > 100:
                assert distance(values, theirs[name]) < 2.3, name
            if values.numel() > 2000:
                assert distance(values * 1.5, theirs[name]) > 2.3, name
            if values.numel() > 1000 and not name.endswith("out_proj.weight"):
                assert values.std().item() == pytest.approx(0.035, rel=0.05), name
    assert random >= 8
    stds = {r.init_std for n, r in parameterization.rules.items() if "out_proj" not in n and r.init_std is not None}
    assert stds == {0.035}
    assert {(r.lr, r.eps, r.multiplier) for r in parameterization.rules.values() if r.lr} == {(1.0, 1.0, 1.0)}


# -- away from it: the law of the rule -------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "ernie4_5_moe"])
def test_values_follow_their_rule(family: str) -> None:
    model, parameterization = parameterized(initialized(family))
    rules = parameterization.rules
    for name, values in weights(model).items():
        rule = rules[name]
        if rule.constant is not None:
            assert torch.equal(values, torch.full_like(values, rule.constant)), name
        elif rule.init_std is not None:
            assert values.double().square().mean().sqrt().item() == pytest.approx(
                rule.init_std, rel=5 / math.sqrt(2 * values.numel())
            ), name
            assert abs(values.double().mean().item()) < 5 * rule.init_std / math.sqrt(values.numel()), name


def test_a_rescaled_uniform_law_is_scaled_from_the_base() -> None:
    """Nemotron-H draws out_proj from U(±1/√fan_in)/√layers, here at fan-in 128 and 6 layers. The rule scales that law
    of the base, not the target's own: fan-in ×2 gives 1/√2, depth ×2 gives 1/2."""
    model, _ = parameterized("nemotron_h")
    name = "model.layers.0.mixer.out_proj.weight"
    half_width = 1 / math.sqrt(128) / math.sqrt(6) / math.sqrt(2) / 2
    values = weights(model)[name]
    assert values.abs().max().item() == pytest.approx(half_width, rel=1e-3)
    assert values.std().item() == pytest.approx(half_width / math.sqrt(3), rel=0.02)


def test_init_std_and_constants_multiply() -> None:
    plain = weights(parameterized("mixtral")[0])
    double = weights(parameterized("mixtral", init_std=0.04)[0])
    quarter = weights(parameterized("mixtral", constants={"expert_down": {"init": 0.25}, "router": {"lr": 2.0}})[0])
    for name, values in plain.items():
        random = "norm" not in name
        torch.testing.assert_close(double[name], 2 * values if random else values, rtol=1e-6, atol=0)
        factor = 0.25 if name.endswith("experts.down_proj") else 1.0
        torch.testing.assert_close(quarter[name], factor * values, rtol=1e-6, atol=0)


# -- decided by seed and name alone ----------------------------------------------------------------------------------
@pytest.mark.parametrize("family", SOME)
def test_the_values_do_not_depend_on_what_was_there_or_on_the_global_generator(family: str) -> None:
    first = weights(parameterized(family, built=0)[0])
    torch.manual_seed(1234)
    model, _ = parameterized(family, built=5)
    assert same(weights(model), first)
    other = weights(parameterized(family, seed=2)[0])
    drawn = {n for n, values in first.items() if values.numel() > 1 and values.unique().numel() > 1}
    changed = {n for n in drawn if not torch.equal(other[n], first[n])}
    assert drawn - changed == {n for n in drawn if n.endswith("A_log")}  # a fixed ramp, not random


def test_the_global_generator_is_left_alone_when_a_seed_is_given() -> None:
    for family in ("mixtral", "nemotron_h"):  # the second has parameters that transformers itself draws
        model = build(family)
        state = torch.get_rng_state()
        moe_param.apply(model, model.config, seed=1, experts=None)
        assert torch.equal(torch.get_rng_state(), state)
        moe_param.apply(build(family), model.config, experts=None)
        assert not torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_the_global_generator_decides() -> None:
    def once(seed: int) -> dict[str, torch.Tensor]:
        model = build("mixtral")
        torch.manual_seed(seed)
        moe_param.apply(model, tiny_config("mixtral"), experts=None)
        return weights(model)

    assert same(once(3), once(3))
    assert not same(once(3), once(4))


def test_no_two_parameters_get_the_same_numbers() -> None:
    model, _ = parameterized("mixtral")
    starts: dict[tuple[float, ...], str] = {}
    for name, values in weights(model).items():
        if "norm" in name:
            continue
        slices = values if values.dim() == 3 else values[None]
        for i, part in enumerate(slices):
            unit = (part.flatten()[:64] / part.flatten()[0]).tolist()
            assert tuple(unit) not in starts, f"{name}[{i}] repeats {starts[tuple(unit)]}"
            starts[tuple(unit)] = f"{name}[{i}]"
    assert len(starts) > 8 * 2 * 16


def test_one_experts_values_do_not_depend_on_how_many_there_are() -> None:
    def experts(count: int) -> dict[str, torch.Tensor]:
        config = tiny_config("mixtral", num_local_experts=count, num_experts_per_tok=count // 4)
        model = build("mixtral", config)
        moe_param.apply(model, config, seed=1, experts=None)
        return {n: p for n, p in weights(model).items() if ".experts." in n}

    few, many = experts(8), experts(24)
    for name, values in few.items():
        assert torch.equal(many[name][:8], values), name
        assert not torch.equal(many[name][8:16], values), name


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_values_do_not_depend_on_threads_order_or_layout() -> None:
    """An embedding of several blocks, and one whose block does not divide it."""
    config = tiny_config("mixtral", vocab_size=3 * BLOCK // 64 + 7, num_hidden_layers=2)
    assert config.vocab_size * 64 > 3 * BLOCK
    one, two, three = (build("mixtral", config) for _ in range(3))
    with threads(1):
        moe_param.apply(one, config, seed=1, experts=None)
    with threads(2):
        moe_param.apply(two, config, seed=1, experts=None)
    assert same(weights(one), weights(two))
    for module in three.modules():  # another order of everything, and columns where rows were contiguous
        for store in (module._modules, module._parameters):
            items = list(store.items())
            store.clear()
            store.update(reversed(items))  # type: ignore[arg-type]
    for p in three.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()
    assert [n for n, _ in three.named_parameters()] != [n for n, _ in one.named_parameters()]
    moe_param.apply(three, config, seed=1, experts=None)
    assert same(weights(three), weights(one))


@pytest.mark.parametrize("family", SOME)
def test_a_model_made_on_the_meta_device_gets_the_same_values(family: str) -> None:
    config = tiny_config(family)
    here = build(family, config)
    moe_param.apply(here, config, seed=1, experts=None)
    with torch.device("meta"):
        there = classes(family)[0](config)
    with pytest.raises(ValueError, match="meta device"):
        moe_param.apply(there, config, seed=1, experts=None)
    there.to_empty(device="cpu")
    there.init_weights()
    moe_param.apply(there, config, seed=1, experts=None)
    assert same(weights(there), weights(here))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_holds_the_same_values_rounded(dtype: torch.dtype) -> None:
    for family in ("gpt_oss", "jamba"):
        single = weights(parameterized(family)[0])
        base = tiny_config(family)
        shape = moe_param.Shape.from_config(base)
        target = scale_config(base, width=128, depth=2 * shape.depth, num_experts=16, expert_size=2 * shape.expert_size)
        model: Any = build(family, target)
        model.to(dtype)
        moe_param.apply(model, base, seed=1, experts=None)
        for name, values in weights(model).items():
            assert values.dtype == dtype
            assert torch.equal(values, single[name].to(dtype)), name


# -- special parameters ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", SOME)
def test_the_padding_row_stays_zero(family: str) -> None:
    model, _ = parameterized(family)
    embedding = model.get_input_embeddings()
    if family == "nemotron_h":  # has no padding row
        assert embedding.padding_idx is None
        return
    assert embedding.padding_idx == 0
    assert not embedding.weight[0].any()
    assert embedding.weight[1:].all(dim=1).all()


def test_state_space_parameters_keep_the_law_transformers_gives_them() -> None:
    """Gu & Dao: A = -(1, 2, …), time steps log-uniform; neither depends on the scale."""
    jamba, _ = parameterized("jamba")
    ramp = torch.log(torch.arange(1, 17).float())
    found = [p for n, p in jamba.named_parameters() if n.endswith("A_log")]
    assert len(found) == 4
    for p in found:
        assert p.shape == (256, 16)
        torch.testing.assert_close(p.detach(), ramp.expand(256, 16), rtol=1e-6, atol=0)

    config = tiny_config("nemotron_h", mamba_num_heads=512, mamba_head_dim=1)
    steps = []
    for seed in (1, 2, 1):
        model = build("nemotron_h", config, seed=10 + seed)
        moe_param.apply(model, config, seed=seed, experts=None)
        steps.append([p.detach().clone() for n, p in model.named_parameters() if n.endswith("dt_bias")])
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                torch.testing.assert_close(p.detach(), torch.log(torch.arange(1, 513).float()), rtol=1e-6, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(steps[0], steps[2]))
    assert not any(torch.equal(a, b) for a, b in zip(steps[0], steps[1]))
    assert not torch.equal(steps[0][0], steps[0][1]), "two layers got the same time steps"
    position = torch.log(nn.functional.softplus(torch.cat(steps[0] + steps[1]).double()))
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    uniform = torch.linspace(low, high, 4096, dtype=torch.float64)
    assert distance(position, uniform) < 2.3
    assert distance(position, torch.linspace(low, high + 1, 4096, dtype=torch.float64)) > 2.3


class Head(PreTrainedModel):
    """A plain head on a model that initializes parts of its own."""

    config_class = classes("glm5_next")[1] if "glm5_next" in FAMILIES else None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = classes("glm5_next")[0](config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        return self.lm_head(self.model(input_ids, **options).last_hidden_state)


@pytest.mark.skipif("glm5_next" not in FAMILIES, reason="this transformers has no glm5_next")
def test_a_part_with_an_initialization_of_its_own_is_asked_for_it() -> None:
    """What the outer model's initializer does not know kept the memory it was built in, NaN among it."""
    inner = build("glm5_next")
    moe_param.apply(inner, inner.config, seed=1)
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = Head(tiny_config("glm5_next"))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(math.nan)
        moe_param.apply(model, model.config, seed=seed, reinit=True)
        assert all(p.isfinite().all() for p in model.parameters())
        values.append(torch.cat([p.detach() for n, p in model.named_parameters() if n.endswith("dt_bias")]))
        steps = torch.log(nn.functional.softplus(values[-1].double()))
        assert math.log(1e-3) - 1e-3 < steps.min() < steps.max() < math.log(1e-1) + 1e-3
    assert not torch.equal(*values)


# -- sharded: see tests/distributed ----------------------------------------------------------------------------------
def test_seeds_are_derived_from_all_three() -> None:
    from moe_param.init import derive

    found = {derive(s, n, r) for s in range(5) for n in ("a", "b", "ab", "a1", "1") for r in range(20)}
    assert len(found) == 5 * 5 * 20
    assert all(0 <= seed < 2**63 for seed in found)
