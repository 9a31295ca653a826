"""Every family: what is found of its routers, and what a bias does to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moe_param import BalanceError, LoadBalancer, RoutingError
from moe_param.balancing import routing
from moe_param.balancing.routing import find_routes
from moe_param.structure.adapters import Adapter, adapter_for
from tests.models import CORE, FAMILIES, INTERFACE, build, routed, tiny_config, tokens

# Why these cannot be balanced; they can be counted.
REFUSED = {
    "diffusion_gemma": "its gates carry a learned scale per expert",
    "gemma4": "its gates carry a learned scale per expert",
    "phimoe": "sparsemixer: its gates depend on the order of selection",
    "zaya": "a further class skips the experts, and indices do not show it",
}
PARTLY = {"deepseek_v4": "some of its layers route by a hash of the token"}
NATIVE = {  # the families with a selection bias of their own
    *("afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1"),
    *("dots3_note", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm4v_moe"),
    *("glm5_next", "glm_moe_dsa", "hy_v3", "hy_v4", "hy_v4_vl", "inkling", "inkling2", "inkling2_loop"),
    *("kimi_linear", "kolibri1", "laguna", "longcat_flash", "step3p7"),
    *("lfm2_moe", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl", "muse_spark", "nemotron_h", "solar_open"),
}
BY_ITSELF = {"dbrx", "jetmoe", "llama4", "own_list", "own_stacked"}
"""Their blocks choose themselves, or their router modules do not say what they chose."""

BALANCED = sorted(set(FAMILIES) - set(REFUSED) - BY_ITSELF)
SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}


def run(model: Any) -> torch.Tensor:
    torch.manual_seed(0)  # some families draw noise
    out = model(input_ids=tokens(100), use_cache=False)
    return out.logits if "logits" in out else out.last_hidden_state


def set_bias(balancer: LoadBalancer, expert: int, value: float) -> None:
    balancer.bias.zero_()[:, expert] = value
    balancer.write()


def record(balancer: LoadBalancer, model: Any) -> list[tuple[torch.Tensor, ...]]:
    """(logits, weights, indices) of every balanced layer in one forward pass."""
    seen: list[Any] = [None] * len(balancer.moved)
    handles = [
        balancer.routes[row].module.register_forward_hook(
            lambda module, args, out, i=i: seen.__setitem__(i, [t.detach() for t in out[:3]])
        )
        for i, row in enumerate(balancer.moved)
    ]
    run(model)
    for handle in handles:
        handle.remove()
    return seen


def follows(score: Callable[[torch.Tensor], torch.Tensor], out: tuple[torch.Tensor, ...]) -> bool:
    """Whether the weights stand in the ratio of the scores of the unbiased logits."""
    logits, weights, indices = out
    chosen = score(logits.double()).gather(-1, indices)
    return torch.allclose(weights.double() / weights.double().sum(-1, keepdim=True), chosen / chosen.sum(-1, True))


@pytest.mark.parametrize("family", BALANCED)
@torch.no_grad()
def test_a_bias_selects_and_does_nothing_else(family: str) -> None:
    model = build(routed(family)).eval()
    before = run(model)
    balancer = LoadBalancer(model, rate=0.1, inject=True) if family not in PARTLY else _partly(model)
    assert torch.equal(run(model), before), "a zero bias is no bias"
    assert all((route.gate is None) == (family in NATIVE) for route in balancer.routes if not route.fixed)
    unbiased = record(balancer, model)
    kinds = [name for name, score in SCORES.items() if all(follows(score, out) for out in unbiased)]
    if unbiased[0][1].shape[-1] > 1 and family != "inkling":  # its weights are shared with experts that always act
        assert kinds, "the gates are none of the known ones"
    set_bias(balancer, 3, 50.0)
    for out in record(balancer, model):
        assert (out[2] == 3).any(-1).all(), "a large bias wins every token"
        assert all(follows(SCORES[kind], out) for kind in kinds), "weights never include the bias"
    assert not torch.equal(run(model), before)
    set_bias(balancer, 3, 0.0)
    assert torch.equal(run(model), before)


def _partly(model: Any) -> LoadBalancer:
    with pytest.warns(UserWarning, match="counted, but cannot be balanced"):
        balancer = LoadBalancer(model, rate=0.1, inject=True)
    assert 0 < len(balancer.moved) < len(balancer.routes)
    return balancer


@pytest.mark.parametrize("family", sorted(set(REFUSED) & set(INTERFACE)))
def test_what_cannot_be_balanced_is_refused_and_counted(family: str) -> None:
    model = build(family)
    with pytest.raises(BalanceError, match=f"(?s)no router of this model can be balanced.*{REFUSED[family]}"):
        LoadBalancer(model, rate=0.1, inject=True)
    balancer = LoadBalancer(model.train(), rate=0, inject=True)
    run(model)
    balancer.step()
    assert torch.allclose(balancer.last_load.sum(-1), balancer.top_k[:, 0])
    assert not balancer.bias.any()
    assert balancer.metrics()["max_over_mean"] >= 1


INJECTED = sorted(set(CORE) - NATIVE - set(REFUSED))


@pytest.mark.parametrize("family", INJECTED)
def test_injection_has_to_be_asked_for(family: str) -> None:
    with pytest.raises(BalanceError, match="inject=True"):
        LoadBalancer(build(routed(family)), rate=0.1)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in (*INJECTED, "mistral4", "flint", "openai_privacy_filter", "cohere2_moe")},
    "normalized": ("qwen3_moe", {"norm_topk_prob": True}),
    "three of eight": ("openai_privacy_filter", {"num_experts_per_tok": 3}),
    "scaled": ("deepseek_v2", {"routed_scaling_factor": 2.5}),
    "scaled and normalized": ("mistral4", {"routed_scaling_factor": 2.5, "norm_topk_prob": True}),
    "sigmoid": ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_zero_injected_bias_changes_no_gradient(variant: str, precision: str) -> None:
    family, changes = VARIANTS[variant]
    if family not in INTERFACE:
        pytest.skip(f"this transformers has no {family}")
    routed(family)
    gradients = []
    for inject in (False, True):
        model = build(family, **changes).train()
        if precision == "bfloat16":
            model.to(torch.bfloat16)
        if inject:
            LoadBalancer(model, rate=0.1, inject=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            run(model).float().square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


GROUPED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "mistral4": {"n_group": 4, "topk_group": 2},
    "deepseek_v3": {"n_group": 4, "topk_group": 2},
}


@pytest.mark.parametrize("family", sorted(GROUPED))
@torch.no_grad()
def test_group_limits_are_respected(family: str) -> None:
    if family not in INTERFACE:
        pytest.skip(f"this transformers has no {family}")
    model = build(family, **GROUPED[family], num_experts_per_tok=4).eval()
    before = run(model)
    balancer = LoadBalancer(model, rate=0.1, inject=True)
    assert torch.equal(run(model), before)
    if family not in NATIVE:
        gate = balancer.routes[0].gate
        assert gate is not None and gate.groups is not None
    balancer.bias[:, [0, 7]] = 3.0
    balancer.bias[:, [2, 5]] = 1.0
    balancer.write()
    for _, _, indices in record(balancer, model):
        kept = torch.zeros(len(indices), 4).scatter(-1, indices // 2, 1.0).sum(-1)
        assert (kept == 2).all(), "four experts out of two groups of two"
        assert (indices == 0).any(-1).all() and (indices == 7).any(-1).all()


@torch.no_grad()
def test_softmax_routers_are_biased_in_logit_space() -> None:
    """A bias of the difference of two logits makes a tie: a little less loses, a little more wins."""
    model = build("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=False).eval()
    balancer = LoadBalancer(model, rate=0.1, inject=True)
    logits, _, indices = record(balancer, model)[0]
    best = logits.topk(2)
    gap = best.values[0, 0] - best.values[0, 1]
    for factor, wins in ((0.99, best.indices[0, 0]), (1.01, best.indices[0, 1])):
        balancer.bias.zero_()[0, best.indices[0, 1]] = gap * factor
        balancer.write()
        assert record(balancer, model)[0][2][0, 0] == wins
    assert indices[0, 0] == best.indices[0, 0]


@pytest.mark.parametrize("family", sorted(set(INTERFACE) - NATIVE - set(REFUSED)))
def test_what_is_declared_of_a_gate_is_needed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every router is what is declared of it, to the last bit; without its family's entry it is refused."""
    grouped: dict[str, Any] = {
        "n_group": 4,
        "topk_group": 1,
        "topk_method": "group_limited_greedy",
        "num_experts_per_tok": 2,
    }
    model = build(routed(family), **(grouped if "groups" in adapter_for(tiny_config(family)).gate else {}))
    assert not any(route.fixed for route in find_routes(model, inject=True))
    if adapter_for(model.config).gate:
        monkeypatch.setattr(routing, "adapter_for", lambda config: Adapter())
        assert all("come out differently" in route.fixed for route in find_routes(model, inject=True))


def test_a_router_that_cannot_be_repeated_is_refused() -> None:
    """What is declared is held against what a router does."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe as family

    forward = family.Qwen3MoeTopKRouter.forward

    def squared(self: Any, hidden_states: torch.Tensor) -> Any:
        logits, weights, indices = forward(self, hidden_states)
        return logits, weights.square(), indices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family.Qwen3MoeTopKRouter, "forward", squared)
        routes = find_routes(build("qwen3_moe"), inject=True)
    assert all("come out differently" in route.fixed for route in routes)
    assert not any(route.fixed for route in find_routes(build("qwen3_moe"), inject=True))


def test_a_block_that_routes_by_itself_is_refused() -> None:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as family

    class Block(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.experts, self.top_k = family.Qwen3MoeExperts(config), config.num_experts_per_tok
            self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            weights, indices = self.gate(flat).softmax(-1).topk(self.top_k)
            return self.experts(flat, indices, weights).reshape(hidden_states.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(family, "Qwen3MoeSparseMoeBlock", Block)
        with pytest.raises(RoutingError, match="from its block"):
            find_routes(build("qwen3_moe", num_experts=6))  # a size of its own: traces are remembered by config


@pytest.mark.parametrize("rate", [0.1, 0])
@pytest.mark.parametrize("family", sorted(BY_ITSELF & set(FAMILIES)))
def test_families_that_do_not_say_what_they_chose_are_refused(family: str, rate: float) -> None:
    """When the balancer is made, also where it was only to count."""
    with pytest.raises(RoutingError, match=r"from its block, not from a router module.*auxiliary loss"):
        LoadBalancer(build(family), rate=rate, inject=True)


def test_experts_that_compute_nothing_are_balanced_with_the_others() -> None:
    model = build(routed("longcat_flash")).train()
    balancer = LoadBalancer(model, rate=0.1)
    zero, experts = model.config.zero_expert_num, model.config.n_routed_experts
    assert balancer.bias.shape == (model.config.num_layers, experts + zero)
    run(model)
    balancer.step()
    for row, route in enumerate(balancer.routes):
        assert balancer.last_load[row].sum() == pytest.approx(route.top_k)
        busiest, idlest = balancer.last_load[row].argmax(), balancer.last_load[row].argmin()
        assert route.module.e_score_correction_bias[busiest] < 0 < route.module.e_score_correction_bias[idlest]
