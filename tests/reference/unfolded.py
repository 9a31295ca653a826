"""arXiv:2601.20205 unfolded: one small decoder with routed experts, every factor where the papers write it.

Written from the equations and tables of the papers alone: the experts and their router after arXiv:2601.20205 (eq. 1,
Table 1), all else after arXiv:2505.01618 (CompleteP, Table 1, α = 1), the factor on attention logits after
arXiv:2203.03466 (Definition 4.1). The architecture is Mixtral's (RMSNorm, rotary positions, gated SiLU experts, softmax
gates normalized over the chosen experts), or the same with the paper's own gates (sigmoid, not normalized).

Every number is relative to a base model: r.X = X of the target / X of the base. Where all are 1 this is a plain decoder
with one init std σ, one learning rate η, one epsilon ε and one weight decay λ, which is what is tuned.

Shapes: B batch, T positions, N width, A heads, D head_dim, E experts, K chosen, H expert size, V vocabulary.
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


@dataclass(frozen=True)
class Ratios:
    """target / base."""

    n: float  # width
    l: float  # depth
    k: float  # experts per token; the number of experts grows alike, so that k / e stays
    h: float  # expert size
    d: float  # head_dim
    a: float  # heads · head_dim, which is what the attention's output projection sums over

    @classmethod
    def of(cls, base: Sizes, target: Sizes) -> Ratios:
        assert target.num_experts / base.num_experts == target.top_k / base.top_k, "the sparsity is fixed"
        return cls(
            n=target.width / base.width,
            l=target.depth / base.depth,
            k=target.top_k / base.top_k,
            h=target.expert_size / base.expert_size,
            d=target.head_dim / base.head_dim,
            a=target.heads * target.head_dim / (base.heads * base.head_dim),
        )


@dataclass(frozen=True)
class Line:
    """One line of the tables: factors on σ (None: a gain, which starts at 1), η and ε, and whether λ applies."""

    std: float | None
    lr: float
    eps: float
    decay: bool = True


def tables(r: Ratios) -> dict[str, Line]:
    """The line of every kind of parameter, named as in `Decoder`."""
    return {
        # CompleteP, Table 1. ε follows the gradient: 1/n outside the blocks, 1/(n·L) inside.
        "embedding": Line(std=1, lr=1, eps=1 / r.n),
        "query": Line(std=r.n**-0.5, lr=1 / r.n, eps=1 / (r.n * r.l)),
        "key": Line(std=r.n**-0.5, lr=1 / r.n, eps=1 / (r.n * r.l)),
        "value": Line(std=r.n**-0.5, lr=1 / r.n, eps=1 / (r.n * r.l)),
        "output": Line(std=r.a**-0.5, lr=1 / r.a, eps=1 / (r.n * r.l)),
        "attention_norm": Line(std=None, lr=1, eps=1 / (r.n * r.l), decay=False),
        "moe_norm": Line(std=None, lr=1, eps=1 / (r.n * r.l), decay=False),
        "final_norm": Line(std=None, lr=1, eps=1 / r.n, decay=False),
        "unembedding": Line(std=1, lr=1, eps=1 / r.n),
        # arXiv:2601.20205, Table 1 (router: γ = 1). ε: what reaches an expert is divided among K of them.
        "router": Line(std=1 / r.n, lr=1 / r.n, eps=1 / (r.l * r.k)),
        "gate": Line(std=r.n**-0.5, lr=1 / r.n, eps=1 / (r.h * r.l * r.k)),
        "up": Line(std=r.n**-0.5, lr=1 / r.n, eps=1 / (r.h * r.l * r.k)),
        "down": Line(std=r.n**0.5 / r.h, lr=1 / r.h, eps=1 / (r.n * r.l * r.k)),
    }


class Decoder(nn.Module):
    """x⁰ = embedding;  x ← x + attention(norm x) / rL;  x ← x + experts(norm x) / rL;  logits = U·norm(x) / rn."""

    def __init__(self, base: Sizes, sizes: Sizes, normalized: bool = True) -> None:
        super().__init__()
        self.r = Ratios.of(base, sizes)
        self.embedding = _empty(sizes.vocab, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes, self.r, normalized) for _ in range(sizes.depth))
        self.final_norm = _empty(sizes.width)
        self.unembedding = _empty(sizes.vocab, sizes.width)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTN = self.embedding[tokens_BT]
        for block in self.blocks:
            x_BTN = x_BTN + block.attention(rms_norm(x_BTN) * block.attention_norm) / self.r.l
            x_BTN = x_BTN + block.experts(rms_norm(x_BTN) * block.moe_norm) / self.r.l
        return rms_norm(x_BTN) * self.final_norm @ self.unembedding.T / self.r.n

    def loss(self, tokens_BT: Tensor) -> Tensor:
        logits = self(tokens_BT)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())

    def lines(self) -> Iterator[tuple[str, nn.Parameter, Line]]:
        """(name, parameter, its line of the tables)."""
        table = tables(self.r)
        for name, parameter in self.named_parameters():
            yield name, parameter, table[name.rpartition(".")[2]]

    @torch.no_grad()
    def initialize(self, std: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _, parameter, line in self.lines():
            if line.std is None:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, std * line.std, generator=generator)

    def groups(self, lr: float, eps: float, weight_decay: float) -> list[dict[str, Any]]:
        """For AdamW, which shrinks a weight by lr·λ in a step: λ grows where lr falls, so that the shrinkage stays."""
        return [
            {
                "params": [parameter],
                "lr": lr * line.lr,
                "eps": eps * line.eps,
                "weight_decay": weight_decay / line.lr if line.decay else 0.0,
            }
            for _, parameter, line in self.lines()
        ]


class Block(nn.Module):
    def __init__(self, s: Sizes, r: Ratios, normalized: bool) -> None:
        super().__init__()
        self.sizes, self.r, self.normalized = s, r, normalized
        self.attention_norm, self.moe_norm = _empty(s.width), _empty(s.width)
        self.query, self.key, self.value = (_empty(s.heads * s.head_dim, s.width) for _ in range(3))
        self.output = _empty(s.width, s.heads * s.head_dim)
        self.router = _empty(s.num_experts, s.width)
        self.gate, self.up = (_empty(s.num_experts, s.expert_size, s.width) for _ in range(2))
        self.down = _empty(s.num_experts, s.width, s.expert_size)

    def attention(self, x_BTN: Tensor) -> Tensor:
        """Causal softmax attention. The logits are q·k/d, held at 1/√d at the base: √(d_base/d) · q·k/√d."""
        A, D, T = self.sizes.heads, self.sizes.head_dim, x_BTN.shape[1]
        q, k, v = ((x_BTN @ w.T).unflatten(-1, (A, D)).transpose(1, 2) for w in (self.query, self.key, self.value))
        logits_BATT = self.r.d**-0.5 * D**-0.5 * rotate(q) @ rotate(k).transpose(-1, -2)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        mixed = logits_BATT.masked_fill(future, -torch.inf).softmax(-1) @ v
        return mixed.transpose(1, 2).flatten(-2) @ self.output.T

    def experts(self, x_BTN: Tensor) -> Tensor:
        """eq. (1): Σ over the K chosen of g_i·E_i(x), divided by rK where the g_i do not sum to 1 by themselves."""
        scores_BTE = x_BTN @ self.router.T
        scores_BTE = scores_BTE.softmax(-1) if self.normalized else scores_BTE.sigmoid()
        gates_BTK, chosen_BTK = scores_BTE.topk(self.sizes.top_k, dim=-1)
        gates_BTK = gates_BTK / gates_BTK.sum(-1, keepdim=True) if self.normalized else gates_BTK / self.r.k
        gates_BTE = torch.zeros_like(scores_BTE).scatter(-1, chosen_BTK, gates_BTK)
        hidden_BTEH = F.silu(torch.einsum("btn,ehn->bteh", x_BTN, self.gate))
        hidden_BTEH = hidden_BTEH * torch.einsum("btn,ehn->bteh", x_BTN, self.up)
        return torch.einsum("bte,bteh,enh->btn", gates_BTE, hidden_BTEH, self.down)


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def rotate(x_BATD: Tensor) -> Tensor:
    """Rotary positions: each pair (i, i + D/2) turns by position · 10000^(-2i/D)."""
    T, D = x_BATD.shape[-2:]
    speed = 10000.0 ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)
    angle_TD = torch.outer(torch.arange(T).to(x_BATD.dtype), speed.to(x_BATD.dtype)).repeat(1, 2)
    first, second = x_BATD.chunk(2, dim=-1)
    return x_BATD * angle_TD.cos() + torch.cat([-second, first], dim=-1) * angle_TD.sin()


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))
