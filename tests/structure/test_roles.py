"""Roles and multiplier sites against what the parameters do in the running model, not against their names."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DogeConfig, LlamaConfig, LlamaPreTrainedModel, MixtralForCausalLM

import moe_param
from moe_param import RoleError, Shape, StructureError
from moe_param.structure.dispatch import find_layers
from moe_param.structure.roles import Info, read_structure
from tests.models import CORE, KeepDouble, build, classes, entry_of, runs, tiny_config, tokens


@functools.cache
def parameters(family: str) -> dict[str, Info]:
    return read_structure(classes(family)[0], tiny_config(family)).parameters


def at(family: str, site: str) -> set[str]:
    return {name for name, info in parameters(family).items() if site in info.sites}


def in_role(family: str, *roles: str) -> set[str]:
    return {name for name, info in parameters(family).items() if info.role in roles}


@functools.cache
def double_model(family: str) -> Any:
    """In float64, every parameter moved off its special initial value (gains of 1, biases of 0)."""
    model = build(family).double().eval()
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in in_role(family, "selection_bias"):
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


@contextmanager
def scaled(model: nn.Module, names: set[str], factor: float) -> Iterator[None]:
    """The parameters `names`, and no others, times `factor` for a while."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
    assert set(before) == names
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in names:
                p.mul_(factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in names:
                    p.copy_(before[name])


def streams(model: Any) -> list[torch.Tensor]:
    """The residual stream in front of each decoder layer and behind the last."""
    _, layers = find_layers(model)
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()),
            with_kwargs=True,
        )
        for layer in layers
    ]
    handles.append(
        layers[-1].register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    )
    try:
        logits(model)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == len(layers) + 1
    return seen


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad(), KeepDouble():
        return model(tokens(batch=2, length=12), use_cache=False).logits


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance."""
    return float((a - b).norm() / b.norm())


def one_of_each(names: set[str]) -> list[str]:
    """One name per kind: the same name in another layer is left out."""
    return list({re.sub(r"\.\d+\.", ".*.", name): name for name in sorted(names)}.values())


# -- residual branches -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", CORE)
def test_without_the_residual_branch_weights_every_layer_is_the_identity(family: str) -> None:
    model = double_model(family)
    with scaled(model, at(family, "residual_branch"), 0.0):
        first, *rest = streams(model)
    assert all(torch.equal(stream, first) for stream in rest)
    for one in one_of_each(at(family, "residual_branch")):  # and with all but one of them it is not
        with scaled(model, at(family, "residual_branch") - {one}, 0.0):
            first, *rest = streams(model)
        assert not all(torch.equal(stream, first) for stream in rest), f"{one} closes no branch"


@pytest.mark.parametrize("family", CORE)
def test_the_residual_branch_weights_scale_the_branches(family: str) -> None:
    """At small c, what a layer adds to the stream is c times a fixed vector: not where one of them is left out."""
    model = double_model(family)

    def added(names: set[str], c: float) -> list[torch.Tensor]:
        with scaled(model, names, c):
            seen = streams(model)
        return [after - before for before, after in itertools.pairwise(seen)]

    names = at(family, "residual_branch")
    for small, large in zip(added(names, 1e-6), added(names, 2e-6)):
        assert far(large, 2 * small) < 1e-3
    for one in one_of_each(names):
        pairs = zip(added(names - {one}, 1e-6), added(names - {one}, 2e-6))
        assert any(far(large, 2 * small) > 0.1 for small, large in pairs), one


# -- attention logits ------------------------------------------------------------------------------------------------
@contextmanager
def hotter(model: Any, factor: float) -> Iterator[None]:
    """Attention logits times `factor`, by the modules' own float in front of q·k."""
    modules = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), float)]
    assert modules
    for module in modules:
        module.scaling *= factor
    try:
        yield
    finally:
        for module in modules:
            module.scaling /= factor


@pytest.mark.parametrize("family", CORE)
def test_the_attention_logit_weights_scale_the_attention_logits(family: str) -> None:
    model = double_model(family)
    plain = logits(model)
    with hotter(model, 3.0):
        expected = logits(model)
    assert far(expected, plain) > 1e-4
    with scaled(model, at(family, "attention_logits"), 3.0):
        assert far(logits(model), expected) < 1e-10
    values = {n for n in in_role(family, "attention_in", "attention_value") if "v_proj" in n or "kv_b" in n}
    with scaled(model, values, 3.0):
        assert far(logits(model), expected) > 1e-4


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_values_are_what_the_attention_averages(family: str) -> None:
    """Without them attention adds nothing; queries and keys alone leave its probabilities alone, not their mean."""
    model = double_model(family)
    values = in_role(family, "attention_value")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in values} == {"v_proj"}
    biases = {n for n, info in parameters(family).items() if info.of in values}

    def probabilities(names: set[str], c: float) -> list[torch.Tensor]:
        with scaled(model, names, c), torch.no_grad(), KeepDouble():
            return list(model(tokens(batch=2, length=12), output_attentions=True, use_cache=False).attentions)

    first = probabilities(set(), 1.0)[0]
    assert torch.equal(probabilities(values | biases, 3.0)[0], first)  # of the first layer: nothing is in front of it
    keys = {n for n in in_role(family, "attention_in") if "k_proj" in n or "q_proj" in n} | in_role(
        family, "query_norm"
    )
    assert far(probabilities(keys, 3.0)[0], first) > 1e-2


def test_one_weight_that_makes_keys_and_values_is_no_value() -> None:
    assert not in_role("deepseek_v3", "attention_value")


def test_constants_of_values_are_those_of_attention_in_unless_given() -> None:
    config = tiny_config("mixtral")

    def rate(name: str, **constants: dict[str, float]) -> float:
        plan = moe_param.plan(MixtralForCausalLM, config, config, constants=constants)
        return next(rule.lr for key, rule in plan.rules.items() if name in key)

    assert rate("v_proj", attention_in={"lr": 2.0}) == rate("q_proj", attention_in={"lr": 2.0}) == 2.0
    both = {"attention_in": {"lr": 2.0}, "attention_value": {"lr": 3.0}}
    assert (rate("q_proj", **both), rate("v_proj", **both)) == (2.0, 3.0)
    assert (rate("q_proj", attention_value={"lr": 3.0}), rate("v_proj", attention_value={"lr": 3.0})) == (1.0, 3.0)


# -- logits ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "jamba", "flex_olmo", "hunyuan_v1_moe"])
def test_the_logit_weights_scale_the_logits(family: str, tied: bool) -> None:
    config = tiny_config(family, tie_word_embeddings=tied)
    found = read_structure(classes(family)[0], config).parameters
    model = build(family, config).double().eval()
    with torch.no_grad():
        for _, p in model.named_parameters():
            p.add_(0.05 * torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    model.set_experts_implementation("eager")
    plain = logits(model)
    names = {n for n, info in found.items() if "logits" in info.sites}
    assert {found[n].role for n in names} == {"final_norm" if tied else "unembedding"}
    with scaled(model, names, 0.25):
        assert far(logits(model), 0.25 * plain) < 1e-12
    for role in ("embedding", "norm"):
        with scaled(model, {n for n, info in found.items() if info.role == role}, 0.25):
            assert far(logits(model), 0.25 * plain) > 1e-3, role


# -- gates -----------------------------------------------------------------------------------------------------------
EXPERTS = {"ernie4_5_moe": "moe_num_experts", "olmoe": "num_experts", "jamba": "num_experts"}
EXPERTS |= dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1", "nemotron_h"), "n_routed_experts")
TOP_K = {"ernie4_5_moe": "moe_k", "hunyuan_v1_moe": "moe_topk"}


@pytest.mark.parametrize("family", CORE)
def test_gates_marked_unnormalized_do_not_fall_as_one_over_top_k(family: str) -> None:
    sizes = classes(family)[1]().to_dict() | tiny_config(family).to_dict()

    def mean_gate(factor: int, changes: dict[str, Any]) -> float:
        experts = next(k for k in (EXPERTS.get(family), "num_experts", "num_local_experts") if k and k in sizes)
        config = tiny_config(
            family, **changes, **{experts: 8 * factor, TOP_K.get(family, "num_experts_per_tok"): 2 * factor}
        )
        model = build(family, config).eval()
        seen: list[torch.Tensor] = []
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                module.register_forward_pre_hook(lambda _, args: seen.append(args[2].float().flatten()))
        with torch.no_grad():
            model(tokens())
        return float(torch.cat(seen).mean())

    for changes in [{"norm_topk_prob": True}, {"norm_topk_prob": False}] if "norm_topk_prob" in sizes else [{}]:
        ratio = mean_gate(4, changes) / mean_gate(1, changes)
        structure = read_structure(classes(family)[0], tiny_config(family, **changes))
        downs = {n for n, info in structure.parameters.items() if info.role == "expert_down"}
        marked = {n for n, info in structure.parameters.items() if "unnormalized_gates" in info.sites}
        assert marked in (set(), downs)
        assert ratio == pytest.approx(1.0 if marked else 0.25, rel=0.1), changes
        if family == "dots1":  # sigmoid gates
            assert bool(marked) != changes["norm_topk_prob"]


# -- the other roles -------------------------------------------------------------------------------------------------
def captured(model: Any, pick: Callable[[str, nn.Module], bool]) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(args[1].clone())

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for n, m in model.named_modules() if pick(n, m)]
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", CORE)
def test_routers_are_what_decides_which_experts_are_visited(family: str) -> None:
    """Turning the router round changes the experts of the first MoE layer; turning any other matrix there does not."""
    model = double_model(family)
    layer = min(info.layer for info in parameters(family).values() if info.role == "router" and info.layer is not None)

    def chosen() -> torch.Tensor:
        return captured(model, lambda n, _: n.endswith(".experts"))[0]

    here = {n for n, info in parameters(family).items() if info.layer == layer and info.fan_in}
    router = here & in_role(family, "router")
    before = chosen()
    with scaled(model, router, -1.0):
        assert not torch.equal(chosen(), before)
    with scaled(model, here & in_role(family, "expert_up", "expert_down", "shared_up", "shared_down"), -1.0):
        assert torch.equal(chosen(), before)


@pytest.mark.parametrize("family", CORE)
def test_roles_that_every_model_has_and_no_parameter_twice(family: str) -> None:
    found = parameters(family)
    assert set(found) == {name for name, _ in build(family).named_parameters()}
    roles = {info.role for info in found.values()}
    assert {"embedding", "attention_in", "attention_out", "router", "expert_up", "expert_down", "final_norm"} <= roles
    embedding = {n for n, info in found.items() if info.role == "embedding"}
    model = double_model(family)
    assert embedding == {n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight}
    head = {n for n, info in found.items() if info.role == "unembedding"}
    assert head == {
        n for n, p in model.named_parameters() if p is model.get_output_embeddings().weight and n not in embedding
    }
    sums = [p for n, p in model.named_parameters() if found[n].role in ("norm", "post_norm", "query_norm", "key_norm")]
    assert sums and all(p.dim() == 1 for p in sums)
    for name, p in model.named_parameters():
        if found[name].role in ("expert_up", "expert_down"):
            assert p.shape[0] == 8 and {found[name].fan_in, found[name].fan_out} == set(p.shape[1:])


@pytest.mark.parametrize("family", CORE)
def test_fan_in_is_the_size_a_matrix_sums_over(family: str) -> None:
    """As `nn.Linear` itself counts; vectors have none."""
    model = double_model(family)
    infos = parameters(family)
    linears = {f"{n}.weight": m for n, m in model.named_modules() if type(m) is nn.Linear}
    for name, module in linears.items():
        if name in infos and infos[name].role != "embedding":
            assert (infos[name].fan_in, infos[name].fan_out) == (module.in_features, module.out_features), name
    for name, info in infos.items():
        if len(info.shape) == 1:
            assert info.fan_in is None, name


# -- what cannot be read ---------------------------------------------------------------------------------------------
class WithProbes(MixtralForCausalLM):
    """Trainable parameters that the forward pass does not use: one at the top, one in each of `probed` layers."""

    probed = (1,)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.probe = nn.Parameter(torch.zeros(3))
        for layer in self.probed:
            self.model.layers[layer].mlp.other_probe = nn.Parameter(torch.zeros(2, 5))


class WithManyProbes(WithProbes):
    probed = (0, 2, 3)


class WithFrozenProbe(WithProbes):
    probed = ()

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.probe.requires_grad_(False)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, WithFrozenProbe):
            nn.init.zeros_(module.probe)


def test_parameters_without_a_role_are_all_listed() -> None:
    config = tiny_config("mixtral")
    with pytest.raises(RoleError) as error:
        moe_param.apply(WithProbes(config), config, experts=None)
    for part in ("WithProbes has 2 parameters", "probe (3,)", "model.layers.1.mlp.other_probe (2, 5)"):
        assert part in str(error.value)
    assert "gate" not in str(error.value)
    with pytest.raises(RoleError) as error:
        moe_param.apply(WithManyProbes(config), config, experts=None)
    for part in (
        "WithManyProbes has 4 parameters",
        "\n  probe (3,)\n",
        "\n  model.layers.*.mlp.other_probe (2, 5) × 3\n",
    ):
        assert part in str(error.value)
    frozen = moe_param.apply(WithFrozenProbe(config), config, experts=None)
    assert {n for n, rule in frozen.rules.items() if rule.role == "frozen"} == {"probe"}


class WithoutLayers(LlamaPreTrainedModel):
    """Neither experts nor a list of layers."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.embed

    def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
        return self.head(self.embed(input_ids))


def test_a_model_without_layers_is_refused() -> None:
    config = LlamaConfig(hidden_size=32, vocab_size=128)
    with pytest.raises(StructureError, match=r"WithoutLayers has no decoder stack"):
        moe_param.apply(WithoutLayers(config), config, experts=None)


@pytest.mark.skipif(not runs(entry_of("doge")), reason="doge of this transformers does not run by itself")
def test_experts_outside_the_interface_are_not_read_as_dense() -> None:
    config = DogeConfig(is_moe=True, num_experts=16, num_experts_per_tok=2, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(StructureError, match=r"chooses 2 of 16 in .* as routers do, and no 16 copies of anything"):
        Shape.from_config(config)
