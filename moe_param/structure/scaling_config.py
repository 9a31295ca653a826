"""`scale_config`: the same architecture at another shape. Classify attributes, scale, repeat layers, build and see."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from moe_param.structure.adapters import adapter_for
from moe_param.structure.dispatch import find_layers
from moe_param.structure.observations import Trace
from moe_param.structure.shape import Shape, ShapeError, measure
from moe_param.structure.trace import model_class_for, shared_trace

RECORDS = "moe_param"
"""What the names of all entries begin with that this package writes into the config of a model."""

# Config attributes by what they mean. Families name the same thing differently; a new name is added here, and
# `scale_config` builds the scaled model and measures it, so a missing name is an error and never a wrong model.
_WIDTH = r"hidden_size|d_model|n_embd|word_embed_proj_dim"
_HEADS = r"(\w+_)?num_(\w+_)?heads(_per_layer)?|\w+_n_heads|n_heads?|attention_heads|num_kv_heads"
_RANKS = r"[qkvo]+_lora_rank|mamba_dt_rank|mamba_intermediate_size|mamba_d_ssm|\w*latent_size"
_DEPTH = r"num_hidden_layers|num_layers|n_layers?"
_LAST_LAYER = r"\w*layer_end_index"
_LAYER_NUMBERS = r"moe_layers|mlp_only_layers|local_layer_ids"  # lists of the layers that are of a kind
_EXPERTS = r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts"
_ZERO_EXPERTS = r"zero_expert_num"  # candidates that compute nothing
_TOP_K = r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|num_selected_experts|experts_per_token"
_TOWER_OUT = r"(out|text)_hidden_size|adapter_out_dim"  # of towers beside the text, in composite configs
_GROUPS = r"n_group"  # of experts, in routers that choose groups first
_EXPERT_SIZE = r"moe_intermediate_size|expert_intermediate_size|moe_ffn_hidden_size|expert_ffn_hidden_size"
_SHARED_SIZE = r"(moe_)?shared_(expert_|experts_)?intermediate_size|share_expert_dim"
_DENSE_SIZE = r"intermediate_size|ffn_hidden_size|ffn_dim|n_inner"  # of experts too, where they have none of their own
_DENSE_ALONE = r"(\w+_)?dense_intermediate_size|intermediate_size_mlp"
_NESTED = r"attn_config|ffn_config|per_layer_config"  # attributes that hold attributes


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
    `kv_lora_rank`), state-space ranks, and dense MLPs where there are no experts or experts have a size of their own.
    With expert_size scale shared experts, and dense MLPs where one attribute gives the size of both. Layer patterns are
    continued: a periodic pattern goes on, a run of leading dense layers keeps its length. Expert groups keep their
    number. Of a composite config the text part is scaled. `model_class` is the class the config is for, where
    transformers cannot tell. What we recorded of a trained model is left out.

    Raises:
        ShapeError: a size that is not a positive integer or does not divide (the nearest that do are named), an axis
            the config does not have, or a scaled config whose model does not have the sizes asked for.
    """
    model_class = model_class or model_class_for(config)
    source, trace = shared_trace(model_class, config)
    old = measure(source, trace)
    asked = {"width": width, "depth": depth, "num_experts": num_experts, "top_k": top_k, "expert_size": expert_size}
    given = {name: size for name, size in asked.items() if size is not None}
    for name in given:
        old.check(name, old.sizes, "size")
    attributes = Attributes.read(config.get_text_config(), old)
    new = attributes.target(given)
    if new == old:
        return without_records(config)
    for axis, why in adapter_for(config).refuse.items():
        if getattr(new, axis) != getattr(old, axis):
            raise ShapeError(f"{type(config).__name__} cannot change {axis}: {why}")
    values = repeat_layers(attributes.scaled(new), old.depth, new.depth)
    return _verified(config, values, model_class, source, trace, old, new)


def with_text(config: PretrainedConfig, text: PretrainedConfig) -> PretrainedConfig:
    """The config with `text` in the place of its text part, which may be all of it. What other towers hand to the text
    gets its width."""
    old = config.get_text_config()
    if old is config:
        return text
    values = config.to_dict()
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if not isinstance(part, PretrainedConfig):
            continue
        if part.get_text_config() is old:
            values[name] = with_text(part, text).to_dict()
            continue
        for key in [key for key in values[name] if re.fullmatch(_TOWER_OUT, key)]:
            if values[name][key] == old.hidden_size:
                values[name][key] = text.hidden_size
    return without_records(type(config).from_dict(values))


def without_records(config: PretrainedConfig) -> PretrainedConfig:
    """A copy for a model that is built anew: what was written into the config is of the one that was trained."""
    plain = copy.deepcopy(config)
    for name in [name for name in vars(plain) if name.startswith(RECORDS)]:
        delattr(plain, name)
    return plain


@dataclass(frozen=True)
class Attributes:
    """The attributes of a config that decide its shape, classified.

    values: all attributes, as `config.to_dict()` gives them; one inside another is named `ffn_config.moe_top_k`.
    axis_of: attribute -> the size it is scaled with.
    groups: attributes that count groups of experts, whose number stays. shape: what the config builds.
    """

    values: Mapping[str, Any]
    axis_of: Mapping[str, str]
    groups: tuple[str, ...]
    shape: Shape

    @classmethod
    def read(cls, config: PretrainedConfig, shape: Shape) -> Attributes:
        """Which attribute is scaled with which size, from its name and, where a name is ambiguous, its value."""
        values = {key: value for key, value in _flat(config.to_dict()).items() if not key.startswith(RECORDS)}
        present = [key for key, value in values.items() if _numbers(value)]
        own_size = any(_named(_EXPERT_SIZE, k) and _numbers(values[k])[0] == shape.expert_size for k in present)
        axis_of: dict[str, str] = {}
        for key in present:
            first = _numbers(values[key])[0]
            if any(_named(pattern, key) for pattern in (_WIDTH, _HEADS, _RANKS, _DENSE_ALONE)):
                axis_of[key] = "width"
            elif shape.dense:
                axis_of |= {key: "width"} if _named(_DENSE_SIZE, key) else {}
            elif _named(_ZERO_EXPERTS, key) or (_named(_EXPERTS, key) and first == shape.num_experts):
                axis_of[key] = "num_experts"
            elif _named(_TOP_K, key) and first == shape.top_k:
                axis_of[key] = "top_k"
            elif _named(_EXPERT_SIZE, key) or _named(_SHARED_SIZE, key):
                axis_of[key] = "expert_size"
            elif _named(_DENSE_SIZE, key):
                axis_of[key] = "width" if own_size else "expert_size"
        groups = tuple(k for k in present if _named(_GROUPS, k) and values[k] and not shape.dense)
        return cls(values, axis_of, groups, shape)

    def target(self, given: Mapping[str, int]) -> Shape:
        """The shape with the given sizes; top_k follows num_experts where it is not given.

        Raises:
            ShapeError: a size that is not a positive integer, or a top_k that would not be whole.
        """
        old = self.shape
        if "top_k" in given or old.num_experts is None or old.top_k is None:
            return replace(old, **given)
        num_experts = given.get("num_experts", old.num_experts)
        replace(old, **given, top_k=1)  # which checks what was given
        top_k = old.top_k * Fraction(num_experts, old.num_experts)
        if top_k.denominator != 1:
            self._refuse("num_experts", num_experts, "top_k", old.top_k)
        return replace(old, **given, top_k=int(top_k))

    def step(self, axis: str, top_k_follows: bool = True) -> int:
        """Sizes of `axis` divide if they are multiples of this: then everything scaled with it is whole."""
        return math.lcm(*self.steps(axis, top_k_follows).values())

    def steps(self, axis: str, top_k_follows: bool = True) -> dict[str, int]:
        """`step` by attribute: the sizes of `axis` at which this attribute alone is whole are multiples of it."""
        size = getattr(self.shape, axis)
        found = {
            key: size // math.gcd(size, *_numbers(self.values[key]))
            for key, scaled_with in self.axis_of.items()
            if scaled_with == axis
        }
        if axis == "num_experts":
            found |= {key: self.values[key] for key in self.groups}
            if top_k_follows:
                found["top_k"] = size // math.gcd(size, self.shape.sizes["top_k"])
        return found

    def scaled(self, new: Shape) -> dict[str, Any]:
        """All values, those that are classified multiplied by the ratio of their size.

        Raises:
            ShapeError: a value that would not be whole, or experts that do not divide into their groups.
        """
        values = dict(self.values)
        for key, axis in self.axis_of.items():
            ratio = Fraction(getattr(new, axis), getattr(self.shape, axis))
            for value in _numbers(values[key]):
                if (value * ratio).denominator != 1:
                    self._refuse(axis, getattr(new, axis), key, value)
            values[key] = _times(values[key], ratio)
        for key in self.groups:
            if new.num_experts is not None and new.num_experts % values[key]:
                step = self.step("num_experts", top_k_follows=new.sparsity == self.shape.sparsity)
                raise ShapeError(
                    f"num_experts = {new.num_experts} does not divide into {key} = {values[key]} groups: "
                    f"{_nearest('num_experts', new.num_experts, step)}"
                )
        return values

    def _refuse(self, axis: str, size: int, key: str, value: int) -> None:
        ratio = Fraction(size, getattr(self.shape, axis))
        raise ShapeError(
            f"{axis} × {ratio} makes {key} = {value} into {float(value * ratio):g}: "
            f"{_nearest(axis, size, self.step(axis))}"
        )


def repeat_layers(values: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """`Attributes.values` of `old` layers, nested, at `new` layers: what has an entry per layer is continued or cut.

    Raises:
        ShapeError: a layer pattern without a period.
    """
    repeated = _nested(values)
    if new == old:
        return repeated
    for key, value in list(repeated.items()):
        if re.fullmatch(_LAYER_NUMBERS, key) and isinstance(value, list):
            of_kind = _repattern([layer in value for layer in range(old)], new, key)
            repeated[key] = [layer for layer in range(new) if of_kind[layer]]
        elif isinstance(value, list) and len(value) == old:
            repeated[key] = _repattern(value, new, key)
        elif key == "per_layer_config" and value:
            given = {int(layer): entry for layer, entry in value.items()}
            each = [given.get(layer) for layer in range(old)]
            repeated[key] = {str(i): v for i, v in enumerate(_repattern(each, new, key)) if v is not None}
        elif re.fullmatch(_DEPTH, key):
            repeated[key] = new
        elif re.fullmatch(_LAST_LAYER, key) and value == old - 1:
            repeated[key] = new - 1
    return repeated


def _verified(
    config: PretrainedConfig,
    values: dict[str, Any],
    model_class: type[PreTrainedModel],
    source: PreTrainedModel,
    trace_of_source: Trace,
    old: Shape,
    new: Shape,
) -> PretrainedConfig:
    """The config of `values`, built on fake tensors and measured.

    Raises:
        ShapeError: no working model, or one of another shape than `new`.
    """
    name = type(config).__name__
    try:
        text = config.get_text_config()
        scaled = with_text(config, type(text).from_dict(values))
        model, trace = shared_trace(model_class, scaled)
        got = measure(model, trace)
    except Exception as error:
        raise ShapeError(f"{name} at {new.sizes} builds no working model: {type(error).__name__}: {error}") from error
    if got != new:
        raise ShapeError(
            f"{name} does not scale as asked: wanted {new}, the scaled config builds {got}. "
            "A size that scale_config does not know decides this family's shape; pass a config instead of a Shape."
        )
    if new.dense:
        _check_growth(name, trace_of_source, trace, Fraction(new.width, old.width))
    seen = ((old, source, trace_of_source), (new, model, trace))
    before, after = (shape.depth - _moe_layers(model, trace) for shape, model, trace in seen)
    if after > max(before, math.ceil(before * Fraction(new.depth, old.depth))):
        raise ShapeError(
            f"{name} at depth {new.depth} has {after} layers without experts, the original {before} "
            f"of {old.depth}: an attribute that scale_config does not know decides where experts are; pass a config"
        )
    return scaled


def _check_growth(name: str, old: Trace, new: Trace, ratio: Fraction) -> None:
    """Refuses a dense model that is wider by `ratio` outside its branches and not inside, where no `Shape` looks.

    Raises:
        ShapeError: the first matrix at the end of a branch that sums over as many units as before.
    """
    inside = [
        {
            re.sub(r"\.\d+\.", ".*.", n): (n, t.fan_in[n])
            for b in t.branches
            for n in (*b.closers, *b.inner)
            if n in t.fan_in
        }
        for t in (old, new)
    ]
    for pattern, (parameter, size) in inside[1].items():
        if ratio != 1 and inside[0].get(pattern, (None, None))[1] == size:
            raise ShapeError(
                f"{name} at width × {ratio} keeps the {size} units in front of {parameter}: an attribute that "
                "scale_config does not know, or that rounds, decides them; pass a config instead of a Shape"
            )


def _moe_layers(model: PreTrainedModel, trace: Trace) -> int:
    """Decoder layers with routed experts."""
    stack, layers = find_layers(model)
    experts = [router.experts for router in trace.routers if router.mixes == "mlp"]
    return sum(any(name.startswith(f"{stack}.{i}.") for name in experts) for i in range(len(layers)))


def _named(pattern: str, key: str) -> bool:
    """Whether an attribute, wherever it stands, has a name of this pattern."""
    return re.fullmatch(pattern, key.rpartition(".")[2]) is not None


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes inside attributes as `outer.inner`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inside = isinstance(value, dict) and bool(value) and (key.isdigit() or re.fullmatch(_NESTED, key))
        found |= (
            {f"{key}.{k}": v for k, v in _flat({str(k): v for k, v in value.items()}).items()}
            if inside
            else {key: value}
        )
    return found


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `_flat`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *outer, leaf = key.split(".")
        at = found
        for name in outer:
            at = at.setdefault(name, {})
        at[leaf] = value
    return found


def _numbers(value: Any) -> list[int]:
    """The whole numbers in a value: itself, or those of a list of nothing else; otherwise none."""
    if isinstance(value, list):
        each = [_numbers(v) for v in value]
        return [n for numbers in each for n in numbers] if all(each) else []
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def _times(value: Any, ratio: Fraction) -> Any:
    return [_times(v, ratio) for v in value] if isinstance(value, list) else int(value * ratio)


def _nearest(axis: str, size: int, step: int) -> str:
    """The end of an error: the sizes next to `size` that divide."""
    below = size // step * step
    near = [str(n) for n in (below, below + step) if n]
    return f"the nearest that {'divides is' if len(near) == 1 else 'divide are'} {axis} = {' and '.join(near)}"


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
        f"{_nearest('depth', length, len(items))}; or pass a config with the pattern you want"
    )
