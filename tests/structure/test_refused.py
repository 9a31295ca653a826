"""Models that cannot be read, or only in a way that is said: one clear line each, and the model is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralForCausalLM

import moe_param
from moe_param import MoeParamError, ParameterizationError, StructureError, scale_config
from moe_param.structure.roles import read_structure
from tests.models import build, tiny_config
from tests.own_models import ListConfig, ListLM, ListMoE

MIXTRAL, LLAMA = tiny_config("mixtral"), tiny_config("llama")
OWN = ListConfig(hidden_size=24, num_attention_heads=2, head_dim=12, num_hidden_layers=2, num_experts=4)


# -- compiled --------------------------------------------------------------------------------------------------------
class CallsItselfCompiled(MixtralForCausalLM):
    def forward(self, input_ids: Any = None, **rest: Any) -> Any:
        return torch.compile(super().forward, backend="eager")(input_ids=input_ids, **rest)


class CompilesItsLayers(MixtralForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.compile(backend="eager")


@pytest.mark.parametrize("model_class", [CallsItselfCompiled, CompilesItsLayers])
def test_a_model_that_compiles_itself_is_read_as_it_would_be(model_class: type[Any]) -> None:
    base = scale_config(MIXTRAL, width=32)
    plain = moe_param.plan(MixtralForCausalLM, MIXTRAL, base)
    assert moe_param.plan(model_class, MIXTRAL, base).rules == plain.rules


def with_wrapped_part() -> Any:
    model = build("mixtral")
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    return model


# -- a forward pass that is not understood -------------------------------------------------------------------------
class NeedsMore(MixtralForCausalLM):
    def forward(self, input_ids: Any, boundaries: Any, weights: Any, scale: float = 1.0) -> Any:
        return super().forward(input_ids)


class AsksForAValue(MixtralForCausalLM):
    def forward(self, input_ids: Any = None, **rest: Any) -> Any:
        out = super().forward(input_ids, **rest)
        return out if out.logits.max().item() < 10 else None


class SolvesASystem(MixtralForCausalLM):
    """linalg_solve_ex has no handler."""

    def forward(self, input_ids: Any = None, **rest: Any) -> Any:
        out = super().forward(input_ids, **rest)
        square = self.model.layers[0].self_attn.q_proj.weight[:8, :8]
        out.logits = out.logits[..., :8] @ torch.linalg.solve(square, square + out.logits[0, :8, :8])
        return out


# -- layers ----------------------------------------------------------------------------------------------------------
class TwoStacks(LlamaForCausalLM):
    """The second runs on what the first one puts out."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.second = nn.ModuleList(type(self.model.layers[0])(config, i) for i in range(2))
        self.post_init()

    def forward(self, input_ids: Any = None, **rest: Any) -> Any:
        hidden = self.model(input_ids).last_hidden_state
        positions = self.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        for layer in self.second:
            hidden = layer(hidden, position_embeddings=positions)
        return self.lm_head(hidden)


class NeverCallsItsLayers(ListLM):
    """A loop over the layers' parts: nothing says where a layer begins."""

    def forward(self, input_ids: Tensor, labels: Any = None, **ignored: Any) -> Any:
        x = self.tok(input_ids)
        for block in self.blocks:
            x = x + block.attn(block.ln1(x))
            x = x + block.moe(block.ln2(x))
        return self.head(self.ln_f(x))


class Turned(nn.Module):
    """A layer whose first argument is a mask, and whose stream has a name of its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, mask: Any, number: int, *, carried: Tensor) -> Any:
        return self.block.forward(carried * mask)


class TurnedLM(ListLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Turned(block) for block in self.blocks)

    def forward(self, input_ids: Tensor, labels: Any = None, **ignored: Any) -> Any:
        x = self.tok(input_ids) + self.pos(torch.arange(input_ids.shape[1]))
        for number, block in enumerate(self.blocks):
            x = block(torch.ones(1), number, carried=x)
        return self.head(self.ln_f(x))


def test_the_stream_is_found_among_the_arguments_of_a_layer() -> None:
    usual, turned = read_structure(ListLM, OWN), read_structure(TurnedLM, OWN)
    assert turned.shape == usual.shape
    roles = {name.replace(".block.", "."): info.role for name, info in turned.parameters.items()}
    assert roles == {name: info.role for name, info in usual.parameters.items()}


class Numb(nn.Module):
    """A layer that reads the stream from elsewhere."""

    def __init__(self, block: nn.Module, shelf: dict[str, Any]) -> None:
        super().__init__()
        self.block, self.shelf = block, shelf

    def forward(self, number: int) -> None:
        self.shelf["x"] = self.block(self.shelf["x"])


class NumbLM(ListLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shelf: dict[str, Any] = {}
        self.blocks = nn.ModuleList(Numb(block, self.shelf) for block in self.blocks)

    def forward(self, input_ids: Tensor, labels: Any = None, **ignored: Any) -> Any:
        self.shelf["x"] = self.tok(input_ids)
        for number, block in enumerate(self.blocks):
            block(number)
        return self.head(self.ln_f(self.shelf["x"]))


# -- hash routing ----------------------------------------------------------------------------------------------------
class HashMoE(ListMoE):
    """Experts by a table of token ids; skip: whether experts without tokens are passed over."""

    skip = False

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            (token,) = torch.where(self.chosen == index)
            if not (self.skip and token.numel() == 0):
                out.index_add_(0, token, expert(flat[token]))
        return out.view_as(x)


class HashSkipMoE(HashMoE):
    skip = True


class HashLM(ListLM):
    moe: type[HashMoE] = HashMoE
    constant = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table: Tensor
        self.register_buffer("table", torch.arange(config.vocab_size) % config.num_experts)
        for block in self.blocks:
            block.moe.__class__ = self.moe
            del block.moe.router

    def forward(self, input_ids: Tensor, labels: Any = None, **ignored: Any) -> Any:
        table = torch.arange(self.config.vocab_size) % self.config.num_experts if self.constant else self.table
        for block in self.blocks:
            block.moe.chosen = table[input_ids].flatten()
        return super().forward(input_ids, labels)


class HashSkipLM(HashLM):
    """Its table has values on fake tensors, too, so some experts are never run."""

    moe = HashSkipMoE
    constant = True


REFUSED: dict[str, tuple[Callable[[], Any], Any, type[MoeParamError], str]] = {
    "wrapped parts": (with_wrapped_part, MIXTRAL, ParameterizationError, r"layers\.0\.mlp\).*part\.compile\(\)"),
    "inputs": (
        lambda: NeedsMore(MIXTRAL),
        MIXTRAL,
        StructureError,
        r"NeedsMore.forward cannot be called with input_ids alone \(it needs boundaries, weights\).*default",
    ),
    "a value": (lambda: AsksForAValue(MIXTRAL), MIXTRAL, StructureError, r"\.item\(\).*test_refused.py:\d+.*where"),
    "an operation": (lambda: SolvesASystem(MIXTRAL), MIXTRAL, StructureError, r"linalg_solve"),
    "two stacks": (
        lambda: TwoStacks(LLAMA),
        LLAMA,
        StructureError,
        r"attention in second\.0.*stack model\.layers.*one",
    ),
    "parts": (lambda: NeverCallsItsLayers(OWN), OWN, StructureError, r"never calls the layers \[0, 1\].*layer\(hidden"),
    "no stream": (lambda: NumbLM(OWN), OWN, StructureError, r"layer 0 \(Numb\) is called without hidden states"),
    "hash": (lambda: HashLM(OWN), OWN, StructureError, r"the 4 members of blocks\.0\.moe\.experts.*hash routing"),
    "hash, skipped": (
        lambda: HashSkipLM(OWN),
        OWN,
        StructureError,
        r"members of blocks\.0\.moe\.experts.*hash routing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_one_line_and_the_model_is_as_it_was(case: str) -> None:
    make, config, error, words = REFUSED[case]
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words) as raised:
        moe_param.apply(model, config, seed=1)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert getattr(model.config, "moe_param", None) is None


# -- adapters --------------------------------------------------------------------------------------------------------
def test_adapters_are_refused_in_the_words_of_peft() -> None:
    from peft import LoraConfig, get_peft_model

    model = build("mixtral")
    parameterization = moe_param.apply(model, MIXTRAL, seed=1)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    words = r"PEFT adapters.*freezes the base weights.*LoRA.*before it is wrapped.*peft\.optimizers"
    with pytest.raises(MoeParamError, match=words):
        parameterization.optimizer(wrapped, lr=1e-3)
    with pytest.raises(MoeParamError, match=words):
        parameterization.optimizer(torch.nn.DataParallel(wrapped), lr=1e-3)
    with pytest.raises(ParameterizationError, match=words):
        moe_param.Parameterization.from_model(wrapped)
    with pytest.raises(ParameterizationError, match=r"got PeftModel: .*class of the model inside.*PEFT"):
        moe_param.plan(type(wrapped), wrapped.config, MIXTRAL)
    assert parameterization.optimizer(build("mixtral"), lr=1e-3)
