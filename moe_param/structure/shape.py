"""`Shape`: the sizes along which a model is scaled, given by hand or measured on its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from moe_param.errors import MoeParamError
from moe_param.naming import nearest
from moe_param.structure.dispatch import find_layers
from moe_param.structure.observations import StructureError, Trace
from moe_param.structure.trace import model_class_for, shared_trace

AXES = ("width", "depth", "num_experts", "expert_size")
"""What is scaled one at a time."""

SIZES = ("width", "depth", "num_experts", "top_k", "expert_size")
"""What says how large a model is; head_dim, which need not be there, aside."""

OF_EXPERTS = ("num_experts", "top_k", "expert_size")
"""Sizes that a dense model does not have."""


class ShapeError(MoeParamError):
    """Sizes that are impossible, do not divide, or contradict a model."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes along which a transformer is scaled, a mixture of experts or a dense one (arXiv:2601.20205, Section 3).

    width: size of the residual stream (n_embd). depth: decoder layers (L). num_experts: routed experts of one layer
    (n_exp). top_k: experts a token visits (n_act). expert_size: hidden units of one expert. A dense model has none of
    the three. head_dim: contracted size of query·key; None without softmax attention or where it is not of interest.

    Raises:
        ShapeError: a size that is not a positive integer, some but not all sizes of experts, or top_k > num_experts.
    """

    width: int
    depth: int
    num_experts: int | None = None
    top_k: int | None = None
    expert_size: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None and name not in ("width", "depth"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ShapeError(f"Shape.{name} must be a positive integer, got {value!r}")
        missing = [name for name in OF_EXPERTS if getattr(self, name) is None]
        if 0 < len(missing) < len(OF_EXPERTS):
            raise ShapeError(f"Shape without {' and '.join(missing)}: experts need {', '.join(OF_EXPERTS)}, dense none")
        if self.num_experts is not None and self.top_k is not None and self.top_k > self.num_experts:
            raise ShapeError(f"Shape.top_k = {self.top_k} exceeds num_experts = {self.num_experts}")

    @property
    def dense(self) -> bool:
        """Whether there are no experts."""
        return self.num_experts is None

    @property
    def axes(self) -> tuple[str, ...]:
        """What this shape can be scaled along: `AXES`, of a dense one those that are not of experts."""
        return self._own(AXES)

    @property
    def sizes(self) -> dict[str, int]:
        """`SIZES` as far as this shape has them, by name; what `scale_config` takes."""
        return {name: getattr(self, name) for name in self._own(SIZES)}

    def _own(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if not (self.dense and name in OF_EXPERTS))

    @property
    def sparsity(self) -> Fraction | None:
        """κ = top_k / num_experts, which the paper holds fixed along every transfer (Section 3.2); None if dense."""
        return Fraction(self.top_k, self.num_experts) if self.top_k and self.num_experts else None

    def along(self, axis: str, factor: float) -> Shape:
        """This shape with one size multiplied, as the paper moves along its axes: with the width, expert_size (its
        α = expert_size/width is fixed), with num_experts, top_k (the sparsity is fixed). head_dim stays.

        Raises:
            ShapeError: an axis that this shape does not have, a size that would not be whole.
        """
        self.check(axis, self.axes, "axis")
        sizes = {}
        names = self._own((axis, *{"width": ("expert_size",), "num_experts": ("top_k",)}.get(axis, ())))
        for name in names:
            size = getattr(self, name) * factor
            if not float(size).is_integer():
                near = _nearest_factor(factor, [getattr(self, name) for name in names])
                raise ShapeError(f"{axis} × {factor:g}: {name} would be {size:g}, which is not whole{near}")
            sizes[name] = int(size)
        return replace(self, **sizes)

    def check(self, name: str, own: Iterable[str], kind: str) -> None:
        """Refuses a name that is none of this shape's own axes or sizes.

        Raises:
            ShapeError: with the nearest there is, or why there is none.
        """
        if name in own:
            return
        if self.dense and name in OF_EXPERTS:
            raise ShapeError(f"{kind} {name!r} is of experts, and a dense model has none: it has {', '.join(own)}")
        raise ShapeError(f"unknown {kind} {name!r}{nearest(name, tuple(own))}")

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Shape:
        """Reads the shape off the model that `config` builds (on fake tensors: no memory is used).

        Raises:
            StructureError: transformers maps the config to no model, or the model has no decoder stack.
        """
        return measure(*shared_trace(model_class_for(config), config))


def _nearest_factor(factor: float, sizes: Iterable[int]) -> str:
    """The end of an error: the factor nearest to this one at which all sizes are whole. Begins with a semicolon."""
    step = math.gcd(*sizes)  # a factor of so many parts
    return f"; × {max(1, round(factor * step)) / step:.6g}, the nearest, is" if math.isfinite(factor) else ""


def measure(model: PreTrainedModel, trace: Trace) -> Shape:
    """The shape of a traced model: read off its tensors, not off config attributes, whose names differ by family.

    Raises:
        StructureError: layers disagree on a size that a Shape has only one of.
    """
    _, layers = find_layers(model)
    embedding: Any = model.get_input_embeddings().weight
    head_dims = [attention.head_dim for attention in trace.attentions]
    return Shape(
        width=int(embedding.shape[-1]),
        depth=len(layers),
        head_dim=head_dims[0] if head_dims else None,
        **_experts(model, trace),
    )


def _experts(model: PreTrainedModel, trace: Trace) -> dict[str, int]:
    """`OF_EXPERTS` of a traced model, of a dense one nothing."""
    seen = {(router.num_experts, router.top_k, router.size) for router in trace.routers if router.mixes == "mlp"}
    if not seen:
        return {}
    if len(seen) != 1:
        raise StructureError(
            f"the experts of {type(model).__name__} have no common (num_experts, top_k, expert_size): {sorted(seen)}"
        )
    return dict(zip(OF_EXPERTS, seen.pop()))
