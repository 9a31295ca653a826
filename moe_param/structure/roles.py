"""The role of every parameter, from the module tree and one traced forward pass. No family is named here."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from moe_param.errors import MoeParamError
from moe_param.naming import check_known
from moe_param.structure.adapters import MATRICES, adapter_for
from moe_param.structure.dispatch import find_layers, is_experts, text_part
from moe_param.structure.laws import InitLaw
from moe_param.structure.matrices import Matrices, arrangement
from moe_param.structure.observations import StructureError, Trace
from moe_param.structure.shape import Shape, measure
from moe_param.structure.trace import shared_trace

UNTRAINED = ("frozen", "selection_bias")
"""Roles of parameters that no optimizer touches."""

LEFT_ALONE = "left_alone"
"""Role of the parameters of other towers (vision, audio, their projectors) under only="text": trained, but no rule."""


class RoleError(MoeParamError):
    """Parameters whose role cannot be told; the message lists all of them."""


@dataclass(frozen=True)
class Info:
    """One parameter of a model.

    fan_in, fan_out: sizes of the contraction it takes part in; None where it is not a matrix.
    of: for a bias, the parameter (the weight of a linear, the gain of a norm) it belongs to.
    offset: a gain of the form 1 + w.
    layer: index in the decoder stack, None outside. relative: name inside the layer (or the full name); of experts in
        a list that of all of them, `experts.*.up.weight`.
    sites: forward multipliers that stand before or behind it (`moe_param.structure.adapters.SITES`).
    head_dim, scaling: of the attention whose queries it makes; the model's own factor on query·key.
    padding: row of an embedding that stays zero.
    undo: {dimension: exponent} of a factor in the family's own forward pass that is taken back.
    own_multipliers: site -> {dimension: exponent} of what the family's own forward pass multiplies there.
    matrices: those it holds; None where it is no matrix, and, with a reason in `unclear`, where that cannot be told.
    """

    role: str
    shape: tuple[int, ...]
    law: InitLaw
    fan_in: int | None = None
    fan_out: int | None = None
    of: str | None = None
    offset: bool = False
    layer: int | None = None
    relative: str = ""
    sites: frozenset[str] = frozenset()
    head_dim: int | None = None
    scaling: float | None = None
    padding: int | None = None
    undo: Mapping[str, float] = field(default_factory=dict)
    own_multipliers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    matrices: Matrices | None = None
    unclear: str = ""


@dataclass(frozen=True)
class Structure:
    """What moe_param knows of a model: its shape, and an `Info` per parameter name.

    routers: names of the modules that route, one per MoE layer.
    kinds: per decoder layer, what it consists of; layers of one kind correspond to each other across models.
    gaps: site -> why the forward multiplier of that site has no parameter to go into.
    constant_gates: names of the experts modules whose router cannot learn (see `check_routers`).
    head_dims: the contracted sizes of query·key of all layers.
    """

    model_class: type[PreTrainedModel]
    shape: Shape
    parameters: dict[str, Info]
    routers: tuple[str, ...]
    kinds: tuple[Any, ...]
    gaps: dict[str, str] = field(default_factory=dict)
    constant_gates: tuple[str, ...] = ()
    head_dims: frozenset[int] = frozenset()


def read_structure(model_class: type[PreTrainedModel], config: PretrainedConfig, only: str | None = None) -> Structure:
    """The roles of all parameters of `model_class(config)`, without building it in memory.

    With only="text", what text does not reach outside of the module that embeds it is `LEFT_ALONE`.

    Raises:
        StructureError: no decoder stack, or a forward pass that does not run on fake tensors.
        RoleError: parameters without a role, all of them listed; those that differ in a layer's number on one line.
            An `only` that is not "text", or one that leaves nothing alone.
    """
    if only is not None:
        check_known((only,), ("text",), "part", "only", RoleError)
    model, trace = shared_trace(model_class, config)
    reader = _Reader(model, trace, only)
    if only is not None and not reader.elsewhere:
        raise RoleError(f"only={only!r}: {model_class.__name__} has no parts beside the {only}, so leave it out")
    parameters: dict[str, Info] = {}
    unknown: list[str] = []
    for name in trace.shapes:
        role = reader.role(name)
        if role is None:
            unknown.append(name)
        else:
            parameters[name] = reader.info(name, role)
    if unknown:
        shapes = {name: trace.shapes[name] for name in unknown}
        raise _unknown_roles(model_class, config, shapes, reader.elsewhere)
    kinds = reader.kinds(parameters, config)
    constant = tuple(router.experts for router in trace.routers if router.constant)
    routers = tuple(sorted(reader.routers))
    head_dims = frozenset(attention.head_dim for attention in trace.attentions)
    shape, gaps = measure(model, trace), reader.gaps()
    return Structure(model_class, shape, parameters, routers, kinds, gaps, constant, head_dims)


def _unknown_roles(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    elsewhere: frozenset[str],
) -> RoleError:
    alike: dict[Any, list[str]] = {}
    for name, shape in shapes.items():
        alike.setdefault((layer_pattern(name)[0], shape), []).append(name)
    listing = "\n  ".join(
        f"{names[0]} {shape}" if len(names) == 1 else f"{pattern} {shape} × {len(names)}"
        for (pattern, shape), names in alike.items()
    )
    towers = "" if elsewhere.isdisjoint(shapes) else 'Other towers (vision, audio) are left alone with only="text". '
    return RoleError(
        f"{model_class.__name__} has {len(shapes)} parameters whose role cannot be told:\n  {listing}\n"
        f"The forward pass of the language model does not use them. {towers}Freeze them (requires_grad_(False) in the "
        "model's __init__), remove them, or give them a role with moe_param.register_adapter("
        f"{config.get_text_config().model_type!r}, {{'roles': {{pattern of the name in its layer: role}}}})."
    )


def check_routers(structure: Structure, which: str) -> None:
    """Refuses a model whose routers get no gradient: one expert per token, its gate normalized over itself.

    The gate is then 1 whatever the router says, and Adam moves the router by rounding noise alone.

    Raises:
        StructureError: `which` (e.g. "the base") and what to do.
    """
    if structure.constant_gates:
        twice = 2 * structure.shape.sizes["num_experts"]
        raise StructureError(
            f"{which} has top_k = 1 and gates normalized over the chosen experts, so every gate is 1 and the router "
            f"gets no gradient: choose top_k >= 2 (at the same sparsity, 2 of {twice} experts), or "
            "gates that are not normalized (norm_topk_prob=False where the config has it)"
        )


def layer_pattern(name: str) -> tuple[str, int | None]:
    """`model.layers.3.mlp.gate.weight` → (`model.layers.*.mlp.gate.weight`, 3)."""
    match = re.search(r"\.(\d+)\.", name)
    if match is None:
        return name, None
    return name[: match.start()] + ".*." + name[match.end() :], int(match.group(1))


class _Reader:
    """Names, modules and observations of one model, and the questions that decide roles."""

    def __init__(self, model: PreTrainedModel, trace: Trace, only: str | None = None) -> None:
        self.trace = trace
        self.only = only
        text = text_part(model)
        self.elsewhere = frozenset(n for n in trace.shapes if not n.startswith(text) and n not in trace.used)
        self.adapter = adapter_for(model.config)
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        self.stack, layers = find_layers(model)
        self.depth = len(layers)
        self.names = {id(p): name for name, p in model.named_parameters()}
        head = model.get_output_embeddings()
        self.head = self.names.get(id(getattr(head, "weight", None)))
        self.tied = self.head in trace.embeddings
        self.input_embedding = self.names.get(id(getattr(model.get_input_embeddings(), "weight", None)))
        # The last matrices of a branch, also where a norm closes it.
        self.closers = {name for branch in trace.branches for name in branch.closers}
        self.ends = {name for branch in trace.branches for name in (*branch.closers, *branch.inner)}
        self.queries = {n: a for a in trace.attentions for n in a.query if n not in a.key}
        self.keys = {name for attention in trace.attentions for name in attention.key}
        made = {name for a in trace.attentions for name in (*a.query, *a.key, *a.sources)}
        self.values = {name for attention in trace.attentions for name in attention.value} - made
        self.attention_blocks = {self.holding_matrices(a.module, a.layer) for a in trace.attentions}
        self.routers = {router.module for router in trace.routers}
        apart = {router.module for router in trace.routers if not f"{router.experts}.".startswith(f"{router.module}.")}
        self.routing = {n for n in trace.shapes if any(n.startswith(module + ".") for module in apart)}
        self.routing |= {n for router in trace.routers for n in router.weights if n.startswith(router.module + ".")}
        experts = [name for name, module in self.modules.items() if is_experts(module)]
        self.blocks = {name.rpartition(".")[0] for name in (*experts, *(router.experts for router in trace.routers))}
        mlps = [router for router in trace.routers if router.mixes == "mlp"]
        self.experts = {name: "expert_up" for router in mlps for name in router.up}
        self.experts |= {name: "expert_down" for router in mlps for name in router.down}
        self.listed = [r.experts for r in mlps if isinstance(self.modules[r.experts], nn.ModuleList)]
        self.unnormalized = {name for router in mlps if not router.normalized for name in router.down}

    # -- roles: the first question that has an answer decides ---------------------------------------------------
    def role(self, name: str) -> str | None:
        return next((role for ask in _QUESTIONS if (role := ask(self, name)) is not None), None)

    def untrained(self, name: str) -> str | None:
        if self.trainable[name]:
            return None
        counts = {router.among for router in self.trace.routers}
        in_block = any(name.startswith(block + ".") for block in self.blocks)
        return "selection_bias" if in_block and math.prod(self.trace.shapes[name]) in counts else "frozen"

    def left_alone(self, name: str) -> str | None:
        return LEFT_ALONE if self.only == "text" and name in self.elsewhere else None

    def table(self, name: str) -> str | None:
        if name in self.trace.embeddings:
            return "embedding"
        return "unembedding" if name == self.head else None

    def bias(self, name: str) -> str | None:
        return "bias" if self.bias_of(name) is not None else None

    def gain(self, name: str) -> str | None:
        if name not in self.trace.gains:
            return None
        if name in self.trace.logits_from and self.layer_of(name) is None:
            return "final_norm"
        if name in self.closers:
            return "post_norm"
        if name in self.queries:
            return "query_norm"
        return "key_norm" if name in self.keys else "norm"

    def expert(self, name: str) -> str | None:
        return self.experts.get(name) or self.resting_expert(name)

    def resting_expert(self, name: str) -> str | None:
        """A weight of experts that text does not reach: what those of the same name are that it reaches."""
        owner, _, leaf = name.rpartition(".")
        if not is_experts(self.modules[owner]):
            return None
        return next((role for other, role in self.experts.items() if other.rpartition(".")[2] == leaf), None)

    def declared(self, name: str) -> str | None:
        relative = self.relative(name)
        return next((role for pattern, role in self.adapter.roles.items() if re.fullmatch(pattern, relative)), None)

    def matrix(self, name: str) -> str | None:
        """By the module it sits in; vectors of a mixer (sinks, decays, scales) are "other"."""
        if name not in self.trace.used:
            return None
        if name not in self.trace.fan_in:
            return "other"
        if name in self.routing:
            return "router"
        end = name in self.ends
        if any(name.startswith(block + ".") for block in self.attention_blocks):
            return "attention_out" if end else "attention_value" if name in self.values else "attention_in"
        if self.in_mlp(name):
            kind = "shared" if self.beside_experts(name) else "dense"
            return f"{kind}_down" if end else f"{kind}_up"
        return "other_out" if end else "other"

    def bias_of(self, name: str) -> str | None:
        """The weight a bias belongs to: `x.bias` to `x.weight` (a tied head's to the embedding's weight), an experts
        module's `down_proj_bias` to `down_proj`."""
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias":
            return self.names.get(id(getattr(self.modules[owner], "weight", None)))
        weight = name.removesuffix("_bias")
        return weight if weight != name and weight in self.trace.shapes else None

    # -- where a parameter is ----------------------------------------------------------------------------------
    def layer_of(self, name: str) -> int | None:
        if not name.startswith(self.stack + "."):
            return None
        return int(name[len(self.stack) + 1 :].partition(".")[0])

    def relative(self, name: str) -> str:
        layer = self.layer_of(name)
        return name if layer is None else name[len(f"{self.stack}.{layer}.") :]

    def counterpart(self, name: str) -> str:
        """The name inside the layer, without the number of an expert: what it is called in a model of another shape."""
        relative = self.relative(name)
        start = next((f"{e}." for e in self.listed if name.startswith(f"{e}.")), None)
        if start is None:
            return relative
        at = len(start) - (len(name) - len(relative))
        return f"{relative[:at]}*.{relative[at:].partition('.')[2]}"

    def ancestors(self, name: str) -> list[str]:
        """Modules that hold a parameter inside its decoder layer, innermost first, the layer itself left out."""
        if self.layer_of(name) is None:
            return []
        layer = f"{self.stack}.{self.layer_of(name)}"
        found = []
        owner = name.rpartition(".")[0]
        while owner.startswith(layer + "."):
            found.append(owner)
            owner = owner.rpartition(".")[0]
        return found

    def holding_matrices(self, module: str, layer: int) -> str:
        """The innermost module around `module` with a matrix in it: a softmax may be a module of its own."""
        around = [module, *self.ancestors(module)]
        return next((m for m in around if any(n.startswith(m + ".") for n in self.trace.fan_in)), module)

    def in_mlp(self, name: str) -> bool:
        """Whether a matrix sits in a plain MLP: a module of two or three matrices and their biases, no convolution."""
        for owner in self.ancestors(name):
            inside = [n for n in self.trace.shapes if n.startswith(owner + ".")]
            matrices = [n for n in inside if self.bias_of(n) is None]
            if len(matrices) == 1:
                continue
            plain = all(n in self.trace.fan_in and n not in self.experts for n in matrices)
            convolution = any(isinstance(m, nn.Conv1d) for m in self.modules[owner].modules())
            return plain and not convolution and len(matrices) <= 3
        return False

    def beside_experts(self, name: str) -> bool:
        layer = f"{self.stack}.{self.layer_of(name)}."
        return any(block.startswith(layer) or block + "." == layer for block in self.blocks)

    # -- the rest ----------------------------------------------------------------------------------------------
    def info(self, name: str, role: str) -> Info:
        trace, layer = self.trace, self.layer_of(name)
        if role == LEFT_ALONE:
            return Info(role, trace.shapes[name], InitLaw("kept"), relative=name)
        weight = self.bias_of(name)
        owner = self.modules[name.rpartition(".")[0]]
        sites = self.sites(name)
        attention = self.queries.get(name)
        matrices = self.matrices(name, role)
        return Info(
            role=role,
            shape=trace.shapes[name],
            law=trace.laws[name],
            fan_in=self.fan(name, role, "fan_in"),
            fan_out=self.fan(name, role, "fan_out"),
            of=weight,
            offset=name in trace.offset_gains,
            layer=layer,
            relative=self.counterpart(name),
            sites=sites,
            head_dim=attention.head_dim if attention else None,
            scaling=attention.scaling if attention else None,
            padding=owner.padding_idx if isinstance(owner, nn.Embedding) else None,
            undo=self.undo(name, role, sites),
            own_multipliers=self.adapter.multipliers,
            matrices=matrices if isinstance(matrices, Matrices) else None,
            unclear=matrices if isinstance(matrices, str) else "",
        )

    def sites(self, name: str) -> frozenset[str]:
        """The forward multipliers that stand before or behind a parameter."""
        before_logits = name in self.trace.logits_from if self.tied or self.head is None else name == self.head
        at = {
            "residual_branch": name in self.closers,
            "logits": before_logits,
            "attention_logits": name in self.queries,
            "unnormalized_gates": (self.bias_of(name) or name) in self.unnormalized,
        }
        return frozenset(site for site, here in at.items() if here)

    def undo(self, name: str, role: str, sites: frozenset[str]) -> Mapping[str, float]:
        """The family's own factor on this parameter. One on the input embedding is taken back there; where that is
        also the output head, the final norm makes up for it."""
        own = self.adapter.own_factors
        if role == "embedding":
            return own.get(role, {}) if name == self.input_embedding else {}
        if "logits" in sites and self.tied:
            return {dimension: -exponent for dimension, exponent in own.get("embedding", {}).items()}
        return own.get(role, {})

    def fan(self, name: str, role: str, which: str) -> int | None:
        if role in ("embedding", "bias"):
            return None
        seen = getattr(self.trace, which).get(name)
        shape = self.trace.shapes[name]
        if which == "fan_out" and name in self.experts:  # of one expert, also where one product is over all of them
            copies = self.trace.stacked.get(name, shape[0] if len(shape) == 3 else 1)
            return math.prod(shape) // (copies * self.trace.fan_in[name])
        if seen is not None or name in self.trace.used or len(shape) < 2:
            return seen
        # never run: (…, out, in), or (experts, in, out) where experts are transposed
        transposed = getattr(self.modules[name.rpartition(".")[0]], "is_transposed", False)
        return shape[-2] if transposed == (which == "fan_in") else shape[-1]

    def matrices(self, name: str, role: str) -> Matrices | str | None:
        """The matrices of a parameter of a matrix's role, or why they cannot be told."""
        fan_in, fan_out = self.fan(name, role, "fan_in"), self.fan(name, role, "fan_out")
        shape = self.trace.shapes[name]
        if role not in MATRICES or not fan_in or not fan_out or len(shape) not in (2, 3):
            return None
        copies = math.prod(shape) // (fan_in * fan_out)
        one = (shape[0] // copies, shape[1]) if len(shape) == 2 else shape[1:]
        if math.prod(one) != fan_in * fan_out or sorted(one) != sorted((fan_in, fan_out)):
            return f"its shape {shape} is no stack of matrices {fan_out} × {fan_in}"
        owner, transposed = self.modules[name.rpartition(".")[0]], one != (fan_out, fan_in)
        if fan_in == fan_out:
            transposed = bool(getattr(owner, "is_transposed", False))
        if name not in self.trace.used and role.endswith("_up") and getattr(owner, "has_gate", False):
            # Never run: what transformers' experts interface says of it.
            return Matrices(copies, transposed, (fan_out // 2,) * 2, not owner.is_concatenated)
        if not self.fused(name, role, fan_out):
            return Matrices(copies, transposed)
        found = arrangement(self.trace.pieces.get(name, ()), fan_out)
        if found is None:
            return "it makes several things at once, and it was not seen which of its rows make which"
        return Matrices(copies, transposed, *found)

    def fused(self, name: str, role: str, fan_out: int) -> bool:
        """Whether it makes queries and keys, or gate and up, at once."""
        if role.endswith("_up"):
            pieces = self.trace.pieces.get(name, ())
            return bool(pieces) or any(router.size * 2 == fan_out for router in self.trace.routers if name in router.up)
        return any({name} == set(a.sources) or (name in a.query and name in a.key) for a in self.trace.attentions)

    def kinds(self, parameters: dict[str, Info], config: PretrainedConfig) -> tuple[Any, ...]:
        types = getattr(config.get_text_config(), "layer_types", None)
        types = types if isinstance(types, list) and len(types) == self.depth else [None] * self.depth
        members: list[list[tuple[str, str]]] = [[] for _ in range(self.depth)]
        for info in parameters.values():
            if info.layer is not None:
                members[info.layer].append((info.relative, info.role))
        return tuple((kind, tuple(sorted(set(member)))) for kind, member in zip(types, members, strict=True))

    def gaps(self) -> dict[str, str]:
        """Sites whose forward multiplier cannot be folded; an error only if the ratio of that axis is not 1."""
        why = {
            "residual_branch": self.residual_gap(),
            "logits": self.logits_gap(),
            "attention_logits": self.query_gap(),
        }
        return {site: reason for site, reason in why.items() if reason is not None}

    def residual_gap(self) -> str | None:
        if "depth" in self.adapter.refuse:
            return self.adapter.refuse["depth"]
        branches = self.trace.branches
        uses = Counter(name for branch in branches for name in branch.closers)
        shared = sorted(name for name, count in uses.items() if count > 1)
        if shared:
            return f"these weights close several branches: {shared}"
        silent = set(range(self.depth)) - {b.layer for b in branches}
        if silent:
            return f"no addition to the residual stream was seen in layers {sorted(silent)}"
        broken = sorted({b.layer for b in branches if not b.homogeneous})
        if broken:
            return f"no weight scales the output of a branch in layers {broken}"
        if not self.trace.plain_residual and self.adapter.residual is None:
            return "the residual connection is not a plain identity"
        return None

    def logits_gap(self) -> str | None:
        if self.tied and not self.trace.logits_from:
            return "tied embeddings, and no final norm in front of them whose gain could take the factor"
        return None

    def query_gap(self) -> str | None:
        if "head_dim" in self.adapter.refuse:
            return self.adapter.refuse["head_dim"]
        mute = sorted({a.layer for a in self.trace.attentions if not a.query})
        if mute:
            return f"no weight scales the queries of layers {mute}"
        fused = sorted({a.layer for a in self.trace.attentions if set(a.query) & set(a.key)})
        if fused:
            return f"one weight makes queries and keys in layers {fused}"
        return None


_QUESTIONS: tuple[Callable[[_Reader, str], str | None], ...] = (
    _Reader.untrained,
    _Reader.left_alone,
    _Reader.declared,
    _Reader.table,
    _Reader.bias,
    _Reader.gain,
    _Reader.expert,
    _Reader.matrix,
)
