"""Decoder-only families without experts: independent evidence for what structure says of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import moe_param
from moe_param import ParameterizationError
from moe_param.structure.adapters import Adapter, adapters
from moe_param.structure.dispatch import find_layers
from tests.models import DENSE, KeepDouble, build, classes, families, tiny_config, tokens
from tests.structure.test_families import closers, offsets, real_model, scaled, stream, structure_of

CORE = (
    *("llama", "mistral", "qwen3", "gemma3_text", "olmo2", "phi3", "granite", "cohere2", "starcoder2", "smollm3"),
    *("gpt2", "gpt_neox", "opt"),
)
"""The families whose whole behaviour is tested here."""

REFUSED = {
    # (family, axis): a word of the reason the user is given
    ("biogpt", "width"): "by its scale_embedding",
    ("openai-gpt", "depth"): "residual connection is not a plain identity",  # the stream is normalized between layers
}
UNINITIALIZED = ("apertus", "openai-gpt")
"""transformers' own code leaves parameters of theirs unwritten."""

FUSED = {"bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "mpt", "openai-gpt", "phi3"}
"""One matrix makes queries, keys and values."""


def every(*without: str) -> list[Any]:
    return families(sorted(set(DENSE) - set(without)), CORE)


@pytest.mark.parametrize("family", every())
def test_the_shape_and_a_role_for_every_parameter(family: str) -> None:
    config, structure, _, shape = structure_of(family)
    assert set(structure.parameters) == {name for name, _ in build(family).named_parameters()}
    assert shape.dense
    assert (shape.width, shape.depth) == (config.hidden_size, config.num_hidden_layers)
    roles = {info.role for info in structure.parameters.values()}
    assert "embedding" in roles
    assert not {role for role in roles if role.startswith(("expert", "shared", "router"))}
    if family in CORE and family != "opt":  # whose MLP is no module of its own
        assert {"attention_in", "attention_out", "dense_up", "dense_down"} <= roles
        assert not {"other", "other_out"} & roles


@pytest.mark.parametrize("family", every("openai-gpt"))
def test_silent_branches_leave_the_residual_stream_alone(family: str) -> None:
    """And with the others silent, what a layer adds scales by c with the weights that close one branch."""
    _, structure, trace, _ = structure_of(family)
    model, shifted, all_closers = real_model(family), offsets(structure), closers(structure)
    with scaled(model, all_closers, 0.0, shifted):
        for before, after in stream(model):
            assert torch.allclose(before, after, atol=1e-12)
    for branch in [b for b in trace.branches if b.layer == 0]:
        with scaled(model, [n for n in all_closers if n not in branch.closers], 0.0, shifted):
            before, after = stream(model)[0]
            with scaled(model, branch.closers, 3.0, shifted):
                _, tripled = stream(model)[0]
        assert (after - before).abs().max() > 1e-6, branch
        assert torch.allclose(tripled - before, 3.0 * (after - before), rtol=1e-9, atol=1e-10), branch


@pytest.mark.parametrize("family", every())
def test_the_logit_fold_scales_the_logits(family: str) -> None:
    _, structure, _, _ = structure_of(family)
    model = real_model(family)
    names = [name for name, info in structure.parameters.items() if "logits" in info.sites]
    once = logits(model)
    with scaled(model, names, 3.0, offsets(structure)):
        assert torch.allclose(logits(model), 3.0 * once, rtol=1e-9, atol=1e-10)


def logits(model: Any) -> torch.Tensor:
    """Of one fixed batch, without the soft cap and the bias that some families put on them."""
    with torch.no_grad(), KeepDouble():
        found = model(input_ids=tokens(100, 2, 12), use_cache=False).logits
    cap = getattr(model.config, "final_logit_softcapping", None)
    found = torch.atanh(found / cap) * cap if cap else found
    bias = getattr(model.get_output_embeddings(), "bias", None)
    return found if bias is None else found - bias


SOFTMAXES = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)


class TwiceTheScores(TorchFunctionMode):
    """What goes into an attention's softmax, times 2."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (*SOFTMAXES, torch.nn.functional.scaled_dot_product_attention):  # whose queries come first
            args = (2.0 * args[0], *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", every(*FUSED, "nanochat", "qwen3_5_text"))
def test_the_query_fold_scales_the_attention_logits(family: str) -> None:
    _, structure, _, _ = structure_of(family)
    assert "attention_logits" not in structure.gaps
    names = [name for name, info in structure.parameters.items() if "attention_logits" in info.sites]
    model = real_model(family)
    once = logits(model)
    with scaled(model, names, 2.0, offsets(structure)):
        folded = logits(model)
    capped = getattr(model.config, "attn_logit_softcapping", None)  # between the scores and the softmax
    for module in [m for m in model.modules() if capped and hasattr(m, "scaling")]:
        module.scaling *= 2.0
    with TwiceTheScores() if not capped else KeepDouble():
        assert torch.allclose(logits(model), folded, rtol=1e-8, atol=1e-9)
    assert not torch.allclose(folded, once, rtol=1e-3)


@pytest.mark.parametrize("family", sorted(FUSED & set(CORE)))
def test_head_dim_cannot_change_where_one_weight_makes_queries_and_keys(family: str) -> None:
    config, structure, _, shape = structure_of(family)
    assert shape.head_dim == 16
    assert "one weight makes queries and keys" in structure.gaps["attention_logits"]
    heads = "n_head" if hasattr(config, "n_head") else "num_attention_heads"
    fewer = tiny_config(family, **{heads: 2})
    with pytest.raises(ParameterizationError, match="one weight makes queries and keys"):
        moe_param.plan(classes(family)[0], fewer, config)


@pytest.mark.parametrize("family", every())
def test_width_and_depth_are_scaled_or_refused_with_a_reason(family: str) -> None:
    model_class, _ = classes(family)
    config, _, _, shape = structure_of(family)
    for axis in ("width", "depth"):
        sizes = {axis: 4 * getattr(shape, axis)}
        if (family, axis) in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[family, axis]):
                moe_param.plan(model_class, moe_param.scale_config(config, **sizes, model_class=model_class), shape)
            continue
        target = moe_param.scale_config(config, **sizes, model_class=model_class)
        plan = moe_param.plan(model_class, target, shape)
        assert plan.shape == shape.along(axis, 4)
        assert plan.base_shape == shape
        if axis == "depth":
            continue
        for name, rule in plan.rules.items():
            if rule.role in ("dense_down", "attention_out", "other_out") and rule.fan_in and rule.fan_in_base:
                assert rule.fan_in == 4 * rule.fan_in_base, f"{name}: the inside of the branch did not grow"


@pytest.mark.parametrize("spec", ["moe-completep", "standard"])
@pytest.mark.parametrize("family", every("biogpt", *UNINITIALIZED))
def test_what_the_layers_are_given_keeps_its_size(family: str, spec: str) -> None:
    """Whatever a family does with its embeddings: what enters the first layer has the base's size at any width.
    (Under standard it has, too, but where a family multiplies by √width.)"""
    model_class, _ = classes(family)
    config, _, _, shape = structure_of(family)
    sizes = []
    for width in (shape.width, 4 * shape.width):
        model = model_class(moe_param.scale_config(config, width=width, model_class=model_class)).eval()
        moe_param.apply(model, shape, seed=0, spec=spec)
        seen: list[torch.Tensor] = []
        hook = find_layers(model)[1][0].register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        with torch.no_grad():
            model(input_ids=tokens(100, 4, 32), use_cache=False)
        hook.remove()
        sizes.append(seen[0].square().mean().sqrt().item())
    grows = 0.5 if spec == "standard" and adapters().get(config.model_type, Adapter()).own_factors else 0.0
    assert math.log(sizes[1] / sizes[0], 4) == pytest.approx(grows, abs=0.07)
