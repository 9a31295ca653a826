"""The parameterization written the other way round, by hand: explicit forward multipliers on unfolded weights.

Independent of moe_param: which tensor is on which line of the papers' tables is written out by name for families
tested, and the multipliers are hooks on the running model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Ratios:
    """target / base. n: width, l: depth, k: top_k, h: expert size, d: head_dim."""

    n: float
    l: float
    k: float
    h: float
    d: float


@dataclass(frozen=True)
class Line:
    """One line of the tables for one tensor: unfolded init std, LR, epsilon ratios; decay; multiplier behind it."""

    std: float
    lr: float
    eps: float
    decay: bool
    multiplier: float = 1.0


def attention_factor(r: Ratios) -> float:
    """q·k/d, kept at 1/√d_base at the base, on top of the model's own 1/√d: (d_base / d)^(1/2)."""
    return r.d**-0.5


def line(name: str, target: torch.Tensor, base: torch.Tensor, r: Ratios, *, tied: bool, normalized: bool) -> Line:
    """The line of arXiv:2601.20205 Table 1 and arXiv:2505.01618 Table 1 that a tensor of these families is on."""
    transposed = "experts.gate_up_proj" in name or "experts.down_proj" in name
    transposed = transposed and target.dim() == 3 and target.shape[-1] != target.shape[-2] and _transposed(name, target)
    f = (
        (target.shape[-2] / base.shape[-2] if transposed else target.shape[-1] / base.shape[-1])
        if target.dim() > 1
        else 1
    )
    block = 1 / (r.n * r.l)
    gain = 1 / (target.shape[0] / base.shape[0] * r.l)  # block norms: a gain over head_dim is shared by all heads
    branch = 1 / r.l
    experts = branch * (1.0 if normalized else 1 / r.k)
    query_norm = bool(re.search(r"q_norm|query_layernorm", name))
    if "embed_tokens" in name:
        return Line(1, 1, 1 / r.n, True)
    if "lm_head" in name:
        return Line(1, 1, 1 / r.n, True, 1 / r.n)
    if name == "model.norm.weight":
        return Line(1, 1, 1 / r.n, False, 1 / r.n if tied else 1)
    if query_norm:
        return Line(1, 1, gain, False, attention_factor(r))
    if "norm" in name:
        return Line(1, 1, gain, False)
    if "sinks" in name:
        return Line(1, 1, block, False)
    if re.search(r"(gate|router)\.weight$", name):
        return Line(f**-1, 1 / f, 1 / (r.l * r.k), True)
    if re.search(r"(gate|router)\.bias$", name):
        return Line(1, 1, 1 / (r.l * r.k), False)
    if name.endswith("experts.gate_up_proj"):
        return Line(f**-0.5, 1 / f, 1 / (r.h * r.l * r.k), True)
    if name.endswith("experts.gate_up_proj_bias"):
        return Line(1, 1, 1 / (r.h * r.l * r.k), False)
    if name.endswith("experts.down_proj"):
        return Line(r.n**0.5 / r.h, 1 / r.h, 1 / (r.n * r.l * r.k), True, experts)
    if name.endswith("experts.down_proj_bias"):
        return Line(1, 1, 1 / (r.n * r.l * r.k), False, experts)
    if re.search(r"o_proj\.(weight|bias)$", name):
        bias = name.endswith("bias")
        return Line(1 if bias else f**-0.5, 1 if bias else 1 / f, block, not bias, branch)
    if "down_proj" in name:  # shared experts and dense MLPs: an expert that every token visits
        return Line(r.n**0.5 / f, 1 / f, block, True, branch)
    if re.search(r"mlp\.(shared_experts\.)?(gate|up)_proj", name):
        hidden = target.shape[0] / base.shape[0]
        return Line(f**-0.5, 1 / f, 1 / (hidden * r.l), True)
    if re.search(r"self_attn\.(q|k|v|q_a|q_b|kv_a|kv_b)_proj", name):
        bias = name.endswith("bias")
        makes_queries = re.search(r"self_attn\.q(_b)?_proj", name) and "q_unscaled" not in name
        return Line(
            1 if bias else f**-0.5, 1 if bias else 1 / f, block, not bias, attention_factor(r) if makes_queries else 1
        )
    raise AssertionError(f"the reference has no line for {name}")


_TRANSPOSED: set[str] = set()


def _transposed(name: str, tensor: torch.Tensor) -> bool:
    return name in _TRANSPOSED


def lines(target: PreTrainedModel, base: PreTrainedModel, r: Ratios, normalized: bool) -> dict[str, Line]:
    """A `Line` per parameter of `target`; layers of the target are compared with the same kind in the base."""
    tied = bool(target.config.tie_word_embeddings)
    base_tensors = dict(base.named_parameters())
    normed = any("q_norm" in name for name in base_tensors)
    _TRANSPOSED.clear()
    for name, module in target.named_modules():
        if getattr(module, "is_transposed", False):
            _TRANSPOSED.update((f"{name}.gate_up_proj", f"{name}.down_proj"))
    found = {}
    for name, tensor in target.named_parameters():
        twin = next(n for n in base_tensors if _bare(n) == _bare(name))
        label = name.replace("q_proj", "q_unscaled.self_attn.q_proj") if normed else name
        found[name] = line(label, tensor, base_tensors[twin], r, tied=tied, normalized=normalized)
    return found


def _bare(name: str) -> str:
    return re.sub(r"\.\d+\.", ".", name)


def add_multipliers(model: PreTrainedModel, r: Ratios, normalized: bool) -> None:
    """Hooks: 1/rL on every branch, 1/rn on the logits, 1/rK on unnormalized experts, the factor on attention logits."""

    def times(factor: float) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor

        return hook

    for name, module in model.named_modules():
        if name.endswith(("self_attn", "mlp")):
            module.register_forward_hook(times(1 / r.l))
        if name.endswith("self_attn"):
            module.scaling = module.scaling * attention_factor(r)
        if name.endswith("mlp.experts") and not normalized:
            module.register_forward_hook(times(1 / r.k))
    model.get_output_embeddings().register_forward_hook(times(1 / r.n))
