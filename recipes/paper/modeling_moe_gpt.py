"""The model of arXiv:2601.20205 (Section 3.1, Appendix A): GPT-2 with experts in the place of its MLPs.

    x⁰ = tok_emb + pos_emb;  x ← x + (1/L)·MHSA(LN(x));  x ← x + (1/L)·MoE(LN(x));  logits = W_U·LN(x)
    MoE(h) = (1/K) Σ_{i∈A(h)} g_i·E_i(h),   g_i = sigmoid(⟨w_i, h⟩),   E_i(h) = W_down,i·gelu(W_up,i·h)      (eq. 1)

A(h) are the K largest of g_i + b_i. The selection biases b take part in nothing else and get no gradient;
`moe_param.LoadBalancer` moves them by the load of the experts (eq. 2). Attention logits are q·k/d, positions are
learned, norms and attention have biases, the unembedding is the embedding. L, K and d are the model's own sizes, so
that the forward pass is the paper's at any size without `moe_param`; what that has to know of them is said at the end.

Importing this file registers everything with transformers' Auto classes under the model type `moe_gpt`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from moe_param import register_adapter


class MoEGPTConfig(PretrainedConfig):
    """Sizes and initialization; the defaults are the paper's base model (38M active, 51M total parameters).

    Args:
        head_dim: stays while the width grows; more heads do (Appendix A).
        initializer_range: σ, the init std of all random weights.
        router_init_std: of the router alone; None is σ, 0 the router of Appendix E, which starts at zero.
        selection_bias_init_std: of the selection biases; 0 in the main text, above 0 in Appendix E.

    Raises:
        ValueError: sizes that do not fit, or a router and selection biases that both start at zero.
    """

    model_type = "moe_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # a list: Trainer adds one to it

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        head_dim: int = 64,
        num_experts: int = 4,
        num_experts_per_tok: int = 1,
        moe_intermediate_size: int = 512,
        max_position_embeddings: int = 1024,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 2**-6,
        router_init_std: float | None = None,
        selection_bias_init_std: float = 0.0,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
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
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.router_init_std = router_init_std
        self.selection_bias_init_std = selection_bias_init_std
        self.use_cache = use_cache
        check(self)
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **rest})


def check(config: MoEGPTConfig) -> None:
    """Raises ValueError where the config describes no model, or one that trains without ever routing."""
    if not 1 <= config.num_experts_per_tok <= config.num_experts:
        raise ValueError(
            f"num_experts_per_tok is {config.num_experts_per_tok}: expected 1 to num_experts = {config.num_experts}"
        )
    stds = {"router_init_std": router_std(config), "selection_bias_init_std": config.selection_bias_init_std}
    for name, std in stds.items():
        if not 0 <= std < float("inf"):
            raise ValueError(f"{name} is {std}: expected a number of at least 0")
    if not any(stds.values()):
        raise ValueError(
            "router_init_std and selection_bias_init_std are both 0: all gates would be alike, the same experts would "
            "serve every token, and the loss would fall all the same. Start one of them at random: the router "
            f"(router_init_std: null, which is σ = {config.initializer_range:g}) or the biases "
            "(selection_bias_init_std: 0.05)"
        )


def router_std(config: MoEGPTConfig) -> float:
    return config.initializer_range if config.router_init_std is None else config.router_init_std


class MoEGPTRouter(nn.Module):
    """From tokens (T, n) to logits (T, E), gates g_i/K (T, K) and the experts chosen (T, K)."""

    selection_bias: Tensor

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("selection_bias", torch.zeros(config.num_experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states, self.weight)
        gates = logits.sigmoid()
        chosen = (gates.detach() + self.selection_bias).topk(self.top_k, dim=-1).indices
        return logits, gates.gather(-1, chosen) / self.top_k, chosen


@use_experts_implementation(has_gate=False)
class MoEGPTExperts(nn.Module):
    """E_i(h) = W_down,i·gelu(W_up,i·h), in two stacks, which is what every experts backend of transformers takes."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__()
        n, H, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.num_experts = E
        self.up_proj = nn.Parameter(torch.empty(E, H, n))
        self.down_proj = nn.Parameter(torch.empty(E, n, H))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The "eager" backend: one expert after the other, each on the tokens that chose it."""
        total = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, place = torch.where(top_k_index == expert)
            hidden = self.act_fn(F.linear(hidden_states[token], self.up_proj[expert]))
            out = F.linear(hidden, self.down_proj[expert]) * top_k_weights[token, place, None]
            total.index_add_(0, token, out.to(total.dtype))
        return total


class MoEGPTMoE(nn.Module):
    """eq. (1); the router has divided its gates by K."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__()
        self.router = MoEGPTRouter(config)
        self.experts = MoEGPTExperts(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, gates, chosen = self.router(flat)
        out: Tensor = self.experts(flat, chosen, gates)
        return out.view_as(hidden_states)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, for the backend "eager"."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


class MoEGPTAttention(nn.Module):
    """Causal self-attention with q·k/d, as maximal-update parameterizations have it, not q·k/√d."""

    def __init__(self, config: MoEGPTConfig, layer_idx: int) -> None:
        super().__init__()
        n, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.scaling = 1 / config.head_dim
        self.num_key_value_groups = 1
        self.is_causal = True
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(n, inner) for _ in range(3))
        self.o_proj = nn.Linear(inner, n)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> Tensor:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (project(hidden_states).view(heads).transpose(1, 2) for project in projections)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        mixed, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        out: Tensor = self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1))
        return out


class MoEGPTBlock(GradientCheckpointingLayer):
    """Two branches, each added with the factor 1/L."""

    def __init__(self, config: MoEGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.branch = 1 / config.num_hidden_layers
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = MoEGPTAttention(config, layer_idx)
        self.moe_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.moe = MoEGPTMoE(config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> Tensor:
        attended = self.attention(self.attention_norm(hidden_states), attention_mask, past_key_values, **kwargs)
        hidden_states = hidden_states + self.branch * attended
        out: Tensor = hidden_states + self.branch * self.moe(self.moe_norm(hidden_states))
        return out


class MoEGPTPreTrainedModel(PreTrainedModel):
    config: MoEGPTConfig
    config_class = MoEGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoEGPTBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        config = self.config
        if isinstance(module, MoEGPTExperts):
            init.normal_(module.up_proj, std=config.initializer_range)
            init.normal_(module.down_proj, std=config.initializer_range)
        elif isinstance(module, MoEGPTRouter):
            _start(module.weight, router_std(config))
            _start(module.selection_bias, config.selection_bias_init_std)


def _start(tensor: Tensor, std: float) -> None:
    if std:
        init.normal_(tensor, std=std)
    else:
        init.zeros_(tensor)


class MoEGPTModel(MoEGPTPreTrainedModel):
    """From token ids to the last hidden states."""

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__(config)
        check(config)  # it may have been changed since it was made
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(MoEGPTBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.token_embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        tokens = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]
        if seen + tokens.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"{seen + tokens.shape[1]} tokens, and positions are learned for max_position_embeddings = "
                f"{self.config.max_position_embeddings}"
            )
        asked = [name for name in ("output_hidden_states", "output_attentions") if kwargs.pop(name, None)]
        if asked:
            raise ValueError(f"{asked[0]}: this model returns logits and the cache; leave it out")
        hidden_states = tokens + self.position_embedding(position_ids)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class MoEGPTForCausalLM(MoEGPTPreTrainedModel, GenerationMixin):
    """The language model; the unembedding is the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.token_embedding.weight"}

    def __init__(self, config: MoEGPTConfig) -> None:
        super().__init__(config)
        self.model = MoEGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)


AutoConfig.register(MoEGPTConfig.model_type, MoEGPTConfig, exist_ok=True)
AutoModel.register(MoEGPTConfig, MoEGPTModel, exist_ok=True)
AutoModelForCausalLM.register(MoEGPTConfig, MoEGPTForCausalLM, exist_ok=True)

# What a forward pass at one size cannot tell: that its factors are 1/L and 1/K. A table that multiplies branches by
# 1/rL and gates by 1/rK then leaves this model as it is.
register_adapter(
    MoEGPTConfig.model_type,
    {"multipliers": {"residual_branch": {"depth": -1}, "unnormalized_gates": {"top_k": -1}}},
    replace=True,
)
