"""The structure of a model, read off one forward pass on fake tensors.

Names of modules and config attributes differ from family to family; what the forward pass does with a parameter
does not. So the model is built and run once under `FakeTensorMode` (no memory, no arithmetic) while every operation
is watched. Each tensor carries a `Flow`: the parameters in which it is homogeneous, that is, the parameters that
scale it by c when they are scaled by c. This is enough to say which weights close a residual branch, which gain
follows a norm, what the queries are made of, which contraction a weight takes part in and how routers normalize.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from moe_param.errors import MoeParamError
from moe_param.structure.adapters import adapter_for
from moe_param.structure.laws import InitLaw, InitWatcher

# What the decorator `transformers.integrations.use_experts_implementation` leaves on every experts module.
EXPERTS_MARKS = ("has_gate", "is_transposed", "has_bias", "is_concatenated", "num_experts")


class StructureError(MoeParamError):
    """The model cannot be read: no decoder stack, or a forward pass that does not run on fake tensors."""


@dataclass(frozen=True)
class Flow:
    """What a tensor is made of.

    degrees: parameter name -> degree; the tensor scales by c**degree when these parameters are scaled by c together.
        Empty: not homogeneous in any parameter (after a nonlinearity or a normalization).
    upstream: the degrees one weight earlier: an equally good answer, needed where a branch and its own convolution
        are added up.
    weight: computed from parameters alone.
    offset: a constant was added to a parameter (gains of the form 1 + w).
    stream: the residual stream itself.
    scaled: the stream was multiplied on its way (the residual is not a plain identity).
    inner: the parameters it was homogeneous in before it was normalized.
    tags: operations passed since the last matrix product with a weight.
    qk: for a product of two activations, the degrees of both sides and the contracted size.
    """

    degrees: tuple[tuple[str, float], ...] = ()
    upstream: tuple[tuple[str, float], ...] = ()
    weight: bool = False
    offset: bool = False
    stream: bool = False
    scaled: bool = False
    inner: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()
    qk: tuple[tuple[str, ...], tuple[str, ...], int] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.degrees)


@dataclass(frozen=True)
class Branch:
    """One addition to the residual stream in the decoder layer `layer`.

    closers: the parameters that scale the branch by c when scaled by c together.
    inner: where a norm closes the branch, the parameters in front of that norm.
    """

    layer: int
    closers: tuple[str, ...]
    inner: tuple[str, ...]
    homogeneous: bool


@dataclass(frozen=True)
class Attention:
    """One softmax attention: what its queries and keys are made of, and the contracted size (head_dim)."""

    layer: int
    query: tuple[str, ...]
    key: tuple[str, ...]
    head_dim: int


@dataclass(frozen=True)
class Router:
    """The module that hands an experts module its indices.

    normalized: its gates pass a sum or a softmax, over whichever experts. constant: over the chosen expert alone, so
    that the gate is 1 whatever the router says.
    """

    experts: str
    module: str | None
    top_k: int
    normalized: bool
    constant: bool = False


@dataclass
class Trace:
    """Everything one pass tells. Parameter names are those of `named_parameters()` (tied ones once).

    laws: of all parameters, and of the buffers that the model's construction writes in place (selection biases).
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    laws: dict[str, InitLaw] = field(default_factory=dict)
    fan_in: dict[str, int] = field(default_factory=dict)
    fan_out: dict[str, int] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    gains: set[str] = field(default_factory=set)
    offset_gains: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    branches: list[Branch] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    routers: list[Router] = field(default_factory=list)
    logits_from: tuple[str, ...] = ()
    plain_residual: bool = True

    def copy(self) -> Trace:
        """One that can be changed without changing this one: what its containers hold is immutable."""
        return Trace(**{name: copy.copy(value) for name, value in vars(self).items()})


_LINEAR = {  # out = Σ of its tensor inputs, possibly rearranged
    *("add", "sub", "rsub", "cat", "stack", "where", "index_add", "scatter_add", "scatter", "masked_fill"),
    *("masked_scatter", "copy", "index_put", "slice_scatter", "select_scatter", "sum", "mean", "cumsum"),
    *("view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice", "select", "split"),
    *(
        "split_with_sizes",
        "unbind",
        "clone",
        "_to_copy",
        "alias",
        "detach",
        "index",
        "gather",
        "index_select",
    ),
    *(
        "unsqueeze",
        "squeeze",
        "repeat",
        "roll",
        "flip",
        "constant_pad_nd",
        "triu",
        "tril",
        "contiguous",
        "neg",
    ),
    *("unfold", "as_strided", "repeat_interleave", "lift_fresh", "lift_fresh_copy", "as_strided_scatter"),
    *(
        "view_as_complex",
        "view_as_real",
        "_conj",
        "diagonal",
        "movedim",
        "chunk",
        "view_copy",
        "expand_copy",
        "topk",
        "sort",
        "abs",
        "lerp",
        "_reshape_alias",
    ),
}
_FACTORIES = {
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
}
_PRODUCTS = {
    "mul",
    "div",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "addbmm",
    "convolution",
    "mv",
    "dot",
    "_grouped_mm",
}
_CONTRACTIONS = _PRODUCTS - {"mul", "div"}
_FROM = "from:"
"""Tag that names the weight of the last matrix product; it survives nonlinearities, which degrees do not."""
_OVER_ONE = "over one"
"""Tag of a sum or a softmax over a single value: divided by it, or being it, a gate is 1."""
_ROOTS = {"rsqrt": -0.5, "sqrt": 0.5, "reciprocal": -1.0, "square": 2.0}
_NORMS = {"native_layer_norm": (2, 3), "_fused_rms_norm": (2, None), "native_group_norm": (1, 2)}


class _Watcher(TorchDispatchMode):
    def __init__(self, model: nn.Module, normed_stream: bool = False) -> None:
        super().__init__()
        self.normed_stream = normed_stream
        self.trace = Trace()
        self.flows: Any = WeakTensorKeyDictionary()
        # Written in place (copies into an empty tensor): found by storage, which is kept alive so that its
        # address is not used again.
        self.by_storage: dict[int, tuple[Flow, Any]] = {}
        self.layer = -1
        self.chose = ""  # the operation that picked some of many by their scores, inside a layer
        for name, parameter in model.named_parameters():
            self.flows[parameter] = Flow(((name, 1.0),), weight=True)

    # -- flows of tensors -------------------------------------------------------------------------------------
    def flow(self, value: Any) -> Flow | None:
        if not isinstance(value, torch.Tensor) or (not value.dtype.is_floating_point and not value.dtype.is_complex):
            return None  # indices and masks select, they do not scale
        found = self.flows.get(value)
        if found is None and _storage(value) in self.by_storage:
            found = self.by_storage[_storage(value)][0]
        return found

    def set(self, value: Any, flow: Flow) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                self.flows[tensor] = flow

    # -- the rules ---------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        # Sizes that depend on data (masks of sparse attention): as if every mask were true everywhere.
        if name == "nonzero":
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        if name == "index":
            args = (args[0], [_all_true(i) for i in args[1]])
        out = func(*args, **kwargs)
        in_place = name.endswith("_") and not name.endswith("__")
        op = name[:-1] if in_place else name
        operands = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        known = [(a, f) for a in operands if (f := self.flow(a)) is not None]
        if not known or op in _FACTORIES:
            return out
        for _, flow in known:
            self.trace.used.update(flow.names)
        if op in ("topk", "argmax") and self.layer >= 0:
            self.chose = op
        if op in _LINEAR:
            flow = self.add(op, [f for _, f in known], scalar=_scalar(args))
        elif op in _PRODUCTS:
            flow = self.multiply(op, args)
        elif op in _NORMS:
            flow = self.normalize(op, args, known[0][1])
        elif op == "pow" and isinstance(args[1], (int, float)):
            flow = _power(known[0][1], float(args[1]), op)
        elif op in _ROOTS:
            flow = _power(known[0][1], _ROOTS[op], op)
        elif op == "linalg_vector_norm":
            flow = replace(known[0][1], stream=False, qk=None)
        elif op == "embedding":
            self.trace.embeddings.update(known[0][1].names)
            flow = Flow(known[0][1].degrees)
        else:
            if op == "_softmax":
                self.softmax([f for _, f in known])
            tags = frozenset().union(*(f.tags for _, f in known)) | {op}
            qk = known[0][1].qk if op in ("tanh", "maximum") else None  # a cap on attention logits
            flow = Flow(weight=all(f.weight for _, f in known) and len(known) == len(operands), tags=tags, qk=qk)
        if op in ("sum", "_softmax") and _over_one(args):
            flow = replace(flow, tags=flow.tags | {_OVER_ONE})
        self.set(out, flow)
        if in_place and not flow.weight:
            self.by_storage[_storage(args[0])] = (flow, args[0].untyped_storage())
        return out

    def add(self, op: str, flows: list[Flow], scalar: bool) -> Flow:
        tags = frozenset().union(*(f.tags for f in flows))
        if op in ("sum", "cumsum"):
            tags |= {op}
        stream = [f for f in flows if f.stream]
        if stream:
            if op not in ("add", "sub"):  # rearranging keeps the stream, joining it with something else does not
                plain = len(flows) == len(stream)
                return Flow(stream=plain, scaled=any(f.scaled for f in stream), tags=tags)
            for flow in flows:
                if not flow.stream:
                    homogeneous = bool(flow.degrees) and all(d == 1.0 for _, d in flow.degrees)
                    self.trace.branches.append(Branch(self.layer, flow.names, flow.inner, homogeneous))
            return Flow(stream=True, scaled=any(f.scaled for f in stream))
        weight = all(f.weight for f in flows)
        offset = weight and ((op == "add" and scalar) or any(f.offset for f in flows))
        qk = next((f.qk for f in flows if f.qk), None)
        inner = tuple(dict.fromkeys(name for f in flows for name in f.inner))
        degrees, upstream = _joint(flows)
        return Flow(degrees, upstream, weight=weight, offset=offset, inner=inner, tags=tags, qk=qk)

    def multiply(self, op: str, args: Any) -> Flow:
        bias = args[0] if op in ("addmm", "baddbmm", "addbmm") else (args[2] if op == "convolution" else None)
        left, right = (args[1], args[2]) if op in ("addmm", "baddbmm", "addbmm") else (args[0], args[1])
        a, b = self.flow(left), self.flow(right)
        if a is None or b is None:  # a product with a constant
            known = a or b or self.flow(bias) or Flow()
            if known.stream and op in ("mul", "div"):
                return Flow(stream=True, scaled=True, tags=known.tags)
            return replace(known, offset=False, stream=False)
        if a.weight and b.weight:
            return Flow(_merge(a.degrees, b.degrees, 1.0), weight=True, offset=a.offset or b.offset)
        if a.weight or b.weight:
            weight, act = (a, b) if a.weight else (b, a)
            contraction = op in _CONTRACTIONS
            if contraction:
                self.record_fans(op, weight, left, right, a.weight)
            elif not act.degrees and "rsqrt" in act.tags:
                self.trace.gains.update(weight.names)
                if weight.offset:
                    self.trace.offset_gains.update(weight.names)
            if not weight.degrees:  # a weight behind a nonlinearity (a gate, a decay): a constant for our purpose
                return replace(act, scaled=act.stream, qk=None)
            degrees = weight.degrees
            bias_flow = self.flow(bias)
            if bias_flow is not None and bias_flow.weight:
                degrees = _merge(degrees, bias_flow.degrees, 0.0)
            if contraction:
                return Flow(degrees, act.degrees, tags=frozenset(_FROM + name for name in weight.names))
            return Flow(degrees, act.degrees, stream=act.stream, scaled=act.stream, inner=act.inner, tags=act.tags)
        if a.stream != b.stream and op != "div":  # streams mixed by activations (hyper-connections)
            factor = b if a.stream else a
            normalizes = "rsqrt" in factor.tags
            if not factor.degrees and (not normalizes or self.normed_stream):
                return Flow(stream=True, scaled=True, tags=frozenset({"rsqrt"}) if normalizes else frozenset())
        tags, qk = a.tags | b.tags, None
        if op in _CONTRACTIONS and a.degrees and b.degrees:
            qk = (a.names, b.names, int(left.shape[-1]))
        if op == "div" or set(a.names) & set(b.names):  # a normalization (degrees cancel), or one weight makes q and k
            degrees = _merge(a.degrees, b.degrees, -1.0 if op == "div" else 1.0)
            return Flow(degrees, inner=a.inner + b.inner if degrees else a.names + a.inner, tags=tags, qk=qk)
        # Linear in each factor: either will do, and matrices come before scales.
        lead = max((a, b), key=lambda f: max((len(self.trace.shapes[n]) for n in f.names), default=0))
        return Flow(lead.degrees, lead.upstream, inner=lead.inner, tags=tags, qk=qk)

    def record_fans(self, op: str, weight: Flow, left: Any, right: Any, weight_left: bool) -> None:
        tensor = left if weight_left else right
        if op == "convolution":  # weight: (C_out, C_in / groups, *kernel)
            fans = (math.prod(tensor.shape[1:]), tensor.shape[0])
        elif weight_left:
            fans = (left.shape[-1], left.shape[-2])
        else:
            fans = (right.shape[-2], right.shape[-1]) if right.dim() > 1 else (right.shape[-1], 1)
        for name in weight.names:
            self.trace.fan_in.setdefault(name, int(fans[0]))
            self.trace.fan_out.setdefault(name, int(fans[1]))

    def normalize(self, op: str, args: Any, flow: Flow) -> Flow:
        gain_at, bias_at = _NORMS[op]
        gain = self.flow(args[gain_at]) if len(args) > gain_at else None
        bias = self.flow(args[bias_at]) if bias_at is not None and len(args) > bias_at else None
        if gain is None:
            return Flow(inner=flow.names + flow.inner, tags=flow.tags | {"rsqrt"})
        self.trace.gains.update(gain.names)
        if gain.offset:
            self.trace.offset_gains.update(gain.names)
        degrees = _merge(gain.degrees, bias.degrees if bias else (), 0.0)
        return Flow(degrees, inner=flow.names + flow.inner, tags=flow.tags)

    def softmax(self, flows: list[Flow]) -> None:
        for flow in flows:
            if flow.qk is not None:
                self.trace.attentions.append(Attention(self.layer, *flow.qk))
                return


def _all_true(index: torch.Tensor | None) -> torch.Tensor | None:
    masks = index is not None and index.dtype == torch.bool and index.dim() == 1
    return torch.arange(len(index), device=index.device) if masks and index is not None else index


def _over_one(args: Any) -> bool:
    """Whether `sum(x, dims)` or `_softmax(x, dim)` has nothing to sum over but one value."""
    dims = args[1] if len(args) > 1 and args[1] is not None else ()
    dims = (dims,) if isinstance(dims, int) else dims
    return bool(dims) and all(args[0].shape[dim] == 1 for dim in dims)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _scalar(args: Any) -> bool:
    return any(isinstance(a, (int, float)) and a != 0 for a in args[:2])


def _merge(
    a: Iterable[tuple[str, float]], b: Iterable[tuple[str, float]], sign: float
) -> tuple[tuple[str, float], ...]:
    """Degrees of a product (sign ±1) or of a sum (sign 0: joint homogeneity)."""
    merged = dict(a)
    for name, degree in b:
        merged[name] = degree if sign == 0.0 else merged.get(name, 0.0) + sign * degree
    return tuple((name, degree) for name, degree in merged.items() if degree)


def _joint(flows: list[Flow]) -> tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]:
    """(degrees, upstream) of a sum. Where one term is another one behind a further weight, the common origin."""
    if any(not f.degrees and not f.weight for f in flows):
        return (), ()
    origins = [f.degrees for f in flows]
    merged: dict[str, float] = {}
    for flow in flows:
        merged.update(flow.upstream if flow.upstream in origins else flow.degrees)
    upstream: dict[str, float] = {}
    for flow in flows:
        upstream.update(flow.upstream)
    return tuple(merged.items()), tuple(upstream.items())


def _power(flow: Flow, exponent: float, op: str) -> Flow:
    tag = {"rsqrt"} if exponent == -0.5 else {op}
    degrees = tuple((name, degree * exponent) for name, degree in flow.degrees)
    return Flow(degrees, weight=flow.weight, tags=flow.tags | tag)


@contextmanager
def _quiet() -> Iterator[None]:
    """Building a config's model again would repeat every warning the user has already seen."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def model_class_for(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The causal language model of a config, or its plain model where the family has none.

    Raises:
        StructureError: transformers maps this config to no model.
    """
    for auto in (AutoModelForCausalLM, AutoModel):
        found: Any = auto._model_mapping.get(type(config), None)
        if isinstance(found, type):
            return found
    raise StructureError(
        f"transformers maps {type(config).__name__} to no model: pass a model, or the config of its text part "
        "(`config.get_text_config()`)."
    )


def is_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches this module through its experts interface."""
    return all(hasattr(module, mark) for mark in EXPERTS_MARKS)


def find_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Name and members of the decoder stack: the outermost `ModuleList` that holds the experts modules.

    Without experts it is, of the outermost `ModuleList`s beside the embedding of the tokens, the largest.

    Raises:
        StructureError: no `ModuleList` of layers, or experts outside one common `ModuleList`.
    """
    experts = [name for name, module in model.named_modules() if is_experts(module)]
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if experts:
        holding = [s for s in stacks if all(e.startswith(s + ".") for e in experts)]
        if not holding:
            raise StructureError(
                f"the experts modules of {type(model).__name__} do not share one decoder stack (a `ModuleList`): "
                f"{experts}"
            )
    else:
        decoder = _text_decoder(model)
        holding = [s for s in stacks if s.startswith(decoder) and not any(s.startswith(t + ".") for t in stacks)]
        if not holding:
            raise StructureError(
                f"{type(model).__name__} has neither experts (modules that transformers decorates with "
                "`use_experts_implementation`) nor a decoder stack (a `ModuleList` of layers in the module that "
                "embeds the tokens)"
            )
        holding = [max(holding, key=lambda s: sum(p.numel() for p in model.get_submodule(s).parameters()))]
    name = min(holding, key=len)
    stack = model.get_submodule(name)
    assert isinstance(stack, nn.ModuleList)
    return name, list(stack)


def _text_decoder(model: nn.Module) -> str:
    """Prefix of the names in the innermost `PreTrainedModel` that embeds the tokens."""
    embedding: Any = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    holding = [
        name + "." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and any(m is embedding for m in module.modules())
    ]
    return max(holding, key=len, default="")


_recent: OrderedDict[tuple[type[PreTrainedModel], str, str], tuple[PreTrainedModel, Trace]] = OrderedDict()


def trace_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> tuple[PreTrainedModel, Trace]:
    """Builds `model_class(config)` without memory, runs a few tokens through it and reports what was seen.

    Returns the fake model (for its module tree) and the trace: the caller's own, the fake tensors aside.

    Raises:
        StructureError: the model has no decoder stack or no input embedding, or cannot be built or run on fake tensors.
    """
    model, trace = shared_trace(model_class, config)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors), trace.copy()


def shared_trace(model_class: type[PreTrainedModel], config: PretrainedConfig) -> tuple[PreTrainedModel, Trace]:
    """`trace_model` for the readers of this package, who change nothing: planning asks for the same two models several
    times, so the last few results are remembered."""
    key = (model_class, config.to_json_string(use_diff=False), repr(adapter_for(config)))
    if key not in _recent:
        _recent[key] = _trace_model(model_class, config)
        if len(_recent) > 6:
            _recent.popitem(last=False)
    return _recent[key]


def _trace_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> tuple[PreTrainedModel, Trace]:
    config = copy.deepcopy(config)
    inits = InitWatcher()
    with _quiet(), FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        with inits, _one_line(f"{model_class.__name__} could not be built on fake tensors"):
            model = model_class(config)
        model.eval()
        _check_embedding(model)
        _, layers = find_layers(model)
        watcher = _Watcher(model, adapter_for(config).normed_stream)
        trace = watcher.trace
        for name, parameter in model.named_parameters():
            trace.shapes[name] = tuple(parameter.shape)
            trace.laws[name] = inits.laws.get(parameter, InitLaw("special"))
        trace.laws |= {name: law for name, buffer in model.named_buffers() if (law := inits.laws.get(buffer))}
        _use_plain_implementations(model)
        handles = _hook(model, layers, watcher)
        purpose = f"{model_class.__name__} could not be run on fake tensors to find the roles of its parameters"
        with _one_line(purpose), torch.no_grad(), watcher:
            out = model(input_ids=torch.zeros(1, adapter_for(config).tokens, dtype=torch.long), use_cache=False)
        for handle in handles:
            handle.remove()
        if watcher.chose and not trace.routers:
            raise StructureError(
                f"{model_class.__name__} chooses by `{watcher.chose}` in its layers, as routers do, and has no experts "
                "module that transformers decorates with `use_experts_implementation`: it is neither read as dense nor "
                "as a mixture of experts"
            )
        if not trace.logits_from:
            last = watcher.flow(getattr(out, "last_hidden_state", None))
            trace.logits_from = last.names if last is not None else ()
    return model, trace


@contextmanager
def _one_line(doing: str) -> Iterator[None]:
    """What a model's own code raises, as a StructureError of one line."""
    try:
        yield
    except StructureError:
        raise
    except Exception as error:
        raise StructureError(f"{doing}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _check_embedding(model: PreTrainedModel) -> None:
    """The embedding tells the width and where the residual stream begins.

    Raises:
        StructureError: `get_input_embeddings` is missing, or its module has no weight.
    """
    try:
        found = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):  # of transformers' own lookup by usual names
        found = None
    if not isinstance(found, torch.Tensor):
        raise StructureError(
            f"{type(model).__name__} does not say which module embeds the tokens: define get_input_embeddings(self) "
            "in the class, returning its nn.Embedding"
        )


def _use_plain_implementations(model: nn.Module) -> None:
    """Attention with a softmax to see, and experts that run on fake tensors.

    Set where modules read it: transformers' setters do nothing for classes defined outside its own files.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config._attn_implementation_internal = "eager"
            config._experts_implementation_internal = "batched_mm"


def _hook(model: PreTrainedModel, layers: list[nn.Module], watcher: _Watcher) -> list[RemovableHandle]:
    trace = watcher.trace
    producers: dict[int, tuple[str, torch.Tensor]] = {}

    def enter_layer(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            watcher.layer = index
            hidden = args[0] if args else kwargs["hidden_states"]
            flow = watcher.flow(hidden)
            if flow is not None and flow.stream and flow.scaled:
                trace.plain_residual = False
            if index > 0 and (flow is None or not flow.stream):  # the layer before ends in a norm
                trace.plain_residual = False
            watcher.set(hidden, Flow(stream=True))

        return hook

    def produced(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                    producers.setdefault(_storage(tensor), (name, tensor))

        return hook

    def enter_experts(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            arguments = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
            index, weights = arguments["top_k_index"], arguments["top_k_weights"]
            flow = watcher.flow(weights)
            tags = flow.tags if flow is not None else frozenset()
            maker = producers.get(_storage(index))
            if maker is not None:
                router: str | None = maker[0]
            else:  # the block chooses experts itself: its router is the linear that the weights come from
                block = name.rpartition(".")[0] + "."
                linears = sorted(t.removeprefix(_FROM) for t in tags if t.startswith(_FROM + block))
                router = linears[0].rpartition(".")[0] if linears else None
            normalized = bool(tags & {"_softmax", "sum"})
            trace.routers.append(Router(name, router, int(index.shape[-1]), normalized, _OVER_ONE in tags))

        return hook

    handles = [
        layer.register_forward_pre_hook(enter_layer(index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    for name, module in model.named_modules():
        if is_experts(module):
            handles.append(module.register_forward_pre_hook(enter_experts(name), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(produced(name)))
    head = model.get_output_embeddings()
    if head is not None:

        def enter_head(module: nn.Module, args: Any) -> None:
            flow = watcher.flow(args[0])
            trace.logits_from = flow.names if flow is not None else ()

        handles.append(head.register_forward_pre_hook(enter_head))
    return handles
