"""The paper's own model and training (arXiv:2601.20205), unfolded: every factor where its equations have it.

Written from the equations and tables alone, in plain torch; nothing here knows transformers or moe_param. The model is
Section 3.1 (eq. 1) with Appendix A, the biases move by eq. (2), initialization and learning rates are Table 1 for
experts and router and arXiv:2505.01618 (CompleteP, Table 1, α = 1) for the rest. For Adam's ε there are two tables: the
one that follows the gradients' scale, and the paper's Table 2 (version 3).

1/L, 1/K and 1/d are absolute, as the paper has them; all else is relative to a base, r.X = X of the target / X of the
base.

Shapes: B batch, T positions, N width, A heads, D head_dim, E experts, K chosen, H expert size, V vocabulary, C context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    width: int
    depth: int
    num_experts: int
    top_k: int
    expert_size: int
    heads: int
    head_dim: int
    vocab: int
    context: int


@dataclass(frozen=True)
class Ratios:
    """target / base; a: heads · head_dim, which the attention's output projection sums over."""

    n: float
    l: float
    k: float
    h: float
    a: float

    @classmethod
    def of(cls, base: Sizes, target: Sizes) -> Ratios:
        assert target.num_experts * base.top_k == base.num_experts * target.top_k, "κ is fixed"
        return cls(
            n=target.width / base.width,
            l=target.depth / base.depth,
            k=target.top_k / base.top_k,
            h=target.expert_size / base.expert_size,
            a=target.heads * target.head_dim / (base.heads * base.head_dim),
        )


@dataclass(frozen=True)
class Line:
    """Factors on σ (None: a vector, which starts at `start`), on η, and on ε by either table."""

    std: float | None
    lr: float
    eps: float
    table2: float
    start: float = 0.0


def lines(r: Ratios) -> dict[str, Line]:
    """The line of every kind of parameter, named as in `MoEGPT`."""
    inside = 1 / (r.n * r.l)  # the gradient's scale in a block, of attention and norms
    bias = 1 / r.l  # Table 2: "other biases", those of norms among them
    hidden = Line(std=r.n**-0.5, lr=1 / r.n, eps=inside, table2=inside)
    vector = Line(std=None, lr=1, eps=inside, table2=bias)
    return {
        "tokens": Line(std=1, lr=1, eps=1 / r.n, table2=1 / r.n),
        "positions": Line(std=1, lr=1, eps=1 / r.n, table2=1 / r.n),
        **dict.fromkeys(("query", "key", "value"), hidden),
        "output": Line(std=r.a**-0.5, lr=1 / r.a, eps=inside, table2=inside),
        **dict.fromkeys(("query_bias", "key_bias", "value_bias", "output_bias"), vector),
        **dict.fromkeys(("attention_gain", "moe_gain"), Line(std=None, lr=1, eps=inside, table2=1, start=1)),
        **dict.fromkeys(("attention_shift", "moe_shift"), vector),
        "router": Line(std=1 / r.n, lr=1 / r.n, eps=1 / (r.l * r.k), table2=1 / (r.n * r.l)),
        "up": Line(std=r.n**-0.5, lr=1 / r.n, eps=1 / (r.h * r.l * r.k), table2=1 / (r.h * r.l)),
        "down": Line(std=r.n**0.5 / r.h, lr=1 / r.h, eps=1 / (r.n * r.l * r.k), table2=r.n / (r.h**2 * r.l)),
        "final_gain": Line(std=None, lr=1, eps=1 / r.n, table2=1, start=1),
        "final_shift": Line(std=None, lr=1, eps=1 / r.n, table2=bias),
    }


class MoEGPT(nn.Module):
    """x⁰ = tokens + positions;  x ← x + attention(LN x)/L;  x ← x + MoE(LN x)/L;  logits = tokens·LN(x) / rn."""

    def __init__(self, base: Sizes, sizes: Sizes) -> None:
        super().__init__()
        self.r = Ratios.of(base, sizes)
        self.L = sizes.depth
        self.tokens, self.positions = _empty(sizes.vocab, sizes.width), _empty(sizes.context, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.final_gain, self.final_shift = _empty(sizes.width), _empty(sizes.width)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTN = self.tokens[tokens_BT] + self.positions[: tokens_BT.shape[1]]
        for block in self.blocks:
            x_BTN = x_BTN + block.attend(normed(x_BTN, block.attention_gain, block.attention_shift)) / self.L
            x_BTN = x_BTN + block.mix(normed(x_BTN, block.moe_gain, block.moe_shift)) / self.L
        return normed(x_BTN, self.final_gain, self.final_shift) @ self.tokens.T / self.r.n

    def loss(self, tokens_BT: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens_BT)[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())

    def lines(self) -> Iterator[tuple[str, nn.Parameter, Line]]:
        """(name, parameter, its line of the tables)."""
        table = lines(self.r)
        for name, parameter in self.named_parameters():
            yield name, parameter, table[name.rpartition(".")[2]]

    def groups(self, lr: float, eps: float, weight_decay: float, table2: bool) -> list[dict[str, Any]]:
        """For AdamW, which shrinks a weight by lr·λ in a step: λ grows where lr falls, so that the shrinkage stays."""
        return [
            {
                "params": [parameter],
                "lr": lr * line.lr,
                "eps": eps * (line.table2 if table2 else line.eps),
                "weight_decay": 0.0 if line.std is None else weight_decay / line.lr,
            }
            for _, parameter, line in self.lines()
        ]

    @torch.no_grad()
    def move_biases(self, rate: float) -> None:
        """eq. (2), after an optimizer step, by the loads of the forward pass before it."""
        for block in self.blocks:
            block.selection_bias -= rate * (block.load_E - block.K / block.E)


class Block(nn.Module):
    load_E: Tensor
    """The share of the batch's tokens that went to each expert in the last forward pass; it sums to K."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.A, self.D, self.E, self.K = s.heads, s.head_dim, s.num_experts, s.top_k
        inner = s.heads * s.head_dim
        self.attention_gain, self.attention_shift, self.moe_gain, self.moe_shift = (_empty(s.width) for _ in range(4))
        self.query, self.key, self.value = (_empty(inner, s.width) for _ in range(3))
        self.query_bias, self.key_bias, self.value_bias = (_empty(inner) for _ in range(3))
        self.output, self.output_bias = _empty(s.width, inner), _empty(s.width)
        self.router = _empty(s.num_experts, s.width)
        self.register_buffer("selection_bias", torch.zeros(s.num_experts))
        self.up = _empty(s.num_experts, s.expert_size, s.width)
        self.down = _empty(s.num_experts, s.width, s.expert_size)

    def attend(self, x_BTN: Tensor) -> Tensor:
        """Causal softmax attention with logits q·k/d."""
        linears = ((self.query, self.query_bias), (self.key, self.key_bias), (self.value, self.value_bias))
        q, k, v = ((x_BTN @ w.T + b).unflatten(-1, (self.A, self.D)).transpose(1, 2) for w, b in linears)
        T = x_BTN.shape[1]
        logits_BATT = (q @ k.transpose(-1, -2) / self.D).masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf)
        mixed = (logits_BATT.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        return mixed @ self.output.T + self.output_bias

    def mix(self, x_BTN: Tensor) -> Tensor:
        """eq. (1): 1/K · Σ over the chosen of g_i·E_i(x), all experts computed and a mask on those not chosen."""
        gates_BTE = torch.sigmoid(x_BTN @ self.router.T)
        with torch.no_grad():
            ranks_BTE = (gates_BTE + self.selection_bias).argsort(dim=-1, descending=True).argsort(dim=-1)
            chosen_BTE = (ranks_BTE < self.K).to(x_BTN.dtype)
            self.load_E = chosen_BTE.mean(dim=(0, 1))
        hidden_BTEH = F.gelu(torch.einsum("btn,ehn->bteh", x_BTN, self.up))
        return torch.einsum("bte,bteh,enh->btn", gates_BTE * chosen_BTE, hidden_BTEH, self.down) / self.K


def normed(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * gain + shift


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))
