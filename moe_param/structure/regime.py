"""Which limit a shape is near: whether the expert-size rule is asymptotic there, and how random the experts' sum is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moe_param.structure.shape import Shape

CROSSOVER = 1.8
"""α_ffn at which the expert-size rule takes over from fan-in, as measured by the authors of arXiv:2601.20205."""


@dataclass(frozen=True)
class Regime:
    """alpha_ffn: expert_size / width. alpha_star: width / (expert_size · num_experts · depth). Both without unit."""

    alpha_ffn: float
    alpha_star: float

    @property
    def asymptotic(self) -> bool:
        """Whether the learned part of an expert's output dominates its initial part, as the expert-size rule assumes.

        Exponents are pure from α_ffn ≈ 16 on only; below the crossover initial outputs of experts grow with the width
        where expert_size is held.
        """
        return self.alpha_ffn >= CROSSOVER

    def to_dict(self) -> dict[str, Any]:
        """Plain values: alpha_ffn, alpha_star, asymptotic."""
        return {**asdict(self), "asymptotic": self.asymptotic}

    def __str__(self) -> str:
        side = "at or above" if self.asymptotic else "below"
        return f"α_ffn {self.alpha_ffn:.3g} ({side} the crossover, about {CROSSOVER}), α* {self.alpha_star:.2g}"


def regime(shape: Shape) -> Regime | None:
    """The regime of a shape, None for a dense one.

    From arXiv:2601.20205; crossover and α* from its authors' published code and notes.

    α_ffn = H/n decides whether the expert-size rule is in its asymptotic regime. α* = n/(H·E·L) is, up to a constant
    of the sparsity, the variance of the initial experts' contribution to the residual stream: towards 0 the stack
    behaves like a neural ordinary differential equation, else like a stochastic one.
    """
    if shape.num_experts is None or shape.expert_size is None:
        return None
    return Regime(
        alpha_ffn=shape.expert_size / shape.width,
        alpha_star=shape.width / (shape.expert_size * shape.num_experts * shape.depth),
    )
