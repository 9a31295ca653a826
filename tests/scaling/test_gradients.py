"""Adam's epsilon follows the scale of the gradient: measured slopes against the exponents of the tables."""

from __future__ import annotations

import copy
import functools
import math
from collections import defaultdict
from typing import Any

import pytest
import torch

import moe_param
from moe_param import ScalingSpec
from moe_param.structure.adapters import COARSER
from moe_param.structure.roles import UNTRAINED, read_structure
from tests.models import build, classes, tiny_config, tokens
from tests.scaling.test_scales import BASE, FAMILIES, _Hashable, changed

Settings = dict[str, Any]
MEASURED: dict[str, tuple[Settings, dict[str, dict[str, float]]]] = {
    # family: (its config, constants of the base)
    "mixtral": (FAMILIES["mixtral"], {}),
    "qwen3_moe": (FAMILIES["qwen3_moe"], {}),
    "gpt_oss": (FAMILIES["gpt_oss"], {}),
    "ernie4_5_moe": (  # a dense layer, shared experts, biases everywhere, a tied head
        {"use_bias": True, "moe_num_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 32},
        {},
    ),
    "phimoe": (  # norms and an output head with biases
        {"num_local_experts": 8, "intermediate_size": 32, "attention_bias": True, "lm_head_bias": True},
        {},
    ),
    "afmoe": (  # norms behind the branches. From an embedding of size 1: they add 1 to what would start at 0.02, and
        {  # how fast the stream grows from there hides what depth does
            **{"num_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 32, "head_dim": 16},
            **{"layer_types": ["full_attention"] * 2},
        },
        {"embedding": {"init": 50.0}},
    ),
}
AXES = ("width", "depth", "num_experts", "expert_size")

# Gradient scales as derived from the papers' desiderata, unfolded: exponents along `AXES`; top_k follows num_experts,
# dense MLPs follow the width, shared experts the expert size.
EXPECTED = {
    "embedding": (-1, 0, 0, 0),
    "unembedding": (-1, 0, 0, 0),
    "attention_in": (-1, -1, 0, 0),
    "attention_value": (-1, -1, 0, 0),
    "attention_out": (-1, -1, 0, 0),
    "router": (0, -1, -1, 0),
    "expert_up": (0, -1, -1, -1),
    "expert_down": (-1, -1, -1, 0),
    "shared_up": (0, -1, 0, -1),
    "shared_down": (-1, -1, 0, 0),
    "dense_up": (-1, -1, 0, 0),
    "dense_down": (-1, -1, 0, 0),
    "norm": (-1, -1, 0, 0),
    "post_norm": (-1, -1, 0, 0),
    "query_norm": (0, -1, 0, 0),
    "key_norm": (0, -1, 0, 0),
    "final_norm": (-1, 0, 0, 0),
    "bias of unembedding": (0, 0, 0, 0),  # behind the factor on the logits
    "bias of embedding": (0, 0, 0, 0),  # the same of a tied head
}
CASES = [(f, axis) for f in MEASURED for axis in AXES if (f, axis) != ("phimoe", "num_experts")]  # its top_k is 2
BIASED = set(EXPECTED) - {
    "attention_value",
    "post_norm",
    "query_norm",
    "key_norm",
    "bias of unembedding",
    "bias of embedding",
}
THEORY_LESS = ("other", "other_out")


def expected(label: str, axis: str) -> int:
    return EXPECTED.get(label, EXPECTED[label.removeprefix("bias of ")])[AXES.index(axis)]


@functools.cache
def measured(family: str, axis: str, spec: str | ScalingSpec = "moe-completep") -> dict[str, tuple[float, list[float]]]:
    """{role, or `bias of` the role of its linear: (slope of the unfolded gradient's RMS after 2 steps, slope of the
    unfolded epsilon of every parameter)}."""
    sizes, constants = MEASURED[family]
    config = tiny_config(family, **BASE, **sizes)
    shape = moe_param.Shape.from_config(config)
    points: dict[str, list[tuple[float, float, list[float]]]] = defaultdict(list)
    for factor in (1, 2, 8):
        scaled = moe_param.scale_config(config, **{axis: getattr(shape, axis) * factor})
        labels = _labels(family, scaled)
        squares: dict[str, list[float]] = defaultdict(list)
        epsilons: dict[str, set[float]] = defaultdict(set)
        for seed in range(2):
            model = build(family, copy.deepcopy(scaled))
            parameterization = moe_param.apply(
                model, config, seed=seed, experts=None, spec=spec, constants=constants, reinit=True
            )
            optimizer = torch.optim.AdamW(parameterization.param_groups(model, lr=2**-8, eps=1e-12))
            batch = tokens(128, 4, 32, seed)
            for _ in range(3):
                optimizer.step()
                optimizer.zero_grad()
                model(input_ids=batch, labels=batch).loss.backward()
            for name, p in model.named_parameters():
                rule = parameterization.rules[name]
                if p.grad is not None and rule.role not in (*UNTRAINED, *THEORY_LESS):
                    squares[labels[name]].append(p.grad.square().mean().item() * rule.multiplier**2)
                    epsilons[labels[name]].add(round(math.log(rule.eps * rule.multiplier), 9))
        for label, values in squares.items():
            rms = math.sqrt(sum(values) / len(values))
            points[label].append((math.log(factor), math.log(rms), sorted(epsilons[label])))
    return {
        label: (
            slope([(x, y) for x, y, _ in p]),
            [slope([(x, eps[i]) for x, _, eps in p]) for i in range(len(p[0][2]))],
        )
        for label, p in points.items()
    }


def _labels(family: str, config: Any) -> dict[str, str]:
    parameters = read_structure(classes(family)[0], config).parameters
    # A bias of keys gets no gradient (softmax does not see it): those of queries and values are measured together.
    of = {n: COARSER.get(i.role, i.role) for n, i in parameters.items()}
    return {n: f"bias of {of[i.of]}" if i.of else i.role for n, i in parameters.items()}


def slope(points: list[tuple[float, float]]) -> float:
    x0 = sum(x for x, _ in points) / len(points)
    return sum((x - x0) * y for x, y in points) / sum((x - x0) ** 2 for x, _ in points)


@pytest.mark.parametrize(("family", "axis"), CASES)
def test_gradients_scale_as_the_table_says(family: str, axis: str) -> None:
    found = measured(family, axis)
    for label, (gradient, epsilons) in found.items():
        assert gradient == pytest.approx(expected(label, axis), abs=0.3), (label, found)
        assert epsilons == pytest.approx([expected(label, axis)] * len(epsilons), abs=1e-6), (label, found)


def test_every_row_is_measured_or_says_that_it_is_not() -> None:
    """Which rows claim to be checked here, and which are."""
    seen = set().union(*(measured(family, "width") for family in MEASURED))
    assert {label.removeprefix("bias of ") for label in seen if label.startswith("bias of ")} == BIASED
    roles = {label for label in seen if not label.startswith("bias of ")} | {"bias"}
    table = ScalingSpec.load("moe-completep").roles
    assert {role for role, row in table.items() if "checked in tests/scaling/test_gradients.py" in row.source} == roles
    assert all("no theory" in table[role].source for role in table.keys() - roles)


def test_an_epsilon_that_does_not_scale_misses_the_gradient() -> None:
    roles = [role for role in EXPECTED if not role.startswith("bias of ")]
    constant = _Hashable.of(changed("constant epsilon", **{role: {"eps": {}} for role in roles}))
    for family in ("mixtral", "ernie4_5_moe"):
        found = measured(family, "width", constant)
        for label in found.keys() & {"embedding", "attention_out", "expert_down", "dense_down", "bias of dense_up"}:
            gradient, epsilons = found[label]
            assert all(abs(gradient - epsilon) > 0.3 for epsilon in epsilons), (label, found)


PRINTED = {  # arXiv:2601.20205, Table 2, by hand: exponents along `AXES`
    "embedding": (-1, 0, 0, 0),
    "unembedding": (-1, 0, 0, 0),
    "attention_in": (-1, -1, 0, 0),
    "attention_out": (-1, -1, 0, 0),
    "router": (-1, -1, 0, 0),
    "expert_up": (0, -1, 0, -1),
    "expert_down": (1, -1, 0, -2),
    "norm": (0, 0, 0, 0),
    "final_norm": (0, 0, 0, 0),
}


@pytest.mark.parametrize("axis", ["num_experts", "expert_size"])
def test_the_epsilons_that_the_paper_prints_and_where_they_miss_the_gradient(axis: str) -> None:
    """`table2` is the paper's table; along the number of experts it leaves out the 1/top_k that gradients have, and
    along the expert size by itself the gradient of expert down stays where its epsilon falls."""
    found = measured("mixtral", axis, "table2")
    for label, exponents in PRINTED.items():
        assert found[label][1] == pytest.approx([exponents[AXES.index(axis)]] * len(found[label][1]), abs=1e-6), label
    missed = {label for label, (gradient, epsilons) in found.items() if abs(gradient - epsilons[0]) > 0.5}
    assert missed == {"num_experts": {"router", "expert_up", "expert_down"}, "expert_size": {"expert_down"}}[axis]


def test_the_bias_of_a_linear_that_is_not_trained_has_no_epsilon_to_take() -> None:
    model_class, _ = classes("gpt_oss")

    class Frozen(model_class):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers[0].self_attn.o_proj.weight.requires_grad_(False)

    config = tiny_config("gpt_oss")
    with pytest.raises(
        moe_param.ParameterizationError, match=r"epsilon of model\.layers\.0\.self_attn\.o_proj\.weight"
    ):
        moe_param.plan(Frozen, config, config)
    moe_param.plan(Frozen, config, config, spec="standard")
