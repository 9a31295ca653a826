"""Every family whose experts can be read, and models of a user's own: independent evidence for what structure says."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import moe_param
from moe_param import ParameterizationError
from moe_param.structure.adapters import adapter_for, adapters
from moe_param.structure.dispatch import find_layers
from moe_param.structure.observations import Trace
from moe_param.structure.roles import Structure, read_structure
from moe_param.structure.shape import Shape, measure
from moe_param.structure.trace import trace_model
from tests.models import (
    ALL_FAMILIES,
    CORE,
    DENSE,
    FAMILIES,
    OWN_EXPERTS,
    KeepDouble,
    base_of,
    build,
    classes,
    families,
    initialized,
    inputs,
    last,
    output,
    resized,
    tiny_config,
    tokens,
)
from tests.scaling.test_exactness import CASES

AXES = ("width", "depth", "num_experts", "expert_size")

REFUSED = {
    # (family, axis): a word of the reason the user is given
    ("inkling2", "depth"): "attention over the outputs of earlier layers",
    ("inkling2_loop", "depth"): "attention over the outputs of earlier layers",
    ("jetmoe", "num_experts"): "as many heads as experts per token",
    ("longcat_flash", "depth"): "zero experts",
    ("muse_spark", "depth"): "without weights",
    ("phimoe", "num_experts"): "sparsemixer",
    ("qwen4_exp", "depth"): "n-gram",
    ("zaya", "num_experts"): "one expert per token",
}

MIXED_STREAMS = {"deepseek_v4", "glm5_next", "hy_v4", "qwen4_exp"}
"""Hyper-connections mix several streams: the stack is not the identity when its branches are silent."""

NOT_IDENTITY = {
    **dict.fromkeys(MIXED_STREAMS, "hyper-connections mix several streams"),
    "beam": "its constants rescale the stream",
    "minimax": "the residual is the normalized stream",
    "muse_spark": "learned gates rescale the stream, and no weight closes a branch",
    "longcat_flash": "its zero experts add the normalized stream",
    **dict.fromkeys(("inkling2", "inkling2_loop"), "its residual is an attention over earlier layers"),
}


NO_CLOSERS = {"inkling2", "inkling2_loop", "longcat_flash", "muse_spark"}
"""No weights close all of their branches, and depth is refused."""


@functools.cache
def structure_of(family: str) -> tuple[Any, Structure, Trace, Shape]:
    model_class, _ = classes(family)
    config = tiny_config(family)
    model, trace = trace_model(model_class, config)
    return config, read_structure(model_class, config), trace, measure(model, trace)


def real_model(family: str) -> Any:
    """A small real model in float64, moved off the special values of its initialization."""
    model = build(family).double().eval()
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


@contextmanager
def scaled(model: Any, names: tuple[str, ...] | list[str], factor: float, offsets: set[str]) -> Iterator[None]:
    """The named parameters times a factor; gains of the form 1 + w so that the gain is multiplied."""
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in names}
    with torch.no_grad():
        for name in names:
            shift = 1.0 if name in offsets else 0.0
            parameters[name].copy_((parameters[name] + shift) * factor - shift)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def stream(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(input, output) of every decoder layer for one fixed batch."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        seen.append((before.detach().clone(), (out[0] if isinstance(out, tuple) else out).detach().clone()))

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in find_layers(model)[1]]
    with torch.no_grad(), KeepDouble():
        output(model, tokens(100, 2, 12))
    for handle in handles:
        handle.remove()
    return seen


def closers(structure: Structure) -> list[str]:
    return [name for name, info in structure.parameters.items() if "residual_branch" in info.sites]


def offsets(structure: Structure) -> set[str]:
    return {name for name, info in structure.parameters.items() if info.offset}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_role_at_tiny_size(family: str) -> None:
    config, structure, _, shape = structure_of(family)
    names = {name for name, _ in build(family, copy.deepcopy(config)).named_parameters()}
    assert set(structure.parameters) == names
    assert shape.num_experts == 8
    roles = {info.role for info in structure.parameters.values()}
    assert {"embedding", "router", "expert_up", "expert_down"} <= roles


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(NOT_IDENTITY)))
def test_silent_branches_leave_the_residual_stream_alone(family: str) -> None:
    _, structure, _, _ = structure_of(family)
    model = real_model(family)
    with scaled(model, closers(structure), 0.0, offsets(structure)):
        for before, after in stream(model):
            if family == "zaya":  # learned scales of the stream itself
                assert torch.allclose(after / before, (after / before)[:1, :1].expand_as(after))
            else:
                assert torch.allclose(before, after, atol=1e-12), family
    changed = stream(model)[0]
    assert not torch.allclose(*changed, atol=1e-3), "the branches were silent to begin with"


def inside(structure: Structure) -> list[str]:
    """Matrices in front of those that close a branch: of mixers without a role those that read one stream, since what
    mixes several streams is no branch."""
    roles = ("attention_in", "router", "expert_up", "shared_up", "dense_up")
    return [
        name
        for name, info in structure.parameters.items()
        if info.role in roles or (info.role == "other" and info.fan_in == structure.shape.width)
    ]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) & set(NOT_IDENTITY) - NO_CLOSERS))
def test_nothing_inside_silent_branches_reaches_the_stream(family: str) -> None:
    """Where the stack is not the identity without its branches, closing them still shuts off all that is in them.

    In some no weights close the branches (`NO_CLOSERS`): there depth is refused.
    """
    _, structure, _, _ = structure_of(family)
    model = real_model(family)
    with scaled(model, inside(structure), 3.0, set()):
        heard = stream(model)
    assert not torch.allclose(heard[-1][1], stream(model)[-1][1], atol=1e-3), "the branches were silent to begin with"
    with scaled(model, closers(structure), 0.0, offsets(structure)):
        silent = stream(model)
        with scaled(model, inside(structure), 3.0, set()):
            for (_, before), (_, after) in zip(silent, stream(model), strict=True):
                assert torch.allclose(before, after, atol=1e-12), family


NOT_CLOSED = {
    "longcat_flash": "its zero experts add the normalized stream, whose gain also stands in front of the experts",
    "zaya": "learned scales of the stream itself",
}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(NOT_IDENTITY) - set(NOT_CLOSED)))
def test_closing_weights_scale_their_branch(family: str) -> None:
    """With the other branches of a layer silent, what the layer adds scales by c with the weights that close it."""
    _, structure, trace, _ = structure_of(family)
    model = real_model(family)
    shifted = offsets(structure)
    first_moe = min(info.layer for info in structure.parameters.values() if info.role == "expert_down")
    for branch in [b for b in trace.branches if b.layer == first_moe]:
        others = [n for n in closers(structure) if n not in branch.closers]
        with scaled(model, others, 0.0, shifted):
            before, after = stream(model)[first_moe]
            with scaled(model, branch.closers, 3.0, shifted):
                _, tripled = stream(model)[first_moe]
        assert (after - before).abs().max() > 1e-6, branch
        assert torch.allclose(tripled - before, 3.0 * (after - before), rtol=1e-9, atol=1e-10), branch


@pytest.mark.parametrize("family", sorted(set(OWN_EXPERTS) - {"jetmoe", "longcat_flash"}))
def test_twice_as_many_experts_that_are_alike_add_as_much(family: str) -> None:
    """With all experts the same, twice as many of twice as many add what half of them do: by themselves where gates are
    normalized, otherwise with the multiplier 1/r_K, wherever the gates stand (in llama4 in front of a nonlinearity)."""
    one, folded, bare = (added_by_experts(family, factor, fold) for factor, fold in ((1, True), (2, True), (2, False)))
    assert folded / one == pytest.approx(1.0, rel=0.1)
    assert bare / one == pytest.approx(2.0 if family in UNNORMALIZED else 1.0, rel=0.1)


UNNORMALIZED = {"llama4", "own_stacked"}
"""Their gates are sigmoids."""


def added_by_experts(family: str, factor: int, fold: bool) -> float:
    """Root mean square of what the experts of the first MoE layer add to the stream, all of them alike."""
    config, _, _, shape = structure_of(family)
    target = resized(family, config, num_experts=factor * (shape.num_experts or 0))
    rules = moe_param.plan(classes(family)[0], target, base_of(family, config, shape)).rules
    stacked = trace_model(classes(family)[0], target)[1].stacked
    model = build(family, target).double().eval()
    structure = read_structure(classes(family)[0], target)
    names = {name for name, info in structure.parameters.items() if info.role in ("expert_up", "expert_down")}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if structure.parameters[name].role == "embedding":
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype))
            if name in names:
                experts = p.view(stacked.get(name, p.shape[0] if p.dim() == 3 else 1), -1, p.shape[-1])
                generator = torch.Generator().manual_seed(len(structure.parameters[name].role))
                alike = 0.3 * torch.randn(experts.shape[1:], generator=generator, dtype=p.dtype)
                experts.copy_(alike * (rules[name].multiplier if fold else 1.0))
    layer = min(info.layer or 0 for name, info in structure.parameters.items() if name in names)
    with scaled(model, [name for name in closers(structure) if name not in names], 0.0, offsets(structure)):
        before, after = stream(model)[layer]
    return (after - before).square().mean().sqrt().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logit_fold_scales_the_logits(family: str) -> None:
    _, structure, _, _ = structure_of(family)
    model = real_model(family)
    names = [name for name, info in structure.parameters.items() if "logits" in info.sites]
    assert names
    batch = tokens(100, 2, 12)
    with torch.no_grad(), KeepDouble():
        once = output(model, batch)
        with scaled(model, names, 3.0, offsets(structure)):
            thrice = output(model, batch)
        assert torch.allclose(_uncapped(model, thrice), 3.0 * _uncapped(model, once), rtol=1e-9, atol=1e-10)


def _uncapped(model: Any, logits: torch.Tensor) -> torch.Tensor:
    """Undoes the soft cap some families put on their logits."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return torch.atanh(logits / cap) * cap if cap and model.get_output_embeddings() is not None else logits


NO_QUERY_FOLD = {
    "axk2": "one matrix makes queries and output gates",
    "dbrx": "no weight scales the queries",  # clamped behind the projection
    "deepseek_v4": "no weight scales the queries",  # normed without a gain
    # scaled, and then clipped at a length
    **dict.fromkeys(("inkling2", "inkling2_loop"), "no weight scales the queries"),
    "llama4": "no weight scales the queries",  # normed without a gain
    "muse_spark": "no weight scales the queries",  # normed without a gain
    "zaya": "share their convolutions",
}


SCALED_TWICE = {"openai_privacy_filter"}
"""`scaling` stands on queries and keys both."""


@pytest.mark.parametrize("family", sorted(set(NO_QUERY_FOLD) & set(FAMILIES)))
def test_head_dim_cannot_change_where_queries_cannot_be_scaled(family: str) -> None:
    config, structure, _, _ = structure_of(family)
    assert NO_QUERY_FOLD[family] in structure.gaps["attention_logits"]
    smaller = {"qk_nope_head_dim": 8} if hasattr(config, "qk_nope_head_dim") else {"head_dim": 16}
    smaller = {"n_heads": 3} if family == "dbrx" else smaller
    model_class, _ = classes(family)
    with pytest.raises(ParameterizationError, match=NO_QUERY_FOLD[family]):
        moe_param.plan(model_class, config, tiny_config(family, **smaller))
    moe_param.plan(model_class, config, tiny_config(family))  # nothing to fold at the base's own head_dim


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(NO_QUERY_FOLD)))
def test_the_query_fold_scales_the_attention_logits(family: str) -> None:
    """Multiplying what makes the queries by c is multiplying `scaling` by c."""
    _, structure, _, _ = structure_of(family)
    assert "attention_logits" not in structure.gaps
    names = [name for name, info in structure.parameters.items() if "attention_logits" in info.sites]
    model = real_model(family)
    batch = tokens(100, 2, 12)
    with torch.no_grad(), KeepDouble():
        with scaled(model, names, 2.0, offsets(structure)):
            folded = output(model, batch)
        factors = [m for name, m in model.named_modules() if has_scaling(m) and "index" not in name]
        for module in factors:
            module.scaling *= 2.0 ** (0.5 if family in SCALED_TWICE else 1.0)
        with nullcontext() if factors else HotterScores(2.0):
            assert torch.allclose(output(model, batch), folded, rtol=1e-8, atol=1e-9)


def has_scaling(module: Any) -> bool:
    return isinstance(getattr(module, "scaling", None), float)


class HotterScores(TorchFunctionMode):
    """Attention scores times a factor, for models without a `scaling`: what a softmax over four dimensions is given."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.softmax and args[0].dim() == 4:
            args = (args[0] * self.factor, *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("family", families(FAMILIES, {*CORE, *(family for family, _ in REFUSED)}))
def test_every_axis_is_scaled_or_refused_with_a_reason(family: str, axis: str) -> None:
    model_class, _ = classes(family)
    config, _, _, shape = structure_of(family)
    sizes = {axis: 2 * getattr(shape, axis)}
    if (family, axis) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family, axis]):
            moe_param.plan(model_class, moe_param.scale_config(config, **sizes, model_class=model_class), shape)
        return
    target = resized(family, config, **sizes)
    parameterization = moe_param.plan(model_class, target, base_of(family, config, shape))
    assert getattr(parameterization.shape, axis) == 2 * getattr(shape, axis)
    assert parameterization.base_shape == shape
    moved = [rule for rule in parameterization.rules.values() if (rule.lr, rule.eps) != (1.0, 1.0) and rule.lr]
    assert moved
    assert len({(r.lr, r.eps, r.weight_decay) for r in parameterization.rules.values()}) <= 13  # frozen included


EXACT = {family for family, *_ in CASES.values()}
"""tests/scaling/test_exactness.py has these, over 20 steps."""


@pytest.mark.parametrize("family", families(FAMILIES, set(CORE) - EXACT))
def test_folded_training_equals_explicit_multipliers(family: str) -> None:
    """Five AdamW steps in float64, all axes moved that the family has, against raw weights whose multipliers are
    applied in every forward pass. (That the multipliers stand at the right weights is what the tests above show.)"""
    model_class, _ = classes(initialized(family))
    config, _, _, shape = structure_of(family)
    sizes = grown(family, shape)
    model = model_class(resized(family, config, **sizes)).double().eval()
    parameterization = moe_param.apply(model, base_of(family, config, shape), seed=0, experts="eager")
    rules, lr, eps = parameterization.rules, 1e-3, 1e-4
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    raw: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            shift = 1.0 if name in shifted_gains(family) else 0.0
            raw[name] = ((p + shift) / rules[name].multiplier - shift).requires_grad_(p.requires_grad)
    groups = []
    for name in trained:
        rule = rules[name]
        rate = lr * rule.lr / rule.multiplier
        decay = 0.1 * lr / rate if rule.weight_decay else 0.0
        groups.append(
            {"params": [raw[name]], "lr": rate, "eps": eps * rule.eps * rule.multiplier, "weight_decay": decay}
        )
    explicit = torch.optim.AdamW(groups)
    folded = torch.optim.AdamW(parameterization.param_groups(model, lr=lr, eps=eps, weight_decay=0.1))
    twin = copy.deepcopy(model)
    head = torch.randn(100, model.get_input_embeddings().weight.shape[1], dtype=torch.float64) / 30

    def loss_of(module: Any, weights: dict[str, torch.Tensor] | None, batch: torch.Tensor) -> torch.Tensor:
        given = inputs(model, batch)
        out = (
            module(**given) if weights is None else torch.func.functional_call(module, weights, (), given, strict=False)
        )
        logits = last(model, out)
        logits = logits if model.get_output_embeddings() is not None else logits @ head.T
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    with KeepDouble():
        for step in range(5):
            batch = tokens(100, 2, 12, seed=step)
            ours = loss_of(model, None, batch)
            weights = {}
            for name, value in raw.items():
                shift = 1.0 if name in shifted_gains(family) else 0.0
                weights[name] = (value + shift) * rules[name].multiplier - shift if name in trained else value
            theirs = loss_of(twin, weights, batch)
            assert ours.item() == pytest.approx(theirs.item(), rel=1e-9), step
            for optimizer, loss in ((folded, ours), (explicit, theirs)):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert parameterization.rules[trained[0]].role  # at least one multiplier is not 1 where depth or width moved
    assert any(rule.multiplier != 1.0 for rule in rules.values())


def grown(family: str, shape: Shape) -> dict[str, int]:
    """Every axis doubled that the family has. Where it has a factor √width of its own, width × 4: norms and rotary
    embeddings of some families round to float32 whatever the mode, and powers of two pass through that unchanged."""
    sizes = {axis: 2 * getattr(shape, axis) for axis in AXES if (family, axis) not in REFUSED}
    if adapter_for(structure_of(family)[0]).own_factors:
        sizes["width"] *= 2
    return sizes


@functools.cache
def shifted_gains(family: str) -> frozenset[str]:
    """Gains of the form 1 + w, found by running the norm: at w = -1 its output is zero, at w = 0 it is not."""
    model_class, _ = classes(family)
    config, _, _, shape = structure_of(family)
    sizes = grown(family, shape)
    model = model_class(resized(family, config, **sizes))
    found = set()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 1 or "norm" not in type(module).__name__.lower():
            continue
        x = torch.randn(2, 3, weight.numel(), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            weight.fill_(-1.0)
            try:
                if module(x).abs().max() < 1e-6:
                    found.add(f"{name}.weight")
            except (TypeError, AttributeError):  # gated norms take two inputs; they have the plain form
                continue
    return frozenset(found)


@pytest.mark.skipif("gemma4" not in FAMILIES, reason="this transformers has no gemma4")
@pytest.mark.parametrize(("spec", "exponent"), [("moe-completep", 0.0), ("standard", 0.5)])
def test_a_familys_own_factor_of_width_is_taken_back(spec: str, exponent: float) -> None:
    """gemma4 multiplies its embeddings by √width: under our rules they keep their size, under standard they grow."""
    model_class, _ = classes("gemma4")
    config, _, _, shape = structure_of("gemma4")
    sizes = []
    for width in (shape.width, 4 * shape.width):
        model = model_class(moe_param.scale_config(config, width=width, model_class=model_class))
        moe_param.apply(model, shape, seed=0, experts=None, spec=spec)
        embedded = model.get_input_embeddings()(tokens(100, 4, 32))
        sizes.append(embedded.square().mean().sqrt().item())
    assert math.log(sizes[1] / sizes[0], 4) == pytest.approx(exponent, abs=0.05)


def test_adapters_name_only_families_that_exist() -> None:
    types = {tiny_config(family).get_text_config().model_type for family in (*FAMILIES, *DENSE)} | {"xglm"}
    if set(ALL_FAMILIES) <= set(FAMILIES):  # an older transformers does not have all of them
        assert set(adapters()) <= types
    assert types & set(adapters())
    assert adapter_for(tiny_config("mixtral")).residual is None
