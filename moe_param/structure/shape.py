"""`Shape`: the sizes that are scaled, and `scale_config`: the same architecture at another shape."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from moe_param.errors import MoeParamError
from moe_param.structure.adapters import adapter_for
from moe_param.structure.trace import StructureError, Trace, find_layers, is_experts, model_class_for, trace_model

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
            raise ShapeError(f"unknown axis {axis!r} (valid: {', '.join(AXES)})")
        sizes = {}
        for name in (axis, *{"width": ("expert_size",), "num_experts": ("top_k",)}.get(axis, ())):
            size = getattr(self, name) * factor
            if size != int(size):
                raise ShapeError(f"{axis} × {factor:g}: {name} would be {size:g}, which is not whole")
            sizes[name] = int(size)
        return replace(self, **sizes)

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Shape:
        """Reads the shape off the model that `config` builds (on fake tensors: no memory is used).

        Raises:
            StructureError: transformers maps the config to no model, or the model has no experts.
        """
        return measure(*trace_model(model_class_for(config), config))


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


# Config attributes by what they mean. Families name the same thing differently; a new name is added here, and
# `scale_config` builds the scaled model and measures it, so a missing name is an error and never a wrong model.
_WIDTH = r"hidden_size|d_model"
_HEADS = r"(\w+_)?num_(\w+_)?heads(_per_layer)?|\w+_n_heads|n_heads"
_RANKS = r"[qkvo]+_lora_rank|mamba_dt_rank|mamba_intermediate_size|\w*latent_size"
_DEPTH = r"num_hidden_layers"
_LAST_LAYER = r"\w*layer_end_index"
_EXPERTS = r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts"
_TOP_K = r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|num_selected_experts|experts_per_token"
_GROUPS = r"n_group"  # of experts, in routers that choose groups first
_EXPERT_SIZE = r"moe_intermediate_size|expert_intermediate_size|moe_ffn_hidden_size|expert_ffn_hidden_size"
_SHARED_SIZE = r"(moe_)?shared_(expert_|experts_)?intermediate_size"
_DENSE_SIZE = r"intermediate_size|dense_intermediate_size|ffn_hidden_size|\w+_dense_intermediate_size"


def scale_config(
    config: PretrainedConfig,
    *,
    width: int | None = None,
    depth: int | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    expert_size: int | None = None,
    model_class: type[PreTrainedModel] | None = None,
) -> PretrainedConfig:
    """The same architecture at another shape.

    Sizes are absolute; what is not given stays, except top_k, which follows num_experts so that the sparsity stays.
    With width scale: the numbers of heads (head_dim is fixed), latent ranks of attention (`q_lora_rank`,
    `kv_lora_rank`), state-space ranks, and dense MLPs where experts have a size of their own. With expert_size scale
    shared experts, and dense MLPs where one attribute gives the size of both. Layer patterns are continued: a periodic
    pattern goes on, a run of leading dense layers keeps its length. Expert groups keep their number. `model_class` is
    the class the config is for, where transformers cannot tell.

    Raises:
        ShapeError: a size that is not a positive integer or does not divide, an axis the config does not have, or a
            scaled config whose model does not have the sizes asked for.
    """
    model_class = model_class or model_class_for(config)
    source, trace = trace_model(model_class, config)
    old = measure(source, trace)
    asked = {
        "width": width,
        "depth": depth,
        "num_experts": num_experts,
        "top_k": top_k,
        "expert_size": expert_size,
    }
    sizes = {name: value if value is not None else getattr(old, name) for name, value in asked.items()}
    if top_k is None:
        sizes["top_k"] = _whole(old.top_k, Fraction(sizes["num_experts"], old.num_experts), "top_k", "num_experts")
    new = Shape(**sizes, head_dim=old.head_dim)
    if new == old:
        return copy.deepcopy(config)

    for axis, why in adapter_for(config).refuse.items():
        if getattr(new, axis) != getattr(old, axis):
            raise ShapeError(f"{type(config).__name__} cannot change {axis}: {why}")
    ratio = {name: Fraction(getattr(new, name), getattr(old, name)) for name in asked}
    values = config.to_dict()
    values.pop("moe_param", None)
    present = [k for k, v in values.items() if _scalable(v)]
    own_size = [k for k in present if re.fullmatch(_EXPERT_SIZE, k) and _first(values[k]) == old.expert_size]
    axis_of: dict[str, str] = {}
    for key in present:
        if re.fullmatch(_WIDTH, key) or re.fullmatch(_HEADS, key) or re.fullmatch(_RANKS, key):
            axis_of[key] = "width"
        elif re.fullmatch(_EXPERTS, key) and _first(values[key]) == old.num_experts:
            axis_of[key] = "num_experts"
        elif re.fullmatch(_TOP_K, key) and _first(values[key]) == old.top_k:
            axis_of[key] = "top_k"
        elif re.fullmatch(_EXPERT_SIZE, key) or re.fullmatch(_SHARED_SIZE, key):
            axis_of[key] = "expert_size"
        elif re.fullmatch(_DENSE_SIZE, key):
            axis_of[key] = "width" if own_size else "expert_size"
    for key, axis in axis_of.items():
        values[key] = _scaled(values[key], ratio[axis], key, axis)
    for key in present:
        if re.fullmatch(_GROUPS, key) and values[key] and new.num_experts % values[key]:
            raise ShapeError(f"num_experts = {new.num_experts} does not divide into {key} = {values[key]} groups")
    if new.depth != old.depth:
        for key, value in values.items():
            if isinstance(value, list) and len(value) == old.depth:
                values[key] = _repattern(value, new.depth, key)
            elif key == "per_layer_config" and value:
                given = {int(layer): entry for layer, entry in value.items()}
                each = [given.get(layer) for layer in range(old.depth)]
                values[key] = {str(i): v for i, v in enumerate(_repattern(each, new.depth, key)) if v is not None}
            elif re.fullmatch(_DEPTH, key):
                values[key] = new.depth
            elif re.fullmatch(_LAST_LAYER, key) and value == old.depth - 1:
                values[key] = new.depth - 1
    try:
        scaled = type(config).from_dict(values)
        model, trace = trace_model(model_class, scaled)
        got = measure(model, trace)
    except Exception as error:
        raise ShapeError(
            f"{type(config).__name__} at {sizes} builds no working model: {type(error).__name__}: {error}"
        ) from error
    if got != new:
        raise ShapeError(
            f"{type(config).__name__} does not scale as asked: wanted {new}, the scaled config builds {got}. "
            "A size that scale_config does not know decides this family's shape; pass a config instead of a Shape."
        )
    before, after = (depth - _moe_layers(m) for depth, m in ((old.depth, source), (new.depth, model)))
    if after > max(before, math.ceil(before * ratio["depth"])):
        raise ShapeError(
            f"{type(config).__name__} at depth {new.depth} has {after} layers without experts, the original {before} "
            f"of {old.depth}: an attribute that scale_config does not know decides where experts are; pass a config"
        )
    return scaled


def _moe_layers(model: PreTrainedModel) -> int:
    """Decoder layers with routed experts."""
    return sum(any(is_experts(m) for m in layer.modules()) for layer in find_layers(model)[1])


def _scalable(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_scalable(v) for v in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _scaled(value: Any, ratio: Fraction, key: str, axis: str) -> Any:
    if isinstance(value, list):
        return [_scaled(v, ratio, key, axis) for v in value]
    return _whole(value, ratio, key, axis)


def _whole(value: int, ratio: Fraction, key: str, axis: str) -> int:
    scaled = value * ratio
    if scaled.denominator != 1:
        raise ShapeError(
            f"{axis} × {ratio} makes {key} = {value} into {float(scaled):g}: choose a {axis} at which {key} is whole"
        )
    return int(scaled)


def _repattern(pattern: Sequence[Any], length: int, key: str) -> list[Any]:
    """Continues (or cuts) a per-layer list: `[s, f, s, f]` goes on alternating, `[d, m, m]` keeps one leading d."""
    items = list(pattern)
    if items == list(range(len(items))):  # each layer names itself
        return list(range(length))
    lead = 0
    while lead < len(items) and items[lead] == items[0]:
        lead += 1
    for start in (0, lead % len(items)):
        rest = items[start:]
        for period in range(1, len(rest) // 2 + 1):
            if all(rest[i] == rest[i - period] for i in range(period, len(rest))):
                return (items[:start] + [rest[i % period] for i in range(max(length, start) - start)])[:length]
    if len(items) - lead == 1 and "mlp" in key:  # [dense, sparse]: a leading dense layer, not an alternation
        return (items[:lead] + items[lead:] * max(1, length - lead))[:length]
    if length % len(items) == 0:
        return items * (length // len(items))
    raise ShapeError(
        f"the layer pattern {key} = {items} has no period, so it cannot be made {length} long: "
        f"use a multiple of {len(items)} layers, or pass a config with the pattern you want"
    )
