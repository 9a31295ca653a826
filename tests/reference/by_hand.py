"""Initialization, learning rate and epsilon of every parameter of ten models, derived by hand from the papers' tables.

Each model is taken from a base to a target in which every size grows by a factor of its own, so that a rule that reads
one size for another gives another number. The lines are what the optimizer and the initializer see, forward
multipliers folded in: with a multiplier m beside a weight, std' = m·std, lr' = m·lr, ε' = ε/m (arXiv:2601.20205, D.1).

How they were derived. Unfolded, n: width, L: depth, K: experts per token, H: expert size, f: fan-in.

    embedding, unembedding       std 1         lr 1     ε 1/n           arXiv:2505.01618, Table 1
    attention matrices           std f^-1/2    lr 1/f   ε 1/(n·L)       the same
    router                       std 1/n       lr 1/n   ε 1/(L·K)       arXiv:2601.20205, Table 1 (γ = 1)
    expert, up and gate          std n^-1/2    lr 1/n   ε 1/(H·L·K)     the same
    expert, down                 std n^1/2/H   lr 1/H   ε 1/(n·L·K)     the same: mean-field in H
    shared expert, dense MLP     an expert of their own size that every token visits: the same without K
    gains in blocks              1             lr 1     ε 1/(u·L)       u: number of the gain's entries
    final gain                   1             lr 1     ε 1/n
    biases                       as they are   lr 1     ε of the linear or the norm they belong to

Multipliers: 1/L on a branch (its last linear); 1/n on the logits (unembedding; tied: the final gain); 1/K on experts
whose gates neither sum to a constant nor come from a softmax; on queries (d_base / d)^1/2, on top of the model's 1/√d.

Nothing here asks moe_param.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

N, L, K, H = 5.0, 3.0, 2.0, 7.0
"""target / base of width, depth, experts per token (and experts) and expert size."""
D = 1.75
"""head_dim: 16 → 28."""
A = 3 * D
"""heads · head_dim, which the attention's output projection sums over: 4 → 12 heads."""
F, S = 11.0, 21.0
"""Sizes of dense MLPs and of shared experts."""


@dataclass(frozen=True)
class Line:
    """One parameter: initial std as a multiple of the user's (None: it starts at `constant`), factors on the user's
    learning rate and ε, whether it decays."""

    std: float | None
    lr: float
    eps: float
    decay: bool = True
    constant: float | None = None


def gain(lr: float, eps: float, value: float = 1.0) -> Line:
    return Line(None, lr, eps, decay=False, constant=value)


def bias(lr: float, eps: float) -> Line:
    return Line(None, lr, eps, decay=False, constant=0.0)


@dataclass(frozen=True)
class Case:
    """A family with the sizes of its config and a line per pattern of parameter names (`*` is a number).

    sizes: what is a pair is (base, target); the rest is the same in both.
    """

    family: str
    sizes: dict[str, Any]
    lines: dict[str, Line]

    @property
    def base(self) -> dict[str, Any]:
        return {name: size[0] if isinstance(size, tuple) else size for name, size in self.sizes.items()}

    @property
    def target(self) -> dict[str, Any]:
        return {name: size[1] if isinstance(size, tuple) else size for name, size in self.sizes.items()}


_TOKENS = {"vocab_size": 112, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    **_TOKENS,
    "hidden_size": (64, 320),
    "num_hidden_layers": (2, 6),
    "num_attention_heads": (4, 12),
    "num_key_value_heads": (2, 6),
    "num_experts_per_tok": (2, 4),
}

OUTSIDE = {
    "model.embed_tokens.weight": Line(1, 1, 1 / N),
    "model.norm.weight": gain(1, 1 / N),
    "lm_head.weight": Line(1 / N, 1 / N, 1),  # 1/n folded
    "model.layers.*.input_layernorm.weight": gain(1, 1 / (N * L)),
    "model.layers.*.post_attention_layernorm.weight": gain(1, 1 / (N * L)),
}
"""What most families have in common: embedding, head and block norms."""

ATTENTION = {
    "model.layers.*.self_attn.q_proj.weight": Line((N * D) ** -0.5, 1 / (N * D**0.5), D**0.5 / (N * L)),
    "model.layers.*.self_attn.k_proj.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
    "model.layers.*.self_attn.v_proj.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
    "model.layers.*.self_attn.o_proj.weight": Line(A**-0.5 / L, 1 / (A * L), 1 / N),  # 1/L folded
}
"""Plain attention: queries take the factor on the logits."""

MIXTRAL = Case(
    "mixtral",
    {**_SIZES, "head_dim": (16, 28), "num_local_experts": (8, 16), "intermediate_size": (48, 336)},
    {
        **OUTSIDE,
        **ATTENTION,
        "model.layers.*.mlp.gate.weight": Line(1 / N, 1 / N, 1 / (L * K)),
        "model.layers.*.mlp.experts.gate_up_proj": Line(N**-0.5, 1 / N, 1 / (H * L * K)),
        "model.layers.*.mlp.experts.down_proj": Line(N**0.5 / (H * L), 1 / (H * L), 1 / (N * K)),
    },
)

TIED = Case(
    "mixtral",
    {**MIXTRAL.sizes, "tie_word_embeddings": True},
    {name: line for name, line in MIXTRAL.lines.items() if name != "lm_head.weight"}
    # One tensor, the embedding's line; the final gain takes 1/n.
    | {"model.norm.weight": gain(1 / N, 1, value=1 / N)},
)

QWEN3_MOE = Case(
    "qwen3_moe",
    {
        **_SIZES,
        "head_dim": (16, 28),
        "num_local_experts": (8, 16),
        "moe_intermediate_size": (48, 336),
        "norm_topk_prob": False,
        "intermediate_size": (96, 1056),
        "mlp_only_layers": [0],
    },
    {
        **OUTSIDE,
        **ATTENTION,
        # Queries are normed behind their projection: the norm's gain takes the factor, the projection is plain.
        "model.layers.*.self_attn.q_proj.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
        "model.layers.*.self_attn.q_norm.weight": gain(D**-0.5, D**0.5 / (D * L), value=D**-0.5),
        "model.layers.*.self_attn.k_norm.weight": gain(1, 1 / (D * L)),
        # Layer 0 is dense.
        "model.layers.*.mlp.gate_proj.weight": Line(N**-0.5, 1 / N, 1 / (F * L)),
        "model.layers.*.mlp.up_proj.weight": Line(N**-0.5, 1 / N, 1 / (F * L)),
        "model.layers.*.mlp.down_proj.weight": Line(N**0.5 / (F * L), 1 / (F * L), 1 / N),
        # Gates are a softmax over all experts: at a fixed share of active experts they fall as 1/K by themselves.
        "model.layers.*.mlp.gate.weight": Line(1 / N, 1 / N, 1 / (L * K)),
        "model.layers.*.mlp.experts.gate_up_proj": Line(N**-0.5, 1 / N, 1 / (H * L * K)),
        "model.layers.*.mlp.experts.down_proj": Line(N**0.5 / (H * L), 1 / (H * L), 1 / (N * K)),
    },
)

# head_dim is width / heads: 60 / 6 → 300 / 25, so × 1.2; keys have 3 · 10 → 25 · 12 entries.
D_OLMOE, KEYS_OLMOE = 1.2, 10.0
OLMOE = Case(
    "olmoe",
    {
        **_SIZES,
        "hidden_size": (60, 300),
        "num_attention_heads": (6, 25),
        "num_key_value_heads": (3, 25),
        "num_experts": (8, 16),
        "intermediate_size": (48, 336),
    },
    {
        **OUTSIDE,
        "model.layers.*.self_attn.q_proj.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
        "model.layers.*.self_attn.k_proj.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
        "model.layers.*.self_attn.v_proj.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
        "model.layers.*.self_attn.o_proj.weight": Line(N**-0.5 / L, 1 / (N * L), 1 / N),
        # These norms have a gain of their own for every head, so as many entries as all queries (n) or all keys.
        "model.layers.*.self_attn.q_norm.weight": gain(D_OLMOE**-0.5, D_OLMOE**0.5 / (N * L), value=D_OLMOE**-0.5),
        "model.layers.*.self_attn.k_norm.weight": gain(1, 1 / (KEYS_OLMOE * L)),
        "model.layers.*.mlp.gate.weight": Line(1 / N, 1 / N, 1 / (L * K)),
        "model.layers.*.mlp.experts.gate_up_proj": Line(N**-0.5, 1 / N, 1 / (H * L * K)),
        "model.layers.*.mlp.experts.down_proj": Line(N**0.5 / (H * L), 1 / (H * L), 1 / (N * K)),
    },
)

# Latent ranks of queries 40 → 60 and of keys and values 24 → 60; values 4 · 20 → 12 · 25; query·key 16 + 8 → 34 + 8.
R_Q, R_KV, V = 1.5, 2.5, 3.75
DEEPSEEK_V3 = Case(
    "deepseek_v3",
    {
        **_SIZES,
        "num_key_value_heads": (4, 12),
        "q_lora_rank": (40, 60),
        "kv_lora_rank": (24, 60),
        "qk_nope_head_dim": (16, 34),
        "qk_rope_head_dim": 8,
        "v_head_dim": (20, 25),
        "n_routed_experts": (8, 16),
        "moe_intermediate_size": (48, 336),
        "n_shared_experts": (1, 3),
        "n_group": 2,
        "topk_group": 1,
        "intermediate_size": (96, 1056),
        "first_k_dense_replace": 1,
    },
    {
        **OUTSIDE,
        "model.layers.*.self_attn.q_a_proj.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
        "model.layers.*.self_attn.q_a_layernorm.weight": gain(1, 1 / (R_Q * L)),
        "model.layers.*.self_attn.q_b_proj.weight": Line((R_Q * D) ** -0.5, 1 / (R_Q * D**0.5), D**0.5 / (N * L)),
        "model.layers.*.self_attn.kv_a_proj_with_mqa.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
        "model.layers.*.self_attn.kv_a_layernorm.weight": gain(1, 1 / (R_KV * L)),
        "model.layers.*.self_attn.kv_b_proj.weight": Line(R_KV**-0.5, 1 / R_KV, 1 / (N * L)),
        "model.layers.*.self_attn.o_proj.weight": Line(V**-0.5 / L, 1 / (V * L), 1 / N),
        # Layer 0 is dense.
        "model.layers.*.mlp.gate_proj.weight": Line(N**-0.5, 1 / N, 1 / (F * L)),
        "model.layers.*.mlp.up_proj.weight": Line(N**-0.5, 1 / N, 1 / (F * L)),
        "model.layers.*.mlp.down_proj.weight": Line(N**0.5 / (F * L), 1 / (F * L), 1 / N),
        "model.layers.*.mlp.gate.weight": Line(1 / N, 1 / N, 1 / (L * K)),
        "model.layers.*.mlp.experts.gate_up_proj": Line(N**-0.5, 1 / N, 1 / (H * L * K)),
        "model.layers.*.mlp.experts.down_proj": Line(N**0.5 / (H * L), 1 / (H * L), 1 / (N * K)),
        "model.layers.*.mlp.shared_experts.gate_proj.weight": Line(N**-0.5, 1 / N, 1 / (S * L)),
        "model.layers.*.mlp.shared_experts.up_proj.weight": Line(N**-0.5, 1 / N, 1 / (S * L)),
        "model.layers.*.mlp.shared_experts.down_proj.weight": Line(N**0.5 / (S * L), 1 / (S * L), 1 / N),
    },
)

GPT_OSS = Case(
    "gpt_oss",
    {
        **MIXTRAL.sizes,
        "sliding_window": 8,
        "layer_types": (["sliding_attention", "full_attention"], ["sliding_attention", "full_attention"] * 3),
    },
    {
        **OUTSIDE,
        **ATTENTION,
        "model.layers.*.self_attn.q_proj.bias": bias(D**-0.5, D**0.5 / (N * L)),
        "model.layers.*.self_attn.k_proj.bias": bias(1, 1 / (N * L)),
        "model.layers.*.self_attn.v_proj.bias": bias(1, 1 / (N * L)),
        "model.layers.*.self_attn.o_proj.bias": bias(1 / L, 1 / N),
        "model.layers.*.self_attn.sinks": Line(1, 1, 1 / (N * L), decay=False),
        "model.layers.*.mlp.router.weight": Line(1 / N, 1 / N, 1 / (L * K)),
        "model.layers.*.mlp.router.bias": Line(1, 1, 1 / (L * K), decay=False),
        # Stacks are (experts, in, out).
        "model.layers.*.mlp.experts.gate_up_proj": Line(N**-0.5, 1 / N, 1 / (H * L * K)),
        "model.layers.*.mlp.experts.gate_up_proj_bias": bias(1, 1 / (H * L * K)),
        "model.layers.*.mlp.experts.down_proj": Line(N**0.5 / (H * L), 1 / (H * L), 1 / (N * K)),
        "model.layers.*.mlp.experts.down_proj_bias": bias(1 / L, 1 / (N * K)),
    },
)

LLAMA4 = Case(
    "llama4",
    {
        **_SIZES,
        "num_hidden_layers": (4, 12),  # the fourth is the first without rotary positions
        "head_dim": (16, 28),
        "use_qk_norm": False,
        "num_local_experts": (8, 16),
        "intermediate_size": (48, 336),
        "intermediate_size_mlp": (96, 1056),
        "interleave_moe_layer_step": 2,
    },
    {
        **OUTSIDE,
        **ATTENTION,
        # Every other layer is dense.
        "model.layers.*.feed_forward.gate_proj.weight": Line(N**-0.5, 1 / N, 1 / (F * L)),
        "model.layers.*.feed_forward.up_proj.weight": Line(N**-0.5, 1 / N, 1 / (F * L)),
        "model.layers.*.feed_forward.down_proj.weight": Line(N**0.5 / (F * L), 1 / (F * L), 1 / N),
        # Gates are sigmoids, not normalized: 1/K is folded into the routed experts, and into them alone.
        "model.layers.*.feed_forward.router.weight": Line(1 / N, 1 / N, 1 / (L * K)),
        "model.layers.*.feed_forward.experts.gate_up_proj": Line(N**-0.5, 1 / N, 1 / (H * L * K)),
        "model.layers.*.feed_forward.experts.down_proj": Line(N**0.5 / (H * L * K), 1 / (H * L * K), 1 / N),
        # The shared expert has the routed experts' size.
        "model.layers.*.feed_forward.shared_expert.gate_proj.weight": Line(N**-0.5, 1 / N, 1 / (H * L)),
        "model.layers.*.feed_forward.shared_expert.up_proj.weight": Line(N**-0.5, 1 / N, 1 / (H * L)),
        "model.layers.*.feed_forward.shared_expert.down_proj.weight": Line(N**0.5 / (H * L), 1 / (H * L), 1 / N),
    },
)

# One matrix makes queries, keys and values, so head_dim stays: 4 → 20 heads.
_DBRX_ATTENTION = {"clip_qkv": 8.0, "rope_theta": 10000.0}
DBRX = Case(
    "dbrx",
    {
        **_TOKENS,
        "d_model": (64, 320),
        "n_layers": (2, 6),
        "n_heads": (4, 20),
        "attn_config": ({**_DBRX_ATTENTION, "kv_n_heads": 2}, {**_DBRX_ATTENTION, "kv_n_heads": 10}),
        "ffn_config": (
            {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
            {"ffn_hidden_size": 336, "moe_num_experts": 16, "moe_top_k": 4},
        ),
    },
    {
        "transformer.wte.weight": Line(1, 1, 1 / N),
        "transformer.norm_f.weight": gain(1, 1 / N),
        "lm_head.weight": Line(1 / N, 1 / N, 1),
        "transformer.blocks.*.norm_attn_norm.norm_1.weight": gain(1, 1 / (N * L)),
        "transformer.blocks.*.norm_attn_norm.norm_2.weight": gain(1, 1 / (N * L)),
        "transformer.blocks.*.norm_attn_norm.attn.Wqkv.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
        "transformer.blocks.*.norm_attn_norm.attn.out_proj.weight": Line(N**-0.5 / L, 1 / (N * L), 1 / N),
        "transformer.blocks.*.ffn.router.layer.weight": Line(1 / N, 1 / N, 1 / (L * K)),
        # Experts are blocks of rows of (experts · H, n) matrices; w2 is used untransposed, so its fan-in is H.
        "transformer.blocks.*.ffn.experts.mlp.w1": Line(N**-0.5, 1 / N, 1 / (H * L * K)),
        "transformer.blocks.*.ffn.experts.mlp.v1": Line(N**-0.5, 1 / N, 1 / (H * L * K)),
        "transformer.blocks.*.ffn.experts.mlp.w2": Line(N**0.5 / (H * L), 1 / (H * L), 1 / (N * K)),
    },
)

OWN_LIST = Case(
    "own_list",
    {
        "hidden_size": (64, 320),
        "num_hidden_layers": (2, 6),
        "num_attention_heads": (4, 12),
        "head_dim": (16, 28),
        "num_experts": (8, 16),
        "num_experts_per_tok": (2, 4),
        "moe_intermediate_size": (48, 336),
    },
    {
        "tok.weight": Line(1, 1, 1 / N),
        "pos.weight": Line(1, 1, 1 / N),
        "ln_f.weight": gain(1, 1 / N),
        "ln_f.bias": bias(1, 1 / N),
        "head.weight": Line(1 / N, 1 / N, 1),
        "blocks.*.ln1.weight": gain(1, 1 / (N * L)),
        "blocks.*.ln1.bias": bias(1, 1 / (N * L)),
        "blocks.*.ln2.weight": gain(1, 1 / (N * L)),
        "blocks.*.ln2.bias": bias(1, 1 / (N * L)),
        "blocks.*.attn.q.weight": Line((N * D) ** -0.5, 1 / (N * D**0.5), D**0.5 / (N * L)),
        "blocks.*.attn.k.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
        "blocks.*.attn.v.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
        "blocks.*.attn.proj.weight": Line(A**-0.5 / L, 1 / (A * L), 1 / N),
        "blocks.*.moe.router.weight": Line(1 / N, 1 / N, 1 / (L * K)),
        "blocks.*.moe.experts.*.fc1.weight": Line(N**-0.5, 1 / N, 1 / (H * L * K)),
        "blocks.*.moe.experts.*.fc1.bias": bias(1, 1 / (H * L * K)),
        "blocks.*.moe.experts.*.fc2.weight": Line(N**0.5 / (H * L), 1 / (H * L), 1 / (N * K)),
        "blocks.*.moe.experts.*.fc2.bias": bias(1 / L, 1 / (N * K)),
    },
)

OWN_STACKED = Case(
    "own_stacked",
    {
        "n_embd": (64, 320),
        "n_layer": (2, 6),
        "n_head": (4, 12),
        "d_head": (16, 28),
        "n_exp": (8, 16),
        "n_act": (2, 4),
        "d_ff": (48, 336),
    },
    {
        "embed_tokens.weight": Line(1, 1, 1 / N),
        "norm.weight": gain(1, 1 / N),
        "lm_head.weight": Line(1 / N, 1 / N, 1),
        "h.*.norm1.weight": gain(1, 1 / (N * L)),
        "h.*.norm2.weight": gain(1, 1 / (N * L)),
        "h.*.mix.q.weight": Line((N * D) ** -0.5, 1 / (N * D**0.5), D**0.5 / (N * L)),
        "h.*.mix.k.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
        "h.*.mix.v.weight": Line(N**-0.5, 1 / N, 1 / (N * L)),
        "h.*.mix.proj.weight": Line(A**-0.5 / L, 1 / (A * L), 1 / N),
        # The paper's own gates: 1/K is folded into w2. All of these stacks are (…, in, out).
        "h.*.ffn.wr": Line(1 / N, 1 / N, 1 / (L * K)),
        "h.*.ffn.w1": Line(N**-0.5, 1 / N, 1 / (H * L * K)),
        "h.*.ffn.w2": Line(N**0.5 / (H * L * K), 1 / (H * L * K), 1 / N),
    },
)

CASES = {
    "mixtral": MIXTRAL,
    "mixtral, tied": TIED,
    "qwen3_moe": QWEN3_MOE,
    "olmoe": OLMOE,
    "deepseek_v3": DEEPSEEK_V3,
    "gpt_oss": GPT_OSS,
    "llama4": LLAMA4,
    "dbrx": DBRX,
    "own_list": OWN_LIST,
    "own_stacked": OWN_STACKED,
}
