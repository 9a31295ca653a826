"""What a trace hands out, and what it says of models that cannot be read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import MixtralForCausalLM

import moe_param
from moe_param import StructureError, scale_config
from moe_param.structure.roles import read_structure
from moe_param.structure.trace import model_class_for, trace_model
from tests.models import build, classes, tiny_config, tokens


def test_what_is_handed_out_is_the_callers_own() -> None:
    config = tiny_config("mixtral")
    model, trace = trace_model(MixtralForCausalLM, config)
    before = copy.deepcopy(trace)
    model.model.layers[0].mlp.experts.num_experts = 99
    del model.model.layers[1:]
    model.config.hidden_size = 1
    trace.routers.clear()
    trace.shapes.clear()
    trace.gains.clear()
    again, fresh = trace_model(MixtralForCausalLM, config)
    assert fresh == before
    assert len(again.model.layers) == config.num_hidden_layers
    assert again.model.layers[0].mlp.experts.num_experts == config.num_local_experts
    assert again.config.hidden_size == config.hidden_size
    with pytest.raises(AttributeError):
        fresh.routers[0].top_k = 3  # type: ignore[misc]


class NoEmbedding(MixtralForCausalLM):
    """As a class that calls its embedding by a name transformers does not look for, and does not say which."""

    def get_input_embeddings(self) -> Any:
        raise NotImplementedError("`get_input_embeddings` not auto-handled for NoEmbedding")


class NoneForEmbedding(MixtralForCausalLM):
    def get_input_embeddings(self) -> Any:
        return None


class Broken(MixtralForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        super().forward(*args, **kwargs)
        raise RuntimeError("shapes\ndo not\nfit")


class Unbuildable(MixtralForCausalLM):
    def __init__(self, config: Any) -> None:
        raise KeyError("no such\nkernel")


@pytest.mark.parametrize(
    "model_class, complaint",
    [
        (NoEmbedding, r"NoEmbedding.*get_input_embeddings"),
        (NoneForEmbedding, r"NoneForEmbedding does not say which module embeds.*define get_input_embeddings"),
        (Broken, r"Broken could not be run on fake tensors.*RuntimeError: shapes do not fit"),
        (Unbuildable, r"Unbuildable could not be built on fake tensors: KeyError: 'no such"),
    ],
)
def test_models_that_cannot_be_read(model_class: type[Any], complaint: str) -> None:
    config = tiny_config("mixtral")
    with pytest.raises(StructureError, match=complaint) as error:
        moe_param.plan(model_class, config, config)
    assert "\n" not in str(error.value)


# -- routers that cannot learn ---------------------------------------------------------------------------------------
ONE = {"num_experts_per_tok": 1}


def router_gradient(family: str, **changes: Any) -> float:
    """Mean absolute gradient of the first router on one batch, over that of the experts behind it (float64)."""
    model = build(family, tiny_config(family, **changes)).double()
    model.set_experts_implementation("eager")
    batch = tokens()
    logits = model(batch).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    gradients = {name: p.grad.abs().mean() for name, p in model.named_parameters() if p.grad is not None}
    router = next(n for n, i in read_structure(type(model), model.config).parameters.items() if i.role == "router")
    experts = next(g for n, g in gradients.items() if n.endswith("experts.down_proj"))
    return float(gradients.get(router, torch.zeros(())) / experts)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_one_normalized_expert_per_token_is_refused(family: str) -> None:
    """Normalized after the choice, in four ways: by a sum, by a softmax over the chosen, of a sigmoid."""
    config = tiny_config(family)
    degenerate = tiny_config(family, **ONE)
    assert router_gradient(family, **ONE) < 1e-6 < 1e-4 < router_gradient(family)
    with pytest.raises(StructureError, match=r"the target has top_k = 1 .* choose top_k >= 2"):
        moe_param.plan(classes(family)[0], degenerate, config, allow_sparsity_change=True)
    with pytest.raises(StructureError, match=r"the base has top_k = 1 .*2 of 8 experts"):
        moe_param.plan(classes(family)[0], config, scale_config(config, num_experts=4))
    moe_param.plan(classes(family)[0], config, config)


@pytest.mark.parametrize(
    "family, changes",
    [("olmoe", {}), ("qwen3_moe", {"norm_topk_prob": False}), ("deepseek_v3", {"norm_topk_prob": False})],
)
def test_one_expert_per_token_passes_where_its_gate_can_move(family: str, changes: dict[str, Any]) -> None:
    """A softmax over all experts, or a sigmoid, leaves the gate of the chosen one free."""
    config = tiny_config(family, **ONE, **changes)
    assert router_gradient(family, **ONE, **changes) > 1e-4
    moe_param.plan(model_class_for(config), config, config)


def test_apply_leaves_such_a_model_alone() -> None:
    model = build("mixtral", **ONE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(StructureError, match="top_k = 1"):
        moe_param.apply(model, scale_config(model.config, width=32), seed=1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert getattr(model.config, "moe_param", None) is None
