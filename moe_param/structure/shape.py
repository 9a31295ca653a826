"""`Shape`: the sizes along which a model is scaled, given by hand or measured on its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from moe_param.errors import MoeParamError
from moe_param.naming import nearest
from moe_param.structure.trace import StructureError, Trace, find_layers, is_experts, model_class_for, shared_trace

AXES = ("width", "depth", "num_experts", "expert_size")
"""What is scaled one at a time."""

SIZES = ("width", "depth", "num_experts", "top_k", "expert_size")
"""What says how large a model is; head_dim, which need not be there, aside."""


class ShapeError(MoeParamError):
    """Sizes that are impossible, do not divide, or contradict a model."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes along which a mixture-of-experts transformer is scaled (arXiv:2601.20205, Section 3).

    width: size of the residual stream (n_embd). depth: decoder layers (L). num_experts: routed experts of one layer
    (n_exp). top_k: experts a token visits (n_act). expert_size: hidden units of one expert. head_dim: contracted size
    of query·key; None where there is no softmax attention or it is not of interest.

    Raises:
        ShapeError: a size that is not a positive integer, or top_k > num_experts.
    """

    width: int
    depth: int
    num_experts: int
    top_k: int
    expert_size: int
    head_dim: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None and name == "head_dim":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ShapeError(f"Shape.{name} must be a positive integer, got {value!r}")
        if self.top_k > self.num_experts:
            raise ShapeError(f"Shape.top_k = {self.top_k} exceeds num_experts = {self.num_experts}")

    @property
    def sparsity(self) -> Fraction:
        """κ = top_k / num_experts, which the paper holds fixed along every transfer (Section 3.2)."""
        return Fraction(self.top_k, self.num_experts)

    def along(self, axis: str, factor: float) -> Shape:
        """This shape with one size multiplied, as the paper moves along its axes: with the width, expert_size (its
        α = expert_size/width is fixed), with num_experts, top_k (the sparsity is fixed). head_dim stays.

        Raises:
            ShapeError: an unknown axis, a size that would not be whole.
        """
        if axis not in AXES:
            raise ShapeError(f"unknown axis {axis!r}{nearest(axis, AXES)}")
        sizes = {}
        for name in (axis, *{"width": ("expert_size",), "num_experts": ("top_k",)}.get(axis, ())):
            size = getattr(self, name) * factor
            if not float(size).is_integer():
                raise ShapeError(f"{axis} × {factor:g}: {name} would be {size:g}, which is not whole")
            sizes[name] = int(size)
        return replace(self, **sizes)

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Shape:
        """Reads the shape off the model that `config` builds (on fake tensors: no memory is used).

        Raises:
            StructureError: transformers maps the config to no model, or the model has no experts.
        """
        return measure(*shared_trace(model_class_for(config), config))


def measure(model: PreTrainedModel, trace: Trace) -> Shape:
    """The shape of a traced model: read off its tensors, not off config attributes, whose names differ by family.

    Raises:
        StructureError: layers disagree on a size that a Shape has only one of.
    """
    _, layers = find_layers(model)
    routers = {router.experts: router for router in trace.routers}
    seen = set()
    for name, module in model.named_modules():
        if is_experts(module) and name in routers:
            count: Any = module.num_experts
            seen.add((int(count), routers[name].top_k, trace.fan_in[f"{name}.down_proj"]))
    if len(seen) != 1:
        raise StructureError(
            f"the experts of {type(model).__name__} have no common (num_experts, top_k, expert_size): {sorted(seen)}"
        )
    num_experts, top_k, expert_size = seen.pop()
    embedding: Any = model.get_input_embeddings().weight
    head_dims = [attention.head_dim for attention in trace.attentions]
    return Shape(
        width=int(embedding.shape[-1]),
        depth=len(layers),
        num_experts=num_experts,
        top_k=top_k,
        expert_size=expert_size,
        head_dim=head_dims[0] if head_dims else None,
    )
