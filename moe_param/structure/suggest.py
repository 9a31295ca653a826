"""`suggest_base`: where to tune. Smaller shapes that divide for a config, and what they cost."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from moe_param.errors import InputError
from moe_param.structure.adapters import adapter_for
from moe_param.structure.observations import StructureError
from moe_param.structure.regime import CROSSOVER, Regime, regime
from moe_param.structure.roles import Structure, check_routers, read_structure
from moe_param.structure.scaling_config import Attributes, repeat_layers, scale_config
from moe_param.structure.shape import Shape, ShapeError
from moe_param.structure.trace import model_class_for, shared_trace

CONTEXT = 4096
"""Tokens of a training sequence, for the cost of attention, where nothing else is said."""

ROWS = (4.0, 1.0, 1 / 4, 1 / 16)
"""Bases are looked for at these multiples of the cost."""

_TRIES = 12
_GRANULE = 64  # widths are multiples of it where such widths divide: kernels like them


@dataclass(frozen=True)
class Base:
    """A shape and what it costs.

    parameters: all of them. active: those that one token visits, the embedding included. flops: of training, per
    token. share: of the target's flops.
    """

    shape: Shape
    parameters: int
    active: int
    flops: float
    share: float

    @property
    def regime(self) -> Regime | None:
        """On which side of the crossover of the expert-size rule the shape is; None where it is dense."""
        return regime(self.shape)

    @property
    def sizes(self) -> str:
        """As `--base` takes it."""
        return ",".join(f"{size}={number}" for size, number in self.shape.sizes.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        numbers = {"parameters": self.parameters, "active": self.active, "flops": self.flops, "share": self.share}
        return {"shape": asdict(self.shape), **numbers, "regime": self.regime and self.regime.to_dict()}


@dataclass(frozen=True)
class BaseSuggestion:
    """Bases of one target, the dearest first; all have its sparsity and head_dim and every kind of its layers.

    cost: the share that was asked for. context: tokens of a sequence, for attention. blocked: size -> why it stays.
    """

    model_type: str
    target: Base
    bases: tuple[Base, ...]
    cost: float
    context: int
    blocked: Mapping[str, str]

    @property
    def best(self) -> Base:
        """The dearest base within the cost; where none is, the cheapest there is."""
        return next((base for base in self.bases if base.share <= self.cost), self.bases[-1])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "model_type": self.model_type,
            "cost": self.cost,
            "context": self.context,
            "target": self.target.to_dict(),
            "bases": [base.to_dict() for base in self.bases],
            "best": self.bases.index(self.best),
            "blocked": dict(self.blocked),
        }

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(
            title=f"Bases for {self.model_type}",
            caption="\n".join(self._notes()),
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        sizes, alphas = (*self.target.shape.sizes, "head_dim"), () if self.target.shape.dense else ("α_ffn", "α*")
        for column in ("", *sizes, "parameters", "active", "FLOPs", *alphas):
            table.add_column(column, justify="right", no_wrap=True)
        for base in (*self.bases, self.target):
            mark = "target" if base is self.target else "best" if base is self.best else ""
            values = (getattr(base.shape, size) for size in sizes)
            numbers = [_short(base.parameters), _short(base.active), f"{base.share:.2%}"]
            if base.regime is not None:
                numbers += [f"{base.regime.alpha_ffn:.3g}", f"{base.regime.alpha_star:.1e}"]
            table.add_row(mark, *("" if value is None else str(value) for value in values), *numbers)
        console = Console(width=120, file=io.StringIO(), record=True)
        console.print(table)
        return "\n".join(line.rstrip() for line in console.export_text().splitlines())

    def _notes(self) -> Iterator[str]:
        if self.best.share > self.cost:
            yield f"No base costs {self.cost:.2%} or less of the target."
        yield from (f"{size} stays at the target's: {why}." for size, why in self.blocked.items())
        yield f"FLOPs: of one token's training step, as a share of the target's; causal attention over {self.context}"
        yield "tokens is counted. active: parameters that one token visits."
        if not self.target.shape.dense:
            yield f"The expert-size rule is asymptotic from α_ffn ≈ {CROSSOVER} on."
        yield f"To see the rules: moe-param explain … --base {self.best.sizes}"


def suggest_base(
    config: PretrainedConfig,
    *,
    cost: float = 0.01,
    context: int = CONTEXT,
    model_class: type[PreTrainedModel] | None = None,
) -> BaseSuggestion:
    """Shapes at which hyperparameters of `config` can be found, at its sparsity and its head_dim.

    Every base is built on fake tensors and measured. Of the shapes that cost the same, the one is taken whose sizes are
    nearest to the target's: the least Σ (log ratio)² over width, depth and num_experts. expert_size follows the width.
    Every kind of layer of the target is in the base, and no base has one expert per token unless the target has.

    Cost is counted per token of training: 6 FLOPs for each active parameter that stands in a matrix product (the
    lookup in an embedding is none), and 6 · context · head_dim FLOPs per attention head (queries with keys, and weights
    with values, over a causal context; sliding windows and sparse attention are counted as full).

    Args:
        config: of the model to train.
        cost: share of the target's FLOPs per token that one run of the base may cost, above 0 and below 1.
        context: tokens of a training sequence.
        model_class: the class the config is for, where transformers cannot tell.

    Raises:
        InputError: a cost that is no such share, or a context that is no positive whole number.
        ShapeError: no smaller shape divides; the attributes that are in the way are named.
        StructureError, RoleError: the model cannot be read, or its own routers get no gradient.
    """
    if not (isinstance(cost, (int, float)) and 0 < cost < 1):
        raise InputError(f"cost must be a share of the target's FLOPs, above 0 and below 1, got {cost!r}")
    if not isinstance(context, int) or context < 1:
        raise InputError(f"context must be a positive number of tokens, got {context!r}")
    model_class = model_class or model_class_for(config)
    structure = read_structure(model_class, config)
    check_routers(structure, "the target")
    target = _base(structure, config, context)
    sizes, blocked = _choices(structure, config)
    search = _Search(structure, config, target, sizes, context)
    found = {base.shape: base for factor in ROWS if (base := search.within(cost * factor)) is not None}
    if not found:
        reasons = "; ".join([*(f"{size}: {why}" for size, why in blocked.items()), *search.refused.values()])
        raise ShapeError(f"no smaller {type(config).__name__} divides ({reasons}): pass a base config of your own")
    bases = sorted(found.values(), key=lambda base: -base.flops)
    return BaseSuggestion(config.model_type, target, tuple(bases), cost, context, blocked)


def _short(count: int) -> str:
    """671_026_404_352 → 671.0B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)


# -- what a shape costs ----------------------------------------------------------------------------------------------
def _base(structure: Structure, config: PretrainedConfig, context: int, target: float | None = None) -> Base:
    """Counts a model; its own FLOPs are the target's where none are given."""
    shape = structure.shape
    counts = {name: math.prod(info.shape) for name, info in structure.parameters.items()}
    parts = _flops(structure, config, context)
    unvisited = sum(counts[n] for n, info in structure.parameters.items() if info.role.startswith("expert_"))
    active = sum(counts.values()) - int(unvisited * (1 - (shape.sparsity or 1)))
    flops = sum(parts.values())
    return Base(shape, sum(counts.values()), active, flops, flops / (target or flops))


def _flops(structure: Structure, config: PretrainedConfig, context: int) -> dict[str, float]:
    """FLOPs of one token's training step, by role; those of attention scores and values under "attention"."""
    model, trace = shared_trace(structure.model_class, config)
    found: dict[str, float] = {}
    for info in structure.parameters.values():
        if info.fan_in is not None and info.role != "unembedding":  # matrices: no gain, no bias, no lookup
            visited = float(structure.shape.sparsity or 1) if info.role.startswith("expert_") else 1.0
            found[info.role] = found.get(info.role, 0.0) + 6 * math.prod(info.shape) * visited
    head: Any = model.get_output_embeddings()  # tied or not
    found["unembedding"] = 6.0 * head.weight.numel() if head is not None else 0.0
    heads = getattr(config.get_text_config(), "num_attention_heads", None) or 0
    heads = max(heads) if isinstance(heads, list) else heads
    found["attention"] = 6.0 * context * heads * sum(attention.head_dim for attention in trace.attentions)
    return found


# -- which shapes there are ------------------------------------------------------------------------------------------
def _choices(structure: Structure, config: PretrainedConfig) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Sizes that divide, up to the target's, for width, depth and (of experts) num_experts; why one has no other."""
    shape, refused = structure.shape, adapter_for(config).refuse
    attributes = Attributes.read(config, shape)
    sizes, blocked = {}, {}

    widths = list(range(attributes.step("width"), shape.width + 1, attributes.step("width")))
    sizes["width"] = [width for width in widths if width % _GRANULE == 0 or width == shape.width]
    if len(sizes["width"]) == 1:
        sizes["width"] = widths
    key, step = max(attributes.steps("width").items(), key=lambda item: item[1])
    blocked["width"] = f"{key} = {attributes.values[key]} is whole at multiples of {step} only"

    kinds = set(structure.kinds)
    depths = [depth for depth in range(1, shape.depth) if set(structure.kinds[:depth]) == kinds]
    no_period = ""
    sizes["depth"] = [shape.depth]
    for depth in depths if "depth" not in refused else ():
        try:
            repeat_layers(attributes.values, shape.depth, depth)
            sizes["depth"].append(depth)
        except ShapeError as error:
            no_period = str(error)
    blocked["depth"] = refused.get("depth") or no_period or "fewer layers would leave out a kind of layer"

    if shape.num_experts and shape.top_k and shape.sparsity:
        step, least = attributes.step("num_experts"), min(2, shape.top_k)
        counts = [n for n in range(step, shape.num_experts + 1, step) if n * shape.sparsity >= least]
        fixed = refused.get("num_experts") or refused.get("top_k")
        sizes["num_experts"] = [shape.num_experts] if fixed else counts
        blocked["num_experts"] = fixed or (
            f"fewer at the sparsity {shape.top_k}/{shape.num_experts}, with top_k at least {least}, do not divide"
        )
    return sizes, {axis: why for axis, why in blocked.items() if len(sizes[axis]) == 1}


def _candidates(attributes: Attributes, sizes: Mapping[str, list[int]]) -> Iterator[tuple[float, Shape]]:
    """(Σ (log ratio)² to the target, shape) of all shapes with these sizes, the target's own aside."""
    target = attributes.shape
    step = 1 if target.dense else attributes.step("expert_size")
    for chosen in product(*sizes.values()):
        given = dict(zip(sizes, chosen))
        ratios = [size / getattr(target, name) for name, size in given.items()]
        if target.expert_size and target.sparsity:
            given["top_k"] = int(given["num_experts"] * target.sparsity)
            given["expert_size"] = max(1, round(target.expert_size * ratios[0] / step)) * step
        shape = replace(target, **given)
        if shape != target:
            yield sum(math.log(ratio) ** 2 for ratio in ratios), shape


def _estimate(parts: Mapping[str, float], target: Shape, shape: Shape) -> float:
    """FLOPs of `shape`, from those of the target by role: good for choosing what to build, not for telling."""
    grew = {size: number / getattr(target, size) for size, number in shape.sizes.items()}
    width, depth = grew["width"], grew["depth"]
    expert = width * grew.get("expert_size", 1.0)
    grown = {
        "unembedding": width,
        "attention": width * depth,
        "router": width * depth * grew.get("num_experts", 1.0),
        **dict.fromkeys(("expert_up", "expert_down"), expert * depth * grew.get("top_k", 1.0)),
        **dict.fromkeys(("shared_up", "shared_down"), expert * depth),
    }
    return sum(flops * grown.get(role, width**2 * depth) for role, flops in parts.items())


class _Search:
    """Builds the shapes that look best until one keeps the budget; remembers what it built and what did not work."""

    def __init__(
        self, structure: Structure, config: PretrainedConfig, target: Base, sizes: Mapping[str, list[int]], context: int
    ) -> None:
        self.structure, self.config, self.target, self.context = structure, config, target, context
        parts = _flops(structure, config, context)
        self.candidates = [
            (distance, _estimate(parts, target.shape, shape), shape)
            for distance, shape in sorted(
                _candidates(Attributes.read(config, target.shape), sizes), key=lambda found: found[0]
            )
        ]
        self.built: dict[Shape, Base] = {}
        self.refused: dict[tuple[int, int | None], str] = {}

    def within(self, share: float) -> Base | None:
        """The nearest shape that costs at most this share of the target; where none does, the cheapest; else None."""
        limit = share * self.target.flops
        for _ in range(_TRIES):
            open_to_us = [c for c in self.candidates if (c[2].depth, c[2].num_experts) not in self.refused]
            if not open_to_us:
                return None
            fitting = next((c for c in open_to_us if c[1] <= limit), None)
            _, estimate, shape = fitting or min(open_to_us, key=lambda c: c[1])
            base = self.build(shape)
            if base is not None and (base.share <= share or fitting is None):
                return base
            if base is not None:  # the estimate was too low: expect as much of the next
                limit = min(limit, share * self.target.flops * estimate / base.flops) * 0.999
        return None

    def build(self, shape: Shape) -> Base | None:
        """The base at this shape, or None where it does not build, lacks a kind of layer, or cannot learn to route."""
        if shape not in self.built:
            model_class = self.structure.model_class
            try:
                config = scale_config(self.config, **shape.sizes, model_class=model_class)
                structure = read_structure(model_class, config)
                check_routers(structure, "the base")
                if set(structure.kinds) != set(self.structure.kinds):
                    raise ShapeError(f"depth = {shape.depth} leaves out a kind of layer")
            except (ShapeError, StructureError) as error:
                self.refused[shape.depth, shape.num_experts] = str(error)
                return None
            self.built[shape] = _base(structure, config, self.context, self.target.flops)
        return self.built[shape]
