"""Routers and experts are found whatever sizes coincide, and a reading leaves the caller's state alone."""

from __future__ import annotations

import copy
import functools
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralForCausalLM, PretrainedConfig
from transformers.utils import logging

import moe_param
from moe_param import Shape, StructureError
from moe_param.structure import trace as tracing
from moe_param.structure.roles import Structure, read_structure
from moe_param.structure.trace import trace_model
from tests.models import FAMILIES, build, classes, tiny_config, tokens
from tests.own_models import ListBlock, ListConfig, ListLM, ListMoE

SIZES = {"W": 48, "L": 2, "H": 6, "D": 20, "E": 4, "K": 2, "F": 40, "V": 128}
"""Width, layers, heads, head_dim, experts, experts per token, hidden units of an expert, vocabulary: no two alike."""


class Model(NamedTuple):
    """sizes: name in its config (in a dictionary of it after a dot) of each size. rest: what else its config needs.
    layers: its decoder stack. The rest are names within a layer: router, the module that routes; weights, those it
    chooses by; experts, the module that holds them; up, down, their weights, `*` for the number of an expert."""

    sizes: dict[str, str]
    rest: dict[str, Any]
    layers: str
    router: str
    weights: str
    experts: str
    up: tuple[str, ...]
    down: tuple[str, ...]


def sizes_of(names: str) -> dict[str, str]:
    return dict(zip(SIZES, names.split(), strict=True))


USUAL = sizes_of(
    "hidden_size num_hidden_layers num_attention_heads head_dim num_experts num_experts_per_tok moe_intermediate_size "
    "vocab_size"
)
MODELS = {
    "mixtral": Model(
        {**USUAL, "E": "num_local_experts", "F": "intermediate_size"},
        {"num_key_value_heads": 1},
        "model.layers.",
        "mlp.gate",
        "mlp.gate.weight",
        "mlp.experts",
        ("mlp.experts.gate_up_proj",),
        ("mlp.experts.down_proj",),
    ),
    "dbrx": Model(
        sizes_of(
            "d_model n_layers n_heads - ffn_config.moe_num_experts ffn_config.moe_top_k ffn_config.ffn_hidden_size "
            "vocab_size"
        ),
        {"attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0}},
        "transformer.blocks.",
        "ffn.router.layer",
        "ffn.router.layer.weight",
        "ffn.experts.mlp",
        ("ffn.experts.mlp.w1", "ffn.experts.mlp.v1"),
        ("ffn.experts.mlp.w2",),
    ),
    "own_stacked": Model(
        sizes_of("n_embd n_layer n_head d_head n_exp n_act d_ff vocab_size"),
        {},
        "h.",
        "ffn",
        "ffn.wr",
        "ffn",
        ("ffn.w1",),
        ("ffn.w2",),
    ),
    "own_list": Model(
        USUAL,
        {},
        "blocks.",
        "moe.router",
        "moe.router.weight",
        "moe.experts",
        ("moe.experts.*.fc1.weight",),
        ("moe.experts.*.fc2.weight",),
    ),
}
"""One with the experts interface, and three that structure tells: experts below each other in matrices, stacked in
tensors of three dimensions, in a `ModuleList`."""

ALIKE: dict[str, dict[str, int]] = {
    "experts, heads": {"E": 6},
    "experts, head_dim": {"E": 20},
    "experts, depth": {"L": 4},
    "experts, width": {"E": 12, "W": 12},
    "experts, expert size, vocabulary": {"E": 12, "F": 12, "V": 12},
    "experts, tokens of the traced batch": {"E": 8},
    "top_k, experts but one": {"K": 3},
    "top_k, all experts": {"K": 4},
    "top_k, depth, heads": {"K": 3, "L": 3, "H": 3},
    "expert size, width": {"F": 48},
    "expert size, queries": {"F": 120},
    "experts × expert size, width": {"F": 12},
    "two of everything": {"E": 2, "H": 2},
    "everything is 8 or 4": {"W": 8, "L": 4, "H": 4, "D": 8, "E": 8, "K": 4, "F": 8, "V": 8},
    "everything is 4 or 2": {"W": 4, "L": 4, "H": 2, "D": 4, "E": 4, "K": 4, "F": 4, "V": 4},
}
"""What coincides -> sizes in which it does."""


def config_of(family: str, sizes: dict[str, int]) -> PretrainedConfig:
    model = MODELS[family]
    changes: dict[str, Any] = copy.deepcopy(model.rest)
    for size, value in {**SIZES, **sizes}.items():
        name, _, key = model.sizes[size].partition(".")
        if key:
            changes.setdefault(name, {})[key] = value
        elif name != "-":
            changes[name] = value
    return tiny_config(family, **changes)


@functools.cache
def usual(family: str) -> Structure:
    return read_structure(classes(family)[0], config_of(family, {}))


def pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


@pytest.mark.parametrize("alike", ALIKE)
@pytest.mark.parametrize("family", MODELS)
def test_routers_and_experts_are_found_by_what_they_do(family: str, alike: str) -> None:
    if family not in FAMILIES:
        pytest.skip(f"this transformers has no {family} whose experts can be read")
    model, sizes = MODELS[family], {**SIZES, **ALIKE[alike]}
    config = config_of(family, ALIKE[alike])
    _, trace = trace_model(classes(family)[0], config)
    assert len(trace.routers) == sizes["L"]
    for layer, router in enumerate(trace.routers):
        inside = f"{model.layers}{layer}."
        names = [
            name.replace("*", str(index))
            for each in (model.up, model.down)
            for name in each
            for index in range(sizes["E"] if "*" in name else 1)
        ]
        up = [name for name in names if pattern(f".{name}")[1:] in model.up]
        assert set(router.up) == {inside + name for name in up}
        assert set(router.down) == {inside + name for name in names} - set(router.up)
        assert (router.module, router.experts) == (inside + model.router, inside + model.experts)
        assert router.weights == {inside + model.weights}
        assert (router.num_experts, router.among, router.top_k) == (sizes["E"], sizes["E"], sizes["K"])
        assert (router.size, router.mixes) == (sizes["F"], "mlp")
    structure = read_structure(classes(family)[0], config)
    head_dim = sizes["D"] if model.sizes["D"] != "-" else sizes["W"] // sizes["H"]
    shape = (sizes["W"], sizes["L"], sizes["E"], sizes["K"], sizes["F"], head_dim)
    assert tuple(vars(structure.shape).values()) == shape
    roles = [{pattern(n): (i.role, i.sites) for n, i in s.parameters.items()} for s in (structure, usual(family))]
    assert roles[0] == roles[1]


# -- what only looks like experts ------------------------------------------------------------------------------------
class LooksLikeExperts(ListBlock):
    """As many other things as there are experts beside the router, read or not: heads in a list, scales in a stack."""

    def __init__(self, config: ListConfig) -> None:
        super().__init__(config)
        shape = (config.num_experts, config.hidden_size, config.hidden_size)
        self.mixers = nn.Parameter(torch.empty(shape))
        self.heads = nn.ModuleList(nn.Linear(config.hidden_size, 4) for _ in range(config.num_experts))
        self.proj = nn.Linear(4 * config.num_experts, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.einsum("btd,edf->btf", x, self.mixers)
        x = x + self.proj(torch.cat([head(x) for head in self.heads], -1))
        return super().forward(x)


class LookalikeLM(ListLM):
    def __init__(self, config: ListConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(LooksLikeExperts(config) for _ in range(config.num_hidden_layers))
        self.post_init()


def test_as_many_of_something_else_are_not_its_experts() -> None:
    """The nearest copies around the router are meant, not the first in the layer."""
    _, trace = trace_model(LookalikeLM, config_of("own_list", {}))
    assert [(r.module, r.experts) for r in trace.routers] == [
        (f"blocks.{layer}.moe.router", f"blocks.{layer}.moe.experts") for layer in range(SIZES["L"])
    ]


def test_a_router_whose_experts_are_elsewhere_is_refused() -> None:
    """The control: with one expert fewer than candidates nothing beside the router is as many."""

    class OneFewer(ListLM):
        def __init__(self, config: ListConfig) -> None:
            super().__init__(config)
            for block in self.blocks:
                block.moe.experts = block.moe.experts[:-1]

    with pytest.raises(StructureError, match=r"chooses 2 of 4 in blocks\.\d\.moe.*no 4 copies of anything"):
        read_structure(OneFewer, config_of("own_list", {}))


# -- the caller's state ----------------------------------------------------------------------------------------------
NOISY = (
    lambda: torch.rand(2),
    lambda: torch.empty(3).uniform_(),
    lambda: torch.rand_like(torch.ones(3)),
    lambda: torch.ones(3).bernoulli_(0.5),
    lambda: torch.multinomial(torch.ones(4), 1),
    lambda: torch.randperm(4),
    lambda: nn.functional.dropout(torch.ones(3)),
)


class NoisyLM(ListLM):
    """Draws while it is built and while it runs, in ways that touch no token and no parameter."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for draw in NOISY:
            draw()

    def forward(self, input_ids: Tensor, labels: Any = None, **ignored: Any) -> Any:
        for draw in NOISY:
            draw()
        return super().forward(input_ids, labels)


class FailsLM(NoisyLM):
    def forward(self, input_ids: Tensor, labels: Any = None, **ignored: Any) -> Any:
        super().forward(input_ids, labels)
        raise RuntimeError("late")


def state() -> dict[str, Any]:
    """What a reading could change in the process, as values that compare."""
    return {
        "torch's generator": torch.get_rng_state().tolist(),
        "Python's generator": random.getstate(),
        "numpy's generator": str(np.random.get_state()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        "modes": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        "hooks": len(torch.nn.modules.module._global_forward_hooks),
        "verbosity": logging.get_verbosity(),
        "warnings": list(warnings.filters),
    }


def test_noise_would_be_seen() -> None:
    before = state()
    for draw in NOISY:
        draw()
        after = state()
        assert [name for name in before if before[name] != after[name]] == ["torch's generator"]
        before = after


@pytest.mark.parametrize("model_class", [ListLM, NoisyLM, FailsLM])
def test_reading_changes_no_state(model_class: type[Any]) -> None:
    tracing._recent.clear()
    config = config_of("own_list", {})
    before, given = state(), copy.deepcopy(vars(config))
    for _ in range(2):
        with pytest.raises(StructureError, match="late") if model_class is FailsLM else nullcontext():
            read_structure(model_class, config)
    assert state() == before
    assert vars(config) == given


def test_planning_and_resizing_change_no_state_and_no_model() -> None:
    config = tiny_config("mixtral")
    model = build("mixtral", config)
    before, given = state(), copy.deepcopy(vars(config))
    weights = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    moe_param.plan(MixtralForCausalLM, config, moe_param.scale_config(config, width=32))
    moe_param.plan(type(model), model.config, Shape.from_config(model.config))
    assert state() == before
    assert vars(config) == given and vars(model.config) == given
    assert all(p is weights[name][0] and torch.equal(p, weights[name][1]) for name, p in model.named_parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu"),
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "another seed": lambda: torch.random.fork_rng(devices=[]),
}


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("family", ["mixtral", "own_list"])
def test_the_callers_state_changes_no_reading(family: str, around: str) -> None:
    expected = usual(family)
    tracing._recent.clear()
    with SURROUNDINGS[around]():
        torch.manual_seed(5)
        assert read_structure(classes(family)[0], config_of(family, {})) == expected


# -- whole numbers and masks on the way ------------------------------------------------------------------------------
class Slots(ListMoE):
    """Sends tokens by sorted positions and counts, as dispatch by capacity does, and skips experts nobody chose."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        gates, chosen = F.softmax(self.router(flat), dim=-1).topk(self.top_k, dim=-1)
        gates = (gates / gates.sum(-1, keepdim=True)).flatten()
        order = chosen.flatten().argsort()
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            slots = order[chosen.flatten()[order] == index]
            if slots.numel() == 0:
                continue
            token = slots.div(self.top_k, rounding_mode="floor")
            out = out.index_add(0, token, expert(flat[token]) * gates[slots, None])
        return out.view_as(x)


class Masked(ListMoE):
    """Every expert on every token; a mask of whole numbers keeps those that were chosen."""

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = F.softmax(self.router(x), dim=-1).topk(self.top_k, dim=-1)
        gates = gates / gates.sum(-1, keepdim=True)
        taken = F.one_hot(chosen, len(self.experts))
        weight = (taken * gates.unsqueeze(-1)).sum(-2)
        visited = (taken.sum(-2) > 0).to(torch.int64)
        return sum(
            torch.where(visited[..., e, None].bool(), expert(x) * weight[..., e, None], 0.0)
            for e, expert in enumerate(self.experts)
        )


class SlotsLM(ListLM):
    dispatch: type[ListMoE] = Slots

    def __init__(self, config: ListConfig) -> None:
        super().__init__(config)
        for block in self.blocks:
            block.moe.__class__ = self.dispatch


class MaskedLM(SlotsLM):
    dispatch = Masked


@pytest.mark.parametrize("model_class", [SlotsLM, MaskedLM])
@pytest.mark.parametrize("alike", ["experts, tokens of the traced batch", "top_k, all experts", "two of everything"])
def test_however_tokens_are_sent_the_model_is_the_same(model_class: type[Any], alike: str) -> None:
    """The three compute the same, so they are read as the same."""
    config = config_of("own_list", ALIKE[alike])
    torch.manual_seed(0)
    plain = ListLM(config).double()
    other = model_class(config).double()
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        logits, same = (m(tokens(SIZES["V"])).logits for m in (plain, other))
    assert torch.allclose(logits, same, atol=1e-12)
    read, expected = (read_structure(each, config) for each in (model_class, ListLM))
    assert read.shape == expected.shape and read.parameters == expected.parameters
    assert read.routers == expected.routers and read.gaps == expected.gaps
