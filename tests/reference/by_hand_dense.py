"""The lines of `by_hand` for models without experts. The same derivation: a dense MLP is an expert of its own size that
every token visits, and nothing else changes. Nothing here asks moe_param."""

from __future__ import annotations

from transformers import GPTNeoXForCausalLM

from tests.reference.by_hand import (
    _SIZES,
    ATTENTION,
    D_OLMOE,
    KEYS_OLMOE,
    OUTSIDE,
    Case,
    D,
    F,
    L,
    Line,
    N,
    bias,
    gain,
)

SIZES = {name: size for name, size in _SIZES.items() if name != "num_experts_per_tok"} | {
    "intermediate_size": (96, 1056)
}
HEADS = {"head_dim": (16, 28)}
B = 4 * D
"""heads · head_dim where heads must divide the width: 4 → 16 heads."""
DIVIDING = {**HEADS, "num_attention_heads": (4, 16), "num_key_value_heads": (2, 8)}
MORE_HEADS = {"num_attention_heads": (4, 20), "num_key_value_heads": (2, 10)}
"""For families where one matrix makes queries, keys and values, so head_dim stays."""

MLP_IN = Line(N**-0.5, 1 / N, 1 / (F * L))
MLP_OUT = Line(N**0.5 / (F * L), 1 / (F * L), 1 / N)  # 1/L folded
MLP = {
    "model.layers.*.mlp.gate_proj.weight": MLP_IN,
    "model.layers.*.mlp.up_proj.weight": MLP_IN,
    "model.layers.*.mlp.down_proj.weight": MLP_OUT,
}
# Fused or not, head_dim held: heads grow with the width.
PLAIN_IN = Line(N**-0.5, 1 / N, 1 / (N * L))
PLAIN_OUT = Line(N**-0.5 / L, 1 / (N * L), 1 / N)  # 1/L folded
BLOCK, CLOSED = 1 / (N * L), 1 / N
"""ε of what stands in a block, without and with 1/L folded in."""

LLAMA = Case(
    "llama",
    {**SIZES, **DIVIDING},
    {
        **OUTSIDE,
        **ATTENTION,
        **MLP,
        "model.layers.*.self_attn.o_proj.weight": Line(B**-0.5 / L, 1 / (B * L), 1 / N),  # 1/L folded
    },
)

QWEN3 = Case(
    "qwen3",
    {**SIZES, **HEADS},
    {
        **OUTSIDE,
        **ATTENTION,
        **MLP,
        # Queries are normed behind their projection: the norm's gain takes the factor, the projection is plain.
        "model.layers.*.self_attn.q_proj.weight": PLAIN_IN,
        "model.layers.*.self_attn.q_norm.weight": gain(D**-0.5, D**0.5 / (D * L), value=D**-0.5),
        "model.layers.*.self_attn.k_norm.weight": gain(1, 1 / (D * L)),
    },
)

# Tied, and embeddings are multiplied by √width in the forward pass, so the tensor is the embedding of the tables over
# √n. As head it is too small by √n, and the final gain takes 1/n · √n. Gains are 1 + w: a factor c makes w = c - 1.
# Every branch ends in a norm, whose gain takes 1/L. scaling is query_pre_attn_scalar^-1/2, and goes with head_dim.
GEMMA3 = Case(
    "gemma3_text",
    {
        **SIZES,
        **DIVIDING,
        "query_pre_attn_scalar": (16, 28),
        "sliding_window": 8,
        "layer_types": (["sliding_attention", "full_attention"], ["sliding_attention", "full_attention"] * 3),
    },
    {
        "model.embed_tokens.weight": Line(N**-0.5, N**-0.5, N**-0.5),
        "model.norm.weight": gain(N**-0.5, N**-0.5, value=N**-0.5 - 1),
        "model.layers.*.input_layernorm.weight": gain(1, BLOCK, value=0),
        "model.layers.*.pre_feedforward_layernorm.weight": gain(1, BLOCK, value=0),
        "model.layers.*.post_attention_layernorm.weight": gain(1 / L, CLOSED, value=1 / L - 1),
        "model.layers.*.post_feedforward_layernorm.weight": gain(1 / L, CLOSED, value=1 / L - 1),
        "model.layers.*.self_attn.q_proj.weight": PLAIN_IN,
        "model.layers.*.self_attn.q_norm.weight": gain(D**-0.5, D**0.5 / (D * L), value=D**-0.5 - 1),
        "model.layers.*.self_attn.k_proj.weight": PLAIN_IN,
        "model.layers.*.self_attn.k_norm.weight": gain(1, 1 / (D * L), value=0),
        "model.layers.*.self_attn.v_proj.weight": PLAIN_IN,
        "model.layers.*.self_attn.o_proj.weight": Line(B**-0.5, 1 / B, BLOCK),
        "model.layers.*.mlp.gate_proj.weight": MLP_IN,
        "model.layers.*.mlp.up_proj.weight": MLP_IN,
        "model.layers.*.mlp.down_proj.weight": Line(N**0.5 / F, 1 / F, BLOCK),
    },
)

# Branches are normed at their end, and queries and keys over all heads: 6 · 10 → 25 · 12 and 3 · 10 → 25 · 12 entries.
OLMO2 = Case(
    "olmo2",
    {**SIZES, "hidden_size": (60, 300), "num_attention_heads": (6, 25), "num_key_value_heads": (3, 25)},
    {
        "model.embed_tokens.weight": Line(1, 1, 1 / N),
        "model.norm.weight": gain(1, 1 / N),
        "lm_head.weight": Line(1 / N, 1 / N, 1),
        "model.layers.*.post_attention_layernorm.weight": gain(1 / L, CLOSED, value=1 / L),
        "model.layers.*.post_feedforward_layernorm.weight": gain(1 / L, CLOSED, value=1 / L),
        "model.layers.*.self_attn.q_proj.weight": PLAIN_IN,
        "model.layers.*.self_attn.q_norm.weight": gain(D_OLMOE**-0.5, D_OLMOE**0.5 * BLOCK, value=D_OLMOE**-0.5),
        "model.layers.*.self_attn.k_proj.weight": PLAIN_IN,
        "model.layers.*.self_attn.k_norm.weight": gain(1, 1 / (KEYS_OLMOE * L)),
        "model.layers.*.self_attn.v_proj.weight": PLAIN_IN,
        "model.layers.*.self_attn.o_proj.weight": Line(N**-0.5, 1 / N, BLOCK),
        "model.layers.*.mlp.gate_proj.weight": MLP_IN,
        "model.layers.*.mlp.up_proj.weight": MLP_IN,
        "model.layers.*.mlp.down_proj.weight": Line(N**0.5 / F, 1 / F, BLOCK),
    },
)

# Weights are (in, out); tied; what the final norm adds is in front of the logits, too.
GPT2 = Case(
    "gpt2",
    {
        **{name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
        "n_embd": (64, 320),
        "n_layer": (2, 6),
        "n_head": (4, 20),
        "n_inner": (96, 1056),
        "n_positions": 64,
    },
    {
        "transformer.wte.weight": Line(1, 1, 1 / N),
        "transformer.wpe.weight": Line(1, 1, 1 / N),
        "transformer.ln_f.weight": gain(1 / N, 1, value=1 / N),
        "transformer.ln_f.bias": bias(1 / N, 1),
        "transformer.h.*.ln_1.weight": gain(1, BLOCK),
        "transformer.h.*.ln_1.bias": bias(1, BLOCK),
        "transformer.h.*.ln_2.weight": gain(1, BLOCK),
        "transformer.h.*.ln_2.bias": bias(1, BLOCK),
        "transformer.h.*.attn.c_attn.weight": PLAIN_IN,
        "transformer.h.*.attn.c_attn.bias": bias(1, BLOCK),
        "transformer.h.*.attn.c_proj.weight": PLAIN_OUT,
        "transformer.h.*.attn.c_proj.bias": bias(1 / L, CLOSED),
        "transformer.h.*.mlp.c_fc.weight": MLP_IN,
        "transformer.h.*.mlp.c_fc.bias": bias(1, 1 / (F * L)),
        "transformer.h.*.mlp.c_proj.weight": MLP_OUT,
        "transformer.h.*.mlp.c_proj.bias": bias(1 / L, CLOSED),
    },
)

NEOX_HEAD = next(iter(GPTNeoXForCausalLM._tied_weights_keys))
"""lm_head.weight, which older versions of transformers call embed_out.weight."""

# Attention and MLP stand side by side: one addition to the stream, closed by both.
GPT_NEOX = Case(
    "gpt_neox",
    {**{name: size for name, size in SIZES.items() if name != "num_key_value_heads"}, "num_attention_heads": (4, 20)},
    {
        "gpt_neox.embed_in.weight": Line(1, 1, 1 / N),
        "gpt_neox.final_layer_norm.weight": gain(1, 1 / N),
        "gpt_neox.final_layer_norm.bias": bias(1, 1 / N),
        NEOX_HEAD: Line(1 / N, 1 / N, 1),
        "gpt_neox.layers.*.input_layernorm.weight": gain(1, BLOCK),
        "gpt_neox.layers.*.input_layernorm.bias": bias(1, BLOCK),
        "gpt_neox.layers.*.post_attention_layernorm.weight": gain(1, BLOCK),
        "gpt_neox.layers.*.post_attention_layernorm.bias": bias(1, BLOCK),
        "gpt_neox.layers.*.attention.query_key_value.weight": PLAIN_IN,
        "gpt_neox.layers.*.attention.query_key_value.bias": bias(1, BLOCK),
        "gpt_neox.layers.*.attention.dense.weight": PLAIN_OUT,
        "gpt_neox.layers.*.attention.dense.bias": bias(1 / L, CLOSED),
        "gpt_neox.layers.*.mlp.dense_h_to_4h.weight": MLP_IN,
        "gpt_neox.layers.*.mlp.dense_h_to_4h.bias": bias(1, 1 / (F * L)),
        "gpt_neox.layers.*.mlp.dense_4h_to_h.weight": MLP_OUT,
        "gpt_neox.layers.*.mlp.dense_4h_to_h.bias": bias(1 / L, CLOSED),
    },
)

PHI3 = Case(
    "phi3",
    {**SIZES, **MORE_HEADS},
    {
        **OUTSIDE,
        "model.layers.*.self_attn.qkv_proj.weight": PLAIN_IN,
        "model.layers.*.self_attn.o_proj.weight": PLAIN_OUT,
        "model.layers.*.mlp.gate_up_proj.weight": MLP_IN,
        "model.layers.*.mlp.down_proj.weight": MLP_OUT,
    },
)

# Positions are learned, linears have biases, and the layer itself holds its MLP.
OPT = Case(
    "opt",
    {
        **{name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
        "hidden_size": (64, 320),
        "word_embed_proj_dim": (64, 320),
        "num_hidden_layers": (2, 6),
        "num_attention_heads": (4, 20),
        "ffn_dim": (96, 1056),
        "max_position_embeddings": 64,
    },
    {
        "model.decoder.embed_tokens.weight": Line(1, 1, 1 / N),
        "model.decoder.embed_positions.weight": Line(1, 1, 1 / N),
        "model.decoder.final_layer_norm.weight": gain(1 / N, 1, value=1 / N),
        "model.decoder.final_layer_norm.bias": bias(1 / N, 1),
        **{
            f"model.decoder.layers.*.{part}_layer_norm.{leaf}": line
            for part in ("self_attn", "final")
            for leaf, line in {"weight": gain(1, BLOCK), "bias": bias(1, BLOCK)}.items()
        },
        **{
            f"model.decoder.layers.*.self_attn.{part}_proj.{leaf}": line
            for part in ("q", "k", "v")
            for leaf, line in {"weight": PLAIN_IN, "bias": bias(1, BLOCK)}.items()
        },
        "model.decoder.layers.*.self_attn.out_proj.weight": PLAIN_OUT,
        "model.decoder.layers.*.self_attn.out_proj.bias": bias(1 / L, CLOSED),
        "model.decoder.layers.*.fc1.weight": MLP_IN,
        "model.decoder.layers.*.fc1.bias": bias(1, 1 / (F * L)),
        "model.decoder.layers.*.fc2.weight": MLP_OUT,
        "model.decoder.layers.*.fc2.bias": bias(1 / L, CLOSED),
    },
)

DENSE_CASES = {case.family: case for case in (LLAMA, QWEN3, GEMMA3, OLMO2, GPT2, GPT_NEOX, PHI3, OPT)}
