"""What each operation of torch makes of the flows of its arguments: a table, operation → handler.

To teach a new operation, write a function of one `Call` that returns the flow of the result, under
`@operation("its name", …)`; `tests/structure/test_operations.py` shows how to try it on two tensors. An operation
without a handler is an error where its arguments carry something that matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate
from typing import Any

from moe_param.structure.flow import (
    Activation,
    Flow,
    Origin,
    Probabilities,
    Scores,
    Stream,
    Weight,
    activation_sum,
    joint,
    names,
    power,
    times,
)
from moe_param.structure.matrices import Piece
from moe_param.structure.observations import Attention, Branch, Choice, Trace


@dataclass(frozen=True)
class Call:
    """One operation, seen while the model runs.

    op: its name without the underscore of the in-place form. args, options: as torch dispatches them. known: the flows
    of those tensors among them that have one; at least one. flow: that of one argument. trace: where observations go.
    layer, module: the decoder layer (−1 before the first) and the innermost module that are running.
    """

    op: str
    args: tuple[Any, ...]
    known: tuple[Flow, ...]
    flow: Callable[[Any], Flow | None]
    trace: Trace
    layer: int = -1
    module: str = ""
    normed_stream: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def at(self, index: int) -> Flow | None:
        return self.flow(self.args[index]) if len(self.args) > index else None


Handler = Callable[[Call], Flow]
HANDLERS: dict[str, Handler] = {}


def operation(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class UnknownOperation(Exception):
    """An operation no handler is registered for, on arguments that carry something that matters."""


def result_of(call: Call) -> Flow:
    """The flow of an operation's result. The residual stream aside, it is of all parameters its arguments are of.

    Raises:
        UnknownOperation: no handler, and a parameter or the residual stream would be lost track of.
    """
    handler = HANDLERS.get(call.op, nonlinear)
    if call.op not in HANDLERS and any(f.degrees or isinstance(f, Stream) for f in call.known):
        raise UnknownOperation(
            f"the operation {call.op!r} in {call.module or 'the model'} is not known to moe_param, so what it does to "
            f"{', '.join(sorted({n for f in call.known for n in f.names})) or 'the residual stream'} cannot be told: "
            "add a handler to moe_param/structure/operations.py"
        )
    flow = handler(call)
    return flow if isinstance(flow, Stream) else replace(flow, of=frozenset().union(*(f.of for f in call.known)))


# -- sums and rearrangements -----------------------------------------------------------------------------------------
@operation(
    *("transpose", "t", "permute", "expand", "slice", "select", "split", "split_with_sizes", "unbind", "diagonal"),
    *("unsqueeze", "squeeze", "repeat", "roll", "flip", "unfold", "as_strided", "constant_pad_nd", "triu", "tril"),
    *("clone", "_to_copy", "alias", "detach", "view_as_complex", "view_as_real", "_conj", "neg", "abs", "sort"),
    *("index", "gather", "index_select", "masked_select", "mean", "native_dropout", "cat", "stack", "where"),
    *("index_add", "scatter_add", "scatter", "scatter_reduce", "masked_fill", "masked_scatter", "copy", "index_put"),
)
def combine(call: Call) -> Flow:
    """The result is a sum of the arguments, or one of them, possibly rearranged."""
    if len(call.known) == 1:
        _record_pieces(call, call.known[0])
        return call.known[0]
    weights = [f for f in call.known if isinstance(f, Weight)]
    if len(weights) == len(call.known):
        return Weight(joint(weights)[0], any(f.offset for f in weights))
    streams = [f for f in call.known if isinstance(f, Stream)]
    if not streams:
        return activation_sum(call.known)
    origin = reduce(Origin.__or__, (f.origin for f in call.known if isinstance(f, Activation)))
    if len(streams) < len(call.known):  # joined with something else
        return Activation(origin=origin)
    return Stream(origin=origin, scaled=any(f.scaled for f in streams))


def _record_pieces(call: Call, flow: Flow) -> None:
    """What a product with one weight is taken apart into, along what that weight makes."""
    if call.op not in ("split", "split_with_sizes", "slice") or not isinstance(flow, Activation):
        return
    made_by, tensor = flow.origin.weights, call.args[0]
    name = next(iter(made_by), "")
    if len(made_by) != 1 or flow.origin.passed - {"clamp"} or tensor.shape[-1] != call.trace.fan_out.get(name):
        return
    size = int(tensor.shape[-1])
    pieces: tuple[Piece, ...]
    if call.op == "slice":
        given: list[Any] = [*call.args[1:], *[0, 0, size, 1][len(call.args) - 1 :]]
        dim, step, stop = given[0], int(given[3]), size if given[2] is None else int(given[2])
        pieces = ((int(given[1] or 0) % size, min(stop, size), step),)
    else:
        dim = call.args[2] if len(call.args) > 2 else 0
        sizes = call.args[1]
        cuts = list(range(0, size, sizes)) if isinstance(sizes, int) else list(accumulate(sizes, initial=0))[:-1]
        pieces = tuple((cut, end, 1) for cut, end in zip(cuts, [*cuts[1:], size]))
    if dim % tensor.dim() == tensor.dim() - 1 and pieces != ((0, size, 1),):
        call.trace.pieces[name] = tuple(dict.fromkeys((*call.trace.pieces.get(name, ()), *pieces)))


@operation("view", "_unsafe_view")
def view(call: Call) -> Flow:
    """A matrix that is viewed as a stack of matrices may hold one per expert."""
    flow, sizes = call.known[0], call.args[1]
    if isinstance(flow, Weight) and call.args[0].dim() == 2 and len(sizes) == 3:
        rows, columns = call.args[0].shape
        call.trace.stacked.update(dict.fromkeys(flow.names, int(rows * columns // (sizes[1] * sizes[2]))))
    return combine(call)


@operation("add", "sub", "rsub")
def add(call: Call) -> Flow:
    """Additions to the residual stream are branches; a parameter plus 1 is an offset gain."""
    streams = [f for f in call.known if isinstance(f, Stream)]
    number = next((a for a in call.args[:2] if isinstance(a, (int, float))), 0.0)
    if abs(number) > _EPSILON and not streams:
        flow = call.known[0]
        gain = isinstance(flow, Weight) and not flow.offset and (call.op, number) == ("add", 1)
        return Weight(flow.degrees, offset=True) if gain else nonlinear(call)
    if not streams or call.op != "add":
        return combine(call)
    for flow in call.known:
        if not isinstance(flow, Stream):
            homogeneous = bool(flow.degrees) and all(degree == 1.0 for _, degree in flow.degrees)
            inner = flow.inner if isinstance(flow, Activation) else ()
            call.trace.branches.append(Branch(call.layer, flow.names, inner, homogeneous))
    return Stream(scaled=any(f.scaled for f in streams))


_EPSILON = 1e-2
"""Numbers up to this are added for numerical safety and change no degree."""


@operation("sum", "cumsum")
def total(call: Call) -> Flow:
    flow = combine(call)
    return flow.through(call.op, *_over_one(call)) if isinstance(flow, Activation) else flow


# -- products --------------------------------------------------------------------------------------------------------
@operation("mul")
def multiply(call: Call) -> Flow:
    a, b = call.at(0), call.at(1)
    if a is None or b is None:
        return _times_constant(call.known[0], call.args[1 if b is None else 0])
    if isinstance(a, Weight) and isinstance(b, Weight):
        return _weights(call, a, b)
    if isinstance(a, Weight) or isinstance(b, Weight):
        return _gain(call, *_weight_and_activation(a, b))
    return _mixed_stream(call, a, b) or _factors(call, a, b)


@operation("div")
def divide(call: Call) -> Flow:
    a, b = call.at(0), call.at(1)
    if b is None:
        by = call.args[1]
        return _times_constant(call.known[0], 1 / by if isinstance(by, (int, float)) and by else by)
    inverse = _power(b, -1.0, "reciprocal")
    if a is None:
        return inverse
    if isinstance(b, Weight):
        return multiply(replace(call, args=(a, inverse), flow=lambda flow: flow))
    assert isinstance(inverse, Activation)
    if isinstance(a, Weight):
        return Activation(times(a, inverse), inner=b.inner, origin=inverse.origin)
    call.trace.factors |= {a.origin, b.origin}
    return _factors(call, a, inverse)


@operation("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv", "convolution")
def contract(call: Call) -> Flow:
    """A sum over products. The first argument of addmm and its kin is a bias; a convolution's is its third."""
    biased = call.op in ("addmm", "baddbmm", "addbmm", "addmv")
    left, right = call.args[1:3] if biased else call.args[:2]
    bias = call.at(0) if biased else (call.at(2) if call.op == "convolution" else None)
    a, b = call.flow(left), call.flow(right)
    if a is None or b is None:
        found: Flow | None = a or b
        found = found.plain() if isinstance(found, Stream) else found
    elif isinstance(a, Weight) and isinstance(b, Weight):
        found = _weights(call, a, b)
    elif isinstance(a, Activation) and isinstance(b, Activation):
        found = _times_constant(_attention(call, a, b, int(left.shape[-1])), call.options.get("alpha", 1))
    else:
        weight, activation = _weight_and_activation(a, b)
        _record_product(call, weight, activation, _fans(call.op, left, right, isinstance(a, Weight)))
        found = _matrix(weight, activation)
    if bias is None or found is None:
        return call.known[0] if found is None else found
    return add(replace(call, op="add", args=(bias, found), known=(bias, found), flow=lambda flow: flow))


def _matrix(weight: Weight, activation: Activation) -> Activation:
    if not weight.degrees:  # a weight behind a nonlinearity (a gate, a decay): a constant for our purpose
        return activation.plain()
    upstream = () if weight.of & set(activation.names) else activation.degrees
    origin, of = Origin(frozenset(weight.names)), weight.of | activation.of
    return Activation(times(weight, activation), upstream, origin=origin, of=of)


def _weights(call: Call, a: Weight, b: Weight) -> Weight:
    """A product of weights."""
    degrees = times(*_best_first(call, a, b))
    return Weight(degrees, any(f.offset for f in (a, b) if set(f.names) & {name for name, _ in degrees}))


def _best_first(call: Call, a: Any, b: Any) -> tuple[Any, Any]:
    """Factors before divisors, matrices before scales."""

    def rank(flow: Flow) -> tuple[bool, int]:
        return _multiplies(flow), max((len(call.trace.shapes[n]) for n in flow.names), default=0)

    return (a, b) if rank(a) >= rank(b) else (b, a)


def _multiplies(flow: Flow) -> bool:
    return bool(flow.degrees) and flow.degrees[0][1] > 0


def _weight_and_activation(a: Flow, b: Flow) -> tuple[Weight, Activation]:
    if isinstance(a, Weight):
        assert isinstance(b, Activation)
        return a, b
    assert isinstance(b, Weight)
    return b, a


def _times_constant(flow: Flow, constant: Any) -> Flow:
    if isinstance(flow, Weight):
        return flow
    if isinstance(flow, Stream):
        return Stream(origin=flow.origin, scaled=True)
    return replace(flow, factor=flow.factor * constant) if isinstance(constant, (int, float)) else flow


def _gain(call: Call, weight: Weight, activation: Activation) -> Flow:
    """A weight times an activation, elementwise: the gain of a norm where the activation has just been normalized."""
    if activation.normalized:
        call.trace.gains.update(weight.names)
    if weight.offset:
        call.trace.offset_gains.update(weight.names)
    if isinstance(activation, Stream):
        return replace(activation, degrees=weight.degrees, scaled=True)
    if not _multiplies(weight):
        return replace(activation.plain(), degrees=times(activation, weight))
    return replace(activation.plain(), degrees=times(weight, activation), upstream=activation.degrees)


def _mixed_stream(call: Call, a: Activation, b: Activation) -> Stream | None:
    """Streams that are mixed by activations (hyper-connections) stay streams; one that is normalized does not, but
    where a family's residual is the normalized stream itself."""
    call.trace.factors |= {a.origin, b.origin}
    if isinstance(a, Stream) == isinstance(b, Stream):
        return None
    factor = b if isinstance(a, Stream) else a
    normalizes = "rsqrt" in factor.origin.passed
    if factor.degrees or (normalizes and not call.normed_stream):
        return None
    return Stream(origin=Origin(passed=frozenset({"rsqrt"} if normalizes else ())), scaled=True)


def _factors(call: Call, a: Activation, b: Activation) -> Activation:
    """Two activations, elementwise or summed over. In a normalization their degrees cancel."""
    lead, other = _best_first(call, a, b)
    degrees, origin = times(lead, other), a.origin | b.origin
    if not degrees or not set(a.names).isdisjoint(b.names):
        return Activation(degrees, inner=a.inner + b.inner if degrees else a.names + a.inner, origin=origin)
    if degrees != lead.degrees:
        lead, other = other, lead
    upstream = () if other.of & set(names(lead.upstream)) else lead.upstream
    return Activation(degrees, upstream, lead.inner, origin)


def _attention(call: Call, a: Activation, b: Activation, contracted: int) -> Activation:
    """Two activations, summed over: queries and keys, probabilities and values, or states of other mixers."""
    mixed = _mixed_stream(call, a, b)
    if mixed is not None:
        return mixed
    found = _factors(call, a, b)
    probabilities = next((f for f in (a, b) if isinstance(f, Probabilities)), None)
    if probabilities is not None:
        seen = call.trace.attentions[probabilities.attention]
        values = b if probabilities is a else a
        value = seen.value + (values.names or values.inner)
        call.trace.attentions[probabilities.attention] = replace(seen, value=value)
        return found
    scores = replace(found, factor=a.factor * b.factor)
    sources = (*a.inner, *b.inner, *sorted(found.origin.weights))
    return Scores(**vars(scores), query=a.names, key=b.names, sources=sources, head_dim=contracted)


def _record_product(call: Call, weight: Weight, activation: Activation, fans: tuple[int, int]) -> None:
    trace = call.trace
    for name in weight.names:
        trace.fan_in.setdefault(name, fans[0])
        trace.fan_out.setdefault(name, fans[1])
        trace.feeds[name] = trace.feeds.get(name, frozenset()) | activation.origin.weights


def _fans(op: str, left: Any, right: Any, weight_left: bool) -> tuple[int, int]:
    """(fan_in, fan_out) of the weight: the size summed over, and the size that comes out of it."""
    weight = left if weight_left else right
    if op == "convolution":  # (C_out, C_in / groups, *kernel)
        return math.prod(int(size) for size in weight.shape[1:]), int(weight.shape[0])
    if weight.dim() == 1:
        return int(weight.shape[-1]), 1
    sizes = (weight.shape[-1], weight.shape[-2]) if weight_left else (weight.shape[-2], weight.shape[-1])
    return int(sizes[0]), int(sizes[1])


# -- norms and powers ------------------------------------------------------------------------------------------------
_NORMS = {"native_layer_norm": (2, 3), "native_group_norm": (1, 2)}
"""Operation -> positions of gain and bias among its arguments."""


@operation(*_NORMS)
def norm(call: Call) -> Flow:
    flow = call.known[0]
    if isinstance(flow, Weight):
        return Weight()
    gain_at, bias_at = _NORMS[call.op]
    gain, bias = call.at(gain_at), call.at(bias_at)
    inner = flow.names + flow.inner
    if not isinstance(gain, Weight):
        return Activation(inner=inner, origin=flow.origin.through("rsqrt"))
    call.trace.gains.update(gain.names)
    if gain.offset:
        call.trace.offset_gains.update(gain.names)
    degrees, _ = joint([gain, bias] if isinstance(bias, Weight) else [gain])
    return Activation(degrees, inner=inner, origin=flow.origin)


@operation("pow")
def raised(call: Call) -> Flow:
    exponent = call.args[1]
    return _power(call.known[0], float(exponent), "pow") if isinstance(exponent, (int, float)) else nonlinear(call)


_POWERS = {"rsqrt": -0.5, "sqrt": 0.5, "reciprocal": -1.0, "var": 2.0, "std": 1.0, "linalg_vector_norm": 1.0}


@operation(*_POWERS)
def root(call: Call) -> Flow:
    return _power(call.known[0], _POWERS[call.op], call.op)


def _power(flow: Flow, exponent: float, op: str) -> Flow:
    """In `Origin.passed` every root, length and deviation is "sqrt", and what is divided by one "rsqrt"."""
    degrees = power(flow.degrees, exponent)
    if isinstance(flow, Weight):
        return replace(flow, degrees=degrees)
    rooted = exponent == 0.5 or op in ("std", "linalg_vector_norm")
    inverse = exponent == -0.5 or (exponent < 0 and "sqrt" in flow.origin.passed)
    return Activation(degrees, origin=flow.origin.through("rsqrt" if inverse else "sqrt" if rooted else op), of=flow.of)


# -- lookups, choices, softmax ---------------------------------------------------------------------------------------
@operation("embedding")
def embedding(call: Call) -> Flow:
    table = call.known[0]
    call.trace.embeddings.update(table.names)
    return Activation(table.degrees)


@operation("topk")
def topk(call: Call) -> Flow:
    _record_choice(call, call.args[2] if len(call.args) > 2 else -1, call.args[1])
    return combine(call)


@operation("max", "argmax")
def largest(call: Call) -> Flow:
    if len(call.args) > 1 and isinstance(call.args[1], int):
        _record_choice(call, call.args[1], 1)
    return nonlinear(call)


def _record_choice(call: Call, dim: int, count: int) -> None:
    flow = call.known[0]
    if isinstance(flow, Activation) and flow.origin.weights:
        among = int(call.args[0].shape[dim])
        call.trace.choices.append(Choice(call.layer, call.module, flow.origin.weights, among, int(count)))


@operation("_softmax", "_safe_softmax")
def softmax(call: Call) -> Flow:
    flow = nonlinear(call)
    if isinstance(flow, Weight):
        return flow
    flow = Activation(origin=flow.origin.through("_softmax", *_over_one(call)))
    scores = next((f for f in call.known if isinstance(f, Scores)), None)
    if scores is None:
        return flow
    seen = Attention(call.layer, call.module, scores.query, scores.key, scores.sources, scores.head_dim, scores.factor)
    call.trace.attentions.append(seen)
    return Probabilities(origin=flow.origin, attention=len(call.trace.attentions) - 1)


ONE = "over one"
"""Mark of a sum or a softmax over a single value: divided by it, or being it, a gate is 1."""


def _over_one(call: Call) -> tuple[str, ...]:
    """Whether `sum(x, dims)` or `_softmax(x, dim)` has nothing to sum over but one value."""
    dims = call.args[1] if len(call.args) > 1 and call.args[1] is not None else ()
    dims = (dims,) if isinstance(dims, int) else dims
    return (ONE,) if dims and all(call.args[0].shape[dim] == 1 for dim in dims) else ()


@operation("tanh", "maximum")
def cap(call: Call) -> Flow:
    """Scores that are capped are still scores."""
    scores = call.known[0]
    flow = nonlinear(call)
    return replace(scores, degrees=(), upstream=(), inner=()) if isinstance(scores, Scores) else flow


# -- nonlinearities --------------------------------------------------------------------------------------------------
@operation(
    *("silu", "gelu", "relu", "sigmoid", "softplus", "elu", "leaky_relu", "hardswish", "hardsigmoid", "mish"),
    *("hardtanh", "log_sigmoid_forward", "glu", "erf", "exp", "exp2", "expm1", "log", "log2", "log1p", "sin", "cos"),
    *("clamp", "clamp_min", "clamp_max", "minimum", "min", "amax", "amin", "cummax", "sign", "floor"),
    *("round", "ceil", "logsumexp", "_log_softmax", "logcumsumexp", "prod", "cumprod", "var_mean"),
    *("nan_to_num", "linalg_solve_triangular", "linalg_inv_ex", "polar", "bernoulli", "remainder", "threshold"),
)
def nonlinear(call: Call) -> Flow:
    """Ends homogeneity. Of weights alone, the result is still one: a decay, a learned temperature."""
    activations = [f for f in call.known if isinstance(f, Activation)]
    if not activations:
        return Weight()
    return Activation(origin=reduce(Origin.__or__, (f.origin for f in activations)).through(call.op))
