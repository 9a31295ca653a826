"""The folded parameterization of a transformers model computes what the unfolded reference computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

import moe_param
from tests.models import KeepDouble
from tests.reference.side_by_side import check_weights, loss_of, take_weights, train
from tests.reference.unfolded import Decoder, Sizes

STD, LR, EPS, DECAY, STEPS = 0.05, 3e-3, 1e-3, 0.1, 20
BASE = Sizes(width=32, depth=2, num_experts=4, top_k=2, expert_size=16, heads=2, head_dim=8, vocab=64)
TARGET = Sizes(width=96, depth=4, num_experts=12, top_k=6, expert_size=80, heads=6, head_dim=16, vocab=64)


class PaperRouter(MixtralTopKRouter):
    """The paper's gates: sigmoid, not normalized."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        gates, chosen = torch.topk(logits.sigmoid(), self.top_k, dim=-1)
        return logits, gates, chosen


class PaperMixtral(MixtralForCausalLM):
    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.gate = PaperRouter(config)
        self.post_init()


GATES: dict[str, tuple[type[MixtralForCausalLM], bool]] = {
    "normalized": (MixtralForCausalLM, True),
    "unnormalized": (PaperMixtral, False),
}


def config(s: Sizes) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        num_hidden_layers=s.depth,
        num_local_experts=s.num_experts,
        num_experts_per_tok=s.top_k,
        intermediate_size=s.expert_size,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        head_dim=s.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=STD,
    )


def pair(gates: str, spec: str = "moe-completep") -> tuple[Any, Any, Decoder]:
    """(transformers model, its parameterization, the reference with the same function: weights without the folds)."""
    model_class, normalized = GATES[gates]
    model = model_class(config(TARGET)).double()
    parameterization = moe_param.apply(model, config(BASE), seed=1, spec=spec, init_std=STD, reinit=True)
    model.set_experts_implementation("eager")  # grouped_mm has no float64
    reference = Decoder(BASE, TARGET, normalized).double()
    take_weights(reference, folded(model, reference))
    return model, parameterization, reference


def folded(model: Any, reference: Decoder) -> dict[str, tuple[torch.Tensor, float]]:
    """For each parameter of the reference: the model's tensor, and the multiplier that stands beside it unfolded."""
    r = reference.r
    experts = 1 / r.l if reference.blocks[0].normalized else 1 / (r.l * r.k)
    found = {
        "embedding": (model.model.embed_tokens.weight, 1.0),
        "final_norm": (model.model.norm.weight, 1.0),
        "unembedding": (model.lm_head.weight, 1 / r.n),
    }
    for i, layer in enumerate(model.model.layers):
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        block = {
            "attention_norm": (layer.input_layernorm.weight, 1.0),
            "query": (layer.self_attn.q_proj.weight, r.d**-0.5),
            "key": (layer.self_attn.k_proj.weight, 1.0),
            "value": (layer.self_attn.v_proj.weight, 1.0),
            "output": (layer.self_attn.o_proj.weight, 1 / r.l),
            "moe_norm": (layer.post_attention_layernorm.weight, 1.0),
            "router": (layer.mlp.gate.weight, 1.0),
            "gate": (gate, 1.0),
            "up": (up, 1.0),
            "down": (layer.mlp.experts.down_proj, experts),
        }
        found |= {f"blocks.{i}.{name}": entry for name, entry in block.items()}
    return found


def both(model: Any, parameterization: Any, reference: Decoder, steps: int = STEPS) -> tuple[list[float], list[float]]:
    with KeepDouble():
        groups = parameterization.param_groups(model, lr=LR, eps=EPS, weight_decay=DECAY)
        ours = train(loss_of(model), groups, TARGET.vocab, steps)
    return ours, train(reference.loss, reference.groups(LR, EPS, DECAY), TARGET.vocab, steps)


@pytest.mark.parametrize("gates", GATES)
def test_folded_equals_unfolded_on_all_axes_at_once(gates: str) -> None:
    model, parameterization, reference = pair(gates)
    ours, theirs = both(model, parameterization, reference)
    assert ours[0] - ours[-1] > 0.05, "the run must go somewhere for the comparison to mean anything"
    assert ours == pytest.approx(theirs, rel=1e-9)
    check_weights(reference, folded(model, reference), 1e-9)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("spec", ["standard", "mup", "completep"])
def test_other_parameterizations_do_not_pass_for_it(spec: str, gates: str) -> None:
    ours, theirs = both(*pair(gates, spec), steps=4)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9), "the same function to begin with"
    assert ours != pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("gates", GATES)
def test_both_start_at_the_same_scales(gates: str) -> None:
    model, _, reference = pair(gates)
    ours = {name: value.detach() / multiplier for name, (value, multiplier) in folded(model, reference).items()}
    reference.initialize(STD, seed=2)
    for name, parameter, line in reference.lines():
        for values in (ours[name], parameter.detach()):
            expected = 1.0 if line.std is None else STD * line.std
            spread = 5 / (2 * values.numel()) ** 0.5  # five standard errors of a sample standard deviation
            assert values.square().mean().sqrt().item() == pytest.approx(expected, rel=spread), name


def test_the_base_is_the_plain_model() -> None:
    """Where nothing moved, every factor is 1."""
    reference = Decoder(BASE, BASE)
    assert {(line.std, line.lr, line.eps) for _, _, line in reference.lines()} == {(1.0, 1.0, 1.0), (None, 1, 1.0)}
