"""Two language models of a user's own, as research code writes them: nothing in them knows transformers' experts.

`ListLM`: a `ModuleList` of expert MLPs that a loop visits; gates are a softmax, normalized over the chosen experts.
`StackedLM`: the paper's own (arXiv:2601.20205, eq. 1) with all experts in two tensors, every expert run on every token
and a mask on the gates; gates are sigmoids that are not normalized, and forward takes tokens and labels alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class ListConfig(PretrainedConfig):
    model_type = "own_list"

    def __init__(
        self,
        vocab_size: int = 128,
        hidden_size: int = 72,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 6,
        head_dim: int = 20,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int = 40,
        max_positions: int = 256,
        **rest: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.max_positions = max_positions
        super().__init__(**rest)


class SelfAttention(nn.Module):
    """Causal softmax attention with the factor 1/√d written where it is used."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.d = heads, head_dim
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.k = nn.Linear(width, heads * head_dim, bias=False)
        self.v = nn.Linear(width, heads * head_dim, bias=False)
        self.proj = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (m(x).view(B, T, self.heads, self.d).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.d)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        mixed = F.softmax(scores.masked_fill(future, float("-inf")), dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(B, T, -1))


class Expert(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ListMoE(nn.Module):
    def __init__(self, config: ListConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            Expert(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        gates, chosen = F.softmax(self.router(flat), dim=-1).topk(self.top_k, dim=-1)
        gates = gates / gates.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            out.index_add_(0, token, expert(flat[token]) * gates[token, place, None])
        return out.view_as(x)


class ListBlock(nn.Module):
    def __init__(self, config: ListConfig) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(config.hidden_size)
        self.attn = SelfAttention(config.hidden_size, config.num_attention_heads, config.head_dim)
        self.ln2 = nn.LayerNorm(config.hidden_size)
        self.moe = ListMoE(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.moe(self.ln2(x))


class ListLM(PreTrainedModel):
    config_class = ListConfig
    base_model_prefix = "blocks"

    def __init__(self, config: ListConfig) -> None:
        super().__init__(config)
        self.tok = nn.Embedding(config.vocab_size, config.hidden_size)
        self.pos = nn.Embedding(config.max_positions, config.hidden_size)
        self.blocks = nn.ModuleList(ListBlock(config) for _ in range(config.num_hidden_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tok

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **ignored: Any) -> CausalLMOutput:
        x = self.tok(input_ids) + self.pos(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return _output(self.head(self.ln_f(x)), labels)


class StackedConfig(PretrainedConfig):
    model_type = "own_stacked"

    def __init__(
        self,
        vocab_size: int = 128,
        n_embd: int = 72,
        n_layer: int = 4,
        n_head: int = 6,
        d_head: int = 20,
        n_exp: int = 8,
        n_act: int = 2,
        d_ff: int = 40,
        **rest: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.n_embd = n_embd
        self.n_layer = n_layer
        self.n_head = n_head
        self.d_head = d_head
        self.n_exp = n_exp
        self.n_act = n_act
        self.d_ff = d_ff
        super().__init__(**rest)


class StackedMoE(nn.Module):
    """Σ over the chosen of sigmoid(r_i)·E_i(x); what is not chosen has a gate of 0. e: expert, d: width, f: hidden."""

    def __init__(self, config: StackedConfig) -> None:
        super().__init__()
        self.n_act = config.n_act
        self.wr = nn.Parameter(torch.empty(config.n_embd, config.n_exp))
        self.register_buffer("balance", torch.zeros(config.n_exp))
        self.w1 = nn.Parameter(torch.empty(config.n_exp, config.n_embd, config.d_ff))
        self.w2 = nn.Parameter(torch.empty(config.n_exp, config.d_ff, config.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(x @ self.wr)
        chosen = (gates + self.balance).topk(self.n_act, dim=-1).indices
        gates = gates * torch.zeros_like(gates).scatter(-1, chosen, 1.0)
        hidden = F.gelu(torch.einsum("btd,edf->btef", x, self.w1))
        each = torch.einsum("btef,efd->bted", hidden, self.w2)
        return (each * gates.unsqueeze(-1)).sum(dim=2)


class StackedBlock(nn.Module):
    def __init__(self, config: StackedConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd)
        self.mix = SelfAttention(config.n_embd, config.n_head, config.d_head)
        self.norm2 = nn.RMSNorm(config.n_embd)
        self.ffn = StackedMoE(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class StackedLM(PreTrainedModel):
    config_class = StackedConfig
    base_model_prefix = "h"

    def __init__(self, config: StackedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(StackedBlock(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StackedMoE):
            for weight in (module.wr, module.w1, module.w2):
                nn.init.normal_(weight, std=0.02)
            nn.init.zeros_(module.balance)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        x = self.embed_tokens(input_ids)
        for block in self.h:
            x = block(x)
        return _output(self.lm_head(self.norm(x)), labels)


def _output(logits: Tensor, labels: Tensor | None) -> CausalLMOutput:
    loss = None
    if labels is not None:
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return CausalLMOutput(loss=loss, logits=logits)
