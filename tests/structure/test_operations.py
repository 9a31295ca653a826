"""Every handler by itself, on two or three tensors: what it claims of the result is measured on real ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moe_param
from moe_param import StructureError
from moe_param.structure.flow import Activation, Flow, Stream
from moe_param.structure.operations import HANDLERS, Call, UnknownOperation, operation
from tests.structure.seen import is_homogeneous, seen


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Between 0.2 and 1.2, so that every root and logarithm of theirs exists."""
    return 0.2 + torch.rand(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)), dtype=torch.float64)


P = {
    "w": numbers(4, 3),
    "v": numbers(4, 3, seed=1),
    "m": numbers(3, 4),
    "s": numbers(3, 3),
    "b": numbers(4),
    "g": numbers(4, seed=2),
    "table": numbers(6, 3),
    "kernel": numbers(4, 3, 2),
    "each": numbers(2, 3, 4),
}
"""w, v: from 3 to 4; m: back. b, g: a bias and a gain of what they make. each: of two experts, 3 to 4, transposed."""
X = numbers(2, 5, 3, seed=3)
IDS = torch.tensor([[0, 5, 2], [1, 1, 3]])


def h(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p.w)


def k(p: Any, x: Tensor) -> Tensor:
    return F.linear(x, p.v)


def in_place(tensor: Tensor, name: str, *args: Any) -> Tensor:
    getattr(tensor, name)(*args)
    return tensor


def like(tensor: Tensor) -> Tensor:
    return torch.full(tensor.shape, 0.5, dtype=torch.float64)


ONES = torch.tensor([True, False, True, True])
AT = torch.tensor([1, 0])

W, WV = ({"w"}, 1), ({"w", "v"}, 1)
NONE: tuple[set[str], float] = (set(), 0)

CASES: dict[str, dict[str, tuple[Any, tuple[set[str], float]]]] = {
    # operation: {what: (lines, (parameters it is homogeneous in, degree))}
    # -- products with a matrix
    "mm": {
        "linear": (h, W),
        "the last of two": (lambda p, x: F.linear(F.gelu(h(p, x)), p.m), ({"m"}, 1)),
        "of two without a nonlinearity": (lambda p, x: F.linear(h(p, x), p.m), ({"m"}, 1)),
        "a weight twice, between them a nonlinearity": (lambda p, x: F.linear(F.silu(F.linear(x, p.s)), p.s), NONE),
        "a weight twice": (lambda p, x: F.linear(F.linear(x, p.s), p.s), ({"s"}, 2)),
        "of a product of weights": (lambda p, x: F.linear(x, p.m @ p.w), ({"m"}, 1)),
        "of a sum of weights": (lambda p, x: F.linear(x, p.w + p.v), WV),
        "of a weight behind a nonlinearity": (lambda p, x: F.linear(x, torch.exp(p.w)), NONE),
        "of a normalized weight": (lambda p, x: F.linear(x, p.w / p.w.norm(dim=1, keepdim=True)), NONE),
        "of a weight that is normalized by its deviation": (lambda p, x: F.linear(x, p.w / p.w.std()), NONE),
        "of a weight times its own nonlinearity": (lambda p, x: F.linear(x, p.w * torch.sigmoid(p.w)), NONE),
        "weight norm": (
            lambda p, x: F.linear(x, p.g[:, None] * (p.w / p.w.norm(dim=1, keepdim=True))),
            ({"g"}, 1),
        ),
    },
    "bmm": {
        "experts": (lambda p, x: torch.bmm(x, p.each), ({"each"}, 1)),
        "einsum": (lambda p, x: torch.einsum("btd,fd->btf", x, p.w), W),
        "two activations": (lambda p, x: h(p, x) @ F.linear(x, p.m.T).transpose(1, 2), W),
        "with what depends on the same weight": (lambda p, x: h(p, x) @ F.silu(h(p, x)).transpose(1, 2), NONE),
    },
    "mv": {"a vector": (lambda p, x: x[0] @ p.s[0], ({"s"}, 1))},
    "dot": {"two vectors": (lambda p, x: x[0, 0].dot(p.s[0]), ({"s"}, 1))},
    "addmm": {
        "with its bias": (lambda p, x: F.linear(x[0], p.w, p.b), ({"w", "b"}, 1)),
        "of a constant": (lambda p, x: F.linear(torch.ones(2, 3).double(), p.w, p.b), ({"w", "b"}, 1)),
        "onto an activation": (lambda p, x: torch.addmm(h(p, x)[0], x[0], p.v.T), WV),
        "onto one that depends on it otherwise": (lambda p, x: torch.addmm(F.silu(h(p, x))[0], x[0], p.w.T), NONE),
    },
    "addmv": {"with its bias": (lambda p, x: torch.addmv(p.b, p.w, x[0, 0]), ({"w", "b"}, 1))},
    "baddbmm": {"with its bias": (lambda p, x: torch.baddbmm(p.b, x, p.each), ({"each", "b"}, 1))},
    "addbmm": {"with its bias": (lambda p, x: torch.addbmm(p.b, x, p.each), ({"each", "b"}, 1))},
    "convolution": {
        "conv1d": (lambda p, x: F.conv1d(x.transpose(1, 2), p.kernel), ({"kernel"}, 1)),
        "with its bias": (lambda p, x: F.conv1d(x.transpose(1, 2), p.kernel, p.b), ({"kernel", "b"}, 1)),
    },
    # -- products
    "mul": {
        "of a branch and its gain": (lambda p, x: h(p, x) * p.g, ({"g"}, 1)),
        "of two branches": (lambda p, x: h(p, x) * k(p, x), W),
        "squared by hand": (lambda p, x: h(p, x) * h(p, x), ({"w"}, 2)),
        "by a constant": (lambda p, x: 3 * h(p, x) * torch.ones(4).double(), W),
        "by a gate": (lambda p, x: h(p, x) * torch.sigmoid(k(p, x)), W),
        "by its own gate": (lambda p, x: h(p, x) * torch.sigmoid(h(p, x)), NONE),
        "by a gate further on": (lambda p, x: h(p, x) * torch.sigmoid(F.linear(h(p, x), p.m) @ p.w.T), NONE),
        "by a gate behind a further matrix": (lambda p, x: x * torch.tanh(F.linear(h(p, x), p.m)), NONE),
        "modulated": (lambda p, x: k(p, x) * (1 + h(p, x)), ({"v"}, 1)),
        "of weights": (lambda p, x: p.b * p.s[0, 0], ({"s"}, 1)),
        "by its own gain": (lambda p, x: F.linear(x, p.s) * p.s[0], ({"s"}, 2)),
    },
    "div": {
        "by a number": (lambda p, x: h(p, x) / 3, W),
        "by a weight": (lambda p, x: h(p, x) / p.g, W),
        "by an activation": (lambda p, x: h(p, x) / k(p, x), W),
        "of a constant": (lambda p, x: torch.ones(4).double() / h(p, x), ({"w"}, -1)),
        "of a weight": (lambda p, x: p.g / h(p, x), ({"g"}, 1)),
        "by its own sum": (lambda p, x: h(p, x) / h(p, x).sum(-1, keepdim=True), NONE),
        "by a joint sum": (lambda p, x: (h(p, x) + k(p, x)) / h(p, x), NONE),
        "by what depends on it otherwise": (lambda p, x: h(p, x) / (1 + torch.exp(-h(p, x))), NONE),
    },
    # -- sums
    "add": {
        "of two branches": (lambda p, x: h(p, x) + k(p, x), WV),
        "of a branch and its own convolution": (lambda p, x: h(p, x) + F.linear(h(p, x), p.m) @ p.w.T, NONE),
        "of a branch and its further weight": (lambda p, x: F.linear(x, p.m.T) + F.linear(x, p.m.T) * p.g, ({"m"}, 1)),
        "of a branch and its own MLP": (lambda p, x: h(p, x) + F.linear(F.silu(F.linear(h(p, x), p.m)), p.v), NONE),
        "of a branch and what is of no parameter": (lambda p, x: h(p, x) + torch.tanh(k(p, x)), NONE),
        "of different degrees": (lambda p, x: h(p, x) + k(p, x) ** 2, NONE),
        "of one": (lambda p, x: h(p, x) + 1, NONE),
        "in place": (lambda p, x: in_place(h(p, x), "add_", k(p, x)), WV),
    },
    "sub": {
        "of two branches": (lambda p, x: h(p, x) - k(p, x), WV),
        "of one": (lambda p, x: h(p, x) - 1, NONE),
        "mean": (lambda p, x: h(p, x) - h(p, x).mean(-1, keepdim=True), W),
    },
    "rsub": {"from one": (lambda p, x: torch.rsub(h(p, x), 1), NONE)},
    "sum": {"over features": (lambda p, x: h(p, x).sum(-1), W)},
    "cumsum": {"over tokens": (lambda p, x: h(p, x).cumsum(1), W)},
    "mean": {"over features": (lambda p, x: h(p, x).mean(-1), W)},
    "cat": {
        "of two branches": (lambda p, x: torch.cat([h(p, x), k(p, x)]), WV),
        "of a branch and none": (lambda p, x: torch.cat([h(p, x), torch.tanh(k(p, x))]), NONE),
    },
    "stack": {"of two branches": (lambda p, x: torch.stack([h(p, x), k(p, x)]), WV)},
    "where": {"of two branches": (lambda p, x: torch.where(ONES, h(p, x), k(p, x)), WV)},
    "index_add": {"of two": (lambda p, x: torch.index_add(h(p, x), 0, AT, k(p, x)), WV)},
    "scatter_add": {
        "of two": (lambda p, x: torch.scatter_add(h(p, x)[0], 0, AT[:, None].expand(2, 4), k(p, x)[0]), WV)
    },
    "scatter_reduce": {
        "of two": (lambda p, x: h(p, x)[0].scatter_reduce(0, AT[:, None].expand(2, 4), k(p, x)[0], "sum"), WV)
    },
    "scatter": {"of two": (lambda p, x: h(p, x)[0].scatter(0, AT[:, None].expand(2, 4), k(p, x)[0]), WV)},
    "index_put": {"of two": (lambda p, x: h(p, x).index_put((AT,), k(p, x), accumulate=True), WV)},
    "masked_fill": {"with nothing": (lambda p, x: h(p, x).masked_fill(ONES, 0.0), W)},
    "masked_scatter": {
        "of two": (lambda p, x: h(p, x).masked_scatter(ONES.expand(2, 5, 4), k(p, x)), WV),
    },
    "copy": {
        "into a constant": (lambda p, x: in_place(torch.zeros(2, 5, 4).double(), "copy_", h(p, x)), W),
        "into a part of a constant": (lambda p, x: _assigned(torch.zeros(2, 5, 4).double(), h(p, x)), W),
        "into what is alike": (lambda p, x: in_place(torch.zeros_like(k(p, x)), "copy_", h(p, x)), W),
    },
    # -- rearrangements
    **{
        op: {"one branch": (lines, W)}
        for op, lines in {
            "transpose": lambda p, x: h(p, x).transpose(0, 1),
            "t": lambda p, x: h(p, x)[0].t(),
            "permute": lambda p, x: h(p, x).permute(2, 0, 1),
            "expand": lambda p, x: h(p, x)[:, None].expand(2, 3, 5, 4),
            "slice": lambda p, x: h(p, x)[:, 1:],
            "select": lambda p, x: h(p, x)[:, 1],
            "split": lambda p, x: h(p, x).split(2, -1)[1],
            "split_with_sizes": lambda p, x: h(p, x).split([1, 3], -1)[1],
            "unbind": lambda p, x: h(p, x).unbind(0)[1],
            "diagonal": lambda p, x: h(p, x).diagonal(dim1=1, dim2=2),
            "unsqueeze": lambda p, x: h(p, x)[:, None],
            "squeeze": lambda p, x: h(p, x)[:1].squeeze(0),
            "repeat": lambda p, x: h(p, x).repeat(2, 1, 1),
            "roll": lambda p, x: h(p, x).roll(1, 1),
            "flip": lambda p, x: h(p, x).flip(1),
            "unfold": lambda p, x: h(p, x).unfold(1, 2, 1),
            "as_strided": lambda p, x: h(p, x).as_strided((2, 4), (20, 1)),
            "constant_pad_nd": lambda p, x: F.pad(h(p, x), (0, 0, 1, 0)),
            "triu": lambda p, x: h(p, x).triu(),
            "tril": lambda p, x: h(p, x).tril(),
            "clone": lambda p, x: h(p, x).clone(),
            "_to_copy": lambda p, x: h(p, x).float().double() if h(p, x).dtype == torch.float32 else _cast(h(p, x)),
            "alias": lambda p, x: torch.ops.aten.alias(h(p, x)),
            "detach": lambda p, x: h(p, x).detach(),
            "view": lambda p, x: h(p, x).view(2, 5, 2, 2),
            "_unsafe_view": lambda p, x: x @ p.w.T,
            "view_as_complex": lambda p, x: torch.view_as_real(_turned(h(p, x))),
            "view_as_real": lambda p, x: torch.view_as_real(_turned(h(p, x))),
            "_conj": lambda p, x: torch.view_as_real(_turned(h(p, x)).conj() * 1.0),
            "neg": lambda p, x: -h(p, x),
            "abs": lambda p, x: h(p, x).abs(),
            "sort": lambda p, x: h(p, x).sort(-1)[0],
            "index": lambda p, x: h(p, x)[AT],
            "gather": lambda p, x: h(p, x)[0].gather(0, AT[:, None]),
            "index_select": lambda p, x: h(p, x).index_select(0, AT),
            "masked_select": lambda p, x: h(p, x).masked_select(torch.ones(2, 5, 4, dtype=torch.bool)),
            "native_dropout": lambda p, x: torch.native_dropout(h(p, x), 0.0, True)[0],
        }.items()
    },
    # -- powers and norms
    "pow": {
        "square": (lambda p, x: h(p, x) ** 2, ({"w"}, 2)),
        "of an activation": (lambda p, x: h(p, x) ** k(p, x), NONE),
        "of a number": (lambda p, x: 2.0 ** h(p, x), NONE),
    },
    "sqrt": {
        "root": (lambda p, x: h(p, x).sqrt(), ({"w"}, 0.5)),
        "of a square": (lambda p, x: (h(p, x) ** 2).sqrt(), W),
    },
    "rsqrt": {
        "inverse": (lambda p, x: h(p, x).rsqrt(), ({"w"}, -0.5)),
        "of a mean square": (lambda p, x: h(p, x) * h(p, x).pow(2).mean(-1, keepdim=True).rsqrt(), NONE),
    },
    "reciprocal": {"inverse": (lambda p, x: h(p, x).reciprocal(), ({"w"}, -1))},
    "var": {"square": (lambda p, x: h(p, x).var(-1), ({"w"}, 2))},
    "std": {"deviation": (lambda p, x: h(p, x).std(-1), W), "by it": (lambda p, x: h(p, x) / h(p, x).std(), NONE)},
    "linalg_vector_norm": {
        "length": (lambda p, x: h(p, x).norm(dim=-1), W),
        "by it": (lambda p, x: F.normalize(h(p, x), dim=-1), NONE),
    },
    "native_layer_norm": {
        "gain and bias": (lambda p, x: F.layer_norm(h(p, x), (4,), p.g, p.b), ({"g", "b"}, 1)),
        "gain": (lambda p, x: F.layer_norm(h(p, x), (4,), p.g), ({"g"}, 1)),
        "neither": (lambda p, x: F.layer_norm(h(p, x), (4,)), NONE),
    },
    "native_group_norm": {
        "gain and bias": (lambda p, x: F.group_norm(h(p, x).transpose(1, 2), 2, p.g, p.b), ({"g", "b"}, 1)),
        "neither": (lambda p, x: F.group_norm(h(p, x).transpose(1, 2), 2), NONE),
    },
    # -- lookups and choices
    "embedding": {"rows": (lambda p, x: F.embedding(IDS, p.table), ({"table"}, 1))},
    "topk": {"values": (lambda p, x: h(p, x).topk(2)[0], W)},
    "max": {"over experts": (lambda p, x: h(p, x).max(-1)[0], NONE)},
    "argmax": {"over experts": (lambda p, x: h(p, x).argmax(-1), NONE)},
    # -- nonlinearities
    **{
        op: {"ends it": (lines, NONE)}
        for op, lines in {
            "silu": lambda p, x: F.silu(h(p, x)),
            "gelu": lambda p, x: F.gelu(h(p, x)),
            "relu": lambda p, x: F.relu(h(p, x)),
            "sigmoid": lambda p, x: torch.sigmoid(h(p, x)),
            "softplus": lambda p, x: F.softplus(h(p, x)),
            "elu": lambda p, x: F.elu(h(p, x) - 0.5),
            "leaky_relu": lambda p, x: F.leaky_relu(h(p, x)),
            "hardswish": lambda p, x: F.hardswish(h(p, x)),
            "hardsigmoid": lambda p, x: F.hardsigmoid(h(p, x)),
            "mish": lambda p, x: F.mish(h(p, x)),
            "hardtanh": lambda p, x: F.hardtanh(h(p, x)),
            "log_sigmoid_forward": lambda p, x: F.logsigmoid(h(p, x)),
            "glu": lambda p, x: F.glu(h(p, x)),
            "erf": lambda p, x: torch.erf(h(p, x)),
            "exp": lambda p, x: torch.exp(h(p, x)),
            "exp2": lambda p, x: torch.exp2(h(p, x)),
            "expm1": lambda p, x: torch.expm1(h(p, x)),
            "log": lambda p, x: torch.log(h(p, x)),
            "log2": lambda p, x: torch.log2(h(p, x)),
            "log1p": lambda p, x: torch.log1p(h(p, x)),
            "sin": lambda p, x: torch.sin(h(p, x)),
            "cos": lambda p, x: torch.cos(h(p, x)),
            "tanh": lambda p, x: torch.tanh(h(p, x)),
            "maximum": lambda p, x: torch.maximum(h(p, x), k(p, x).tanh()),
            "minimum": lambda p, x: torch.minimum(h(p, x), k(p, x).tanh()),
            "clamp": lambda p, x: h(p, x).clamp(-1, 1),
            "clamp_min": lambda p, x: h(p, x).clamp_min(1.0),
            "clamp_max": lambda p, x: h(p, x).clamp_max(1.0),
            "threshold": lambda p, x: F.threshold(h(p, x), 0.5, 1.0),
            "min": lambda p, x: h(p, x).min(-1)[0],
            "amax": lambda p, x: h(p, x).amax(-1),
            "amin": lambda p, x: h(p, x).amin(-1),
            "cummax": lambda p, x: h(p, x).cummax(1)[0],
            "sign": lambda p, x: h(p, x).sign(),
            "floor": lambda p, x: h(p, x).floor(),
            "round": lambda p, x: h(p, x).round(),
            "ceil": lambda p, x: h(p, x).ceil(),
            "logsumexp": lambda p, x: h(p, x).logsumexp(-1),
            "logcumsumexp": lambda p, x: h(p, x).logcumsumexp(-1),
            "_softmax": lambda p, x: F.softmax(h(p, x), -1),
            "_log_softmax": lambda p, x: F.log_softmax(h(p, x), -1),
            "_safe_softmax": lambda p, x: torch.ops.aten._safe_softmax(h(p, x), -1),
            "prod": lambda p, x: h(p, x).prod(-1),
            "cumprod": lambda p, x: h(p, x).cumprod(-1),
            "var_mean": lambda p, x: torch.var_mean(h(p, x), -1)[0],
            "nan_to_num": lambda p, x: h(p, x).nan_to_num(),
            "linalg_solve_triangular": lambda p, x: torch.linalg.solve_triangular(
                _square(h(p, x)), x[:, :4], upper=True
            ),
            "linalg_inv_ex": lambda p, x: torch.linalg.inv(_square(h(p, x))),
            "polar": lambda p, x: torch.view_as_real(torch.polar(h(p, x), h(p, x))),
            "bernoulli": lambda p, x: torch.bernoulli(h(p, x) * 0),
            "remainder": lambda p, x: h(p, x).remainder(0.3),
        }.items()
    },
}
"""Every operation of the table by itself."""

POSITIVELY = {"relu", "leaky_relu", "max", "min", "amax", "amin", "cummax", "sign", "nan_to_num", "prod", "cumprod"}
POSITIVELY |= {"var_mean", "argmax", "linalg_inv_ex", "linalg_solve_triangular", "bernoulli"}
"""Homogeneous at positive factors, or choices: that nothing is claimed of them is caution."""


def _assigned(constant: Tensor, value: Tensor) -> Tensor:
    constant[:, :] = value
    return constant


def _cast(value: Tensor) -> Tensor:
    return value.to(torch.float16).to(value.dtype) if value.dtype == torch.float32 else value.to(torch.complex128).real


def _turned(value: Tensor) -> Tensor:
    """As rotary embeddings turn queries."""
    return torch.view_as_complex(value.unflatten(-1, (2, 2)).contiguous()) * torch.polar(*torch.ones(2, 2).double())


def _square(value: Tensor) -> Tensor:
    return value[:, :4] + 5.0 * torch.eye(4, dtype=value.dtype)


EACH = [(op, what) for op, cases in CASES.items() for what in cases]


@pytest.mark.parametrize("op, what", EACH, ids=[f"{op}: {what}" for op, what in EACH])
def test_what_is_claimed_of_a_result_is_so(op: str, what: str) -> None:
    lines, (names, degree) = CASES[op][what]
    found = seen(lines, P, X)
    assert op in found.ops, found.ops
    claimed = dict(found.flow.degrees) if found.flow is not None else {}
    assert claimed == dict.fromkeys(names, degree)
    if names:
        assert is_homogeneous(lines, P, names, degree, X)
        assert not is_homogeneous(lines, P, names, degree + 1, X)
    elif op not in POSITIVELY:
        singles = [{name} for name in found.trace.used]
        for one in (*singles, set(found.trace.used)):
            for d in (1.0, 2.0):
                assert not is_homogeneous(lines, P, one, d, X), one


def test_every_operation_of_the_table_is_tested_by_itself() -> None:
    assert set(HANDLERS) == set(CASES)


# -- what a tensor means ---------------------------------------------------------------------------------------------
HEADS = {"q": numbers(3, 3), "k": numbers(3, 3, seed=1), "v": numbers(3, 3, seed=2), "o": numbers(3, 3, seed=3)}


def attend(p: Any, x: Tensor, *, factor: float = 0.5, cap: float | None = None) -> Tensor:
    scores = F.linear(x, p.q) @ F.linear(x, p.k).transpose(1, 2) * factor
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    return F.linear(F.softmax(scores, -1) @ F.linear(x, p.v), p.o)


@pytest.mark.parametrize("cap", [None, 30.0])
def test_attention_is_a_softmax_of_products_times_values(cap: float | None) -> None:
    found = seen(lambda p, x: attend(p, x, cap=cap), HEADS, X)
    (attention,) = found.trace.attentions
    assert (attention.query, attention.key, attention.value) == (("q",), ("k",), ("v",))
    assert attention.head_dim == 3
    assert attention.scaling == 0.5
    assert found.trace.fan_in == dict.fromkeys("qkvo", 3)


def test_the_factor_of_scores_wherever_it_is_written() -> None:
    def fused(p: Any, x: Tensor) -> Tensor:
        queries, keys = F.linear(x, p.q), F.linear(x, p.k).transpose(1, 2)
        scores = torch.baddbmm(torch.zeros(5, 5).double(), queries, keys, alpha=0.5)
        return F.softmax(scores, -1) @ F.linear(x, p.v)

    def on_queries(p: Any, x: Tensor) -> Tensor:
        return F.softmax((F.linear(x, p.q) / 2) @ F.linear(x, p.k).transpose(1, 2), -1) @ F.linear(x, p.v)

    def of_torch(p: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(F.linear(x, p.q), F.linear(x, p.k), F.linear(x, p.v), scale=0.5)

    for lines in (fused, on_queries, of_torch):
        (attention,) = seen(lines, HEADS, X).trace.attentions
        assert attention.scaling == pytest.approx(0.5)
        assert (attention.query, attention.key, attention.value) == (("q",), ("k",), ("v",))


def test_a_product_of_activations_without_a_softmax_is_no_attention() -> None:
    found = seen(lambda p, x: F.linear(x, p.q) @ F.linear(x, p.k).transpose(1, 2) @ F.linear(x, p.v), HEADS, X)
    assert not found.trace.attentions
    plain = seen(lambda p, x: F.softmax(F.linear(x, p.q), -1) * F.linear(x, p.v), HEADS, X)
    assert not plain.trace.attentions


def test_masks_and_sinks_leave_scores_what_they_are() -> None:
    def lines(p: Any, x: Tensor) -> Tensor:
        scores = F.linear(x, p.q) @ F.linear(x, p.k).transpose(1, 2)
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
        scores = torch.cat([scores, p.sink.expand(2, 5, 1)], -1)
        return F.softmax(scores, -1)[..., :-1] @ F.linear(x, p.v)

    (attention,) = seen(lines, {**HEADS, "sink": numbers(1)}, X).trace.attentions
    assert (attention.query, attention.key) == (("q",), ("k",))


# -- the residual stream ---------------------------------------------------------------------------------------------
def added(lines: Any, **parameters: Tensor) -> Any:
    return seen(lines, {**P, **parameters}, X, start=Stream())


def test_what_is_added_to_the_stream_is_a_branch_of_its_last_weight() -> None:
    found = added(lambda p, x: x + F.linear(F.silu(h(p, x)), p.m))
    (branch,) = found.trace.branches
    assert (branch.closers, branch.homogeneous, branch.inner) == (("m",), True, ())
    assert found.flow == Stream()


@pytest.mark.parametrize(
    "lines, closers",
    [
        (lambda p, x: x + torch.tanh(F.linear(h(p, x), p.m)), ()),
        (lambda p, x: x + F.linear(h(p, x), p.m) ** 2, ("m",)),
        (lambda p, x: x + F.normalize(F.linear(h(p, x), p.m), dim=-1), ()),
    ],
)
def test_branches_that_no_weight_scales(lines: Any, closers: tuple[str, ...]) -> None:
    (branch,) = added(lines).trace.branches
    assert (branch.closers, branch.homogeneous) == (closers, False)


def rms(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True) + 1e-6


NORMS = {
    "times an inverse root": lambda x: x * torch.rsqrt(rms(x)),
    "divided by a root": lambda x: x / torch.sqrt(rms(x)),
    "to the power -1/2": lambda x: x * rms(x) ** -0.5,
    "divided by a length": lambda x: x / x.norm(dim=-1, keepdim=True),
    "F.normalize": lambda x: F.normalize(x, dim=-1),
    "centered, by a deviation": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6),
    "centered, by a variance": lambda x: (
        (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6)
    ),
    "F.rms_norm": lambda x: F.rms_norm(x, (3,)),
    "F.layer_norm": lambda x: F.layer_norm(x, (3,)),
}
"""A norm, as people write it."""


@pytest.mark.parametrize("how", NORMS)
def test_gains_however_the_norm_is_written(how: str) -> None:
    norm, gain = NORMS[how], numbers(3, seed=5)
    of_stream = added(lambda p, x: norm(x) * p.gain, gain=gain)
    assert of_stream.trace.gains == {"gain"}
    assert not of_stream.trace.offset_gains
    assert not isinstance(of_stream.flow, Stream)
    assert dict(of_stream.flow.degrees) == {"gain": 1}
    behind = added(lambda p, x: x + norm(F.linear(h(p, x), p.m)) * (1 + p.gain), gain=gain)
    (branch,) = behind.trace.branches
    assert (branch.closers, branch.inner, branch.homogeneous) == (("gain",), ("m",), True)
    assert behind.trace.gains == behind.trace.offset_gains == {"gain"}

    def lines(p: Any, x: Tensor) -> Tensor:
        return norm(F.linear(h(p, x), p.m)) * (1 + p.gain)

    assert is_homogeneous(lines, {**P, "gain": gain}, {"gain"}, 1.0, X, offset=True)
    assert not is_homogeneous(lines, {**P, "gain": gain}, {"gain"}, 1.0, X)


def test_a_scale_without_a_norm_in_front_of_it_is_no_gain() -> None:
    found = added(lambda p, x: x + F.linear(h(p, x), p.m) * p.s[0])
    assert not found.trace.gains
    assert found.trace.branches[0].closers == ("s",)
    shifted = added(lambda p, x: x + F.linear(h(p, x), p.m) * (1 + p.s[0]))
    assert not shifted.trace.gains
    assert shifted.trace.offset_gains == {"s"}


@pytest.mark.parametrize("shift", [lambda w: w + 0.5, lambda w: 1 - w, lambda w: w + 2, lambda w: 1 + (1 + w)])
def test_only_one_plus_a_weight_is_an_offset_gain(shift: Any) -> None:
    found = added(lambda p, x: x + F.linear(h(p, x), p.m) * shift(p.s[0]))
    assert not found.trace.offset_gains
    (branch,) = found.trace.branches
    assert branch.closers == ("m",)


def test_the_stream_stays_one_through_views_and_says_where_it_was_scaled() -> None:
    still = added(lambda p, x: x.transpose(0, 1).reshape(10, 3).view(5, 2, 3)[:, 1:].clone())
    assert still.flow == Stream()
    assert added(lambda p, x: 0.5 * x).flow.scaled
    assert added(lambda p, x: x * p.s[0] + h(p, x) @ p.m.T).flow.scaled
    assert not isinstance(added(lambda p, x: torch.tanh(x)).flow, Stream)
    assert not isinstance(added(lambda p, x: torch.cat([x, x @ p.s])).flow, Stream)
    assert not isinstance(added(lambda p, x: x @ torch.ones(3, 3).double()).flow, Stream)


def test_streams_that_gates_mix_stay_streams_and_normalized_ones_do_not() -> None:
    mixed = added(lambda p, x: torch.softmax(x @ p.s, -1) @ torch.ones(3, 3).double() * x)
    assert isinstance(mixed.flow, Stream)
    assert mixed.flow.scaled
    assert not isinstance(added(lambda p, x: NORMS["divided by a root"](x)).flow, Stream)


# -- what matrices say -----------------------------------------------------------------------------------------------
def test_the_sizes_a_matrix_sums_over_and_makes() -> None:
    def lines(p: Any, x: Tensor) -> Tensor:
        up = F.linear(x, p.w)
        across = torch.bmm(up.transpose(0, 1)[:2], p.each.transpose(1, 2))
        return across, F.conv1d(x.transpose(1, 2), p.kernel), F.conv1d(up.transpose(1, 2), p.alone, groups=4)

    found = seen(lines, {**P, "alone": numbers(4, 1, 2)}, X).trace
    assert {n: (found.fan_in[n], found.fan_out[n]) for n in ("w", "each", "kernel", "alone")} == {
        "w": (3, 4),
        "each": (4, 3),
        "kernel": (6, 4),  # 3 channels of 2 taps
        "alone": (2, 4),
    }


def test_a_matrix_is_fed_by_the_last_ones_before_it_through_nonlinearities() -> None:
    found = added(lambda p, x: F.linear(F.silu(h(p, x)) * k(p, x), p.m)).trace
    assert found.feeds == {"w": frozenset(), "v": frozenset(), "m": frozenset({"w", "v"})}


def test_a_matrix_that_is_viewed_as_a_stack_of_matrices() -> None:
    found = seen(lambda p, x: torch.bmm(x, p.flat.view(2, 3, 4)), {"flat": numbers(6, 4)}, X).trace
    assert found.stacked == {"flat": 2}
    assert not seen(lambda p, x: x @ p.flat.view(3, 4), {"flat": numbers(6, 2)}, X).trace.stacked


@pytest.mark.parametrize(
    "choose",
    [
        lambda r: r.topk(2, dim=-1),
        lambda r: F.softmax(r, -1).topk(2)[1],
        lambda r: torch.sigmoid(r + torch.ones(4).double()).topk(2, -1),
    ],
)
def test_a_choice_among_products_says_whose(choose: Any) -> None:
    (choice,) = added(lambda p, x: choose(h(p, x))).trace.choices
    assert (choice.weights, choice.among, choice.count) == (frozenset({"w"}), 4, 2)


def test_the_largest_along_a_dimension_is_a_choice_and_that_of_everything_none() -> None:
    (choice,) = added(lambda p, x: h(p, x).argmax(-1)).trace.choices
    assert (choice.among, choice.count) == (4, 1)
    assert not added(lambda p, x: h(p, x).max()).trace.choices
    assert not added(lambda p, x: x.topk(2)).trace.choices, "of no matrix's products"


@pytest.mark.parametrize("over, marked", [(lambda g: g.sum(-1, keepdim=True), {"sum"}), (lambda g: 2.0, set())])
def test_gates_say_what_normalized_them(over: Any, marked: set[str]) -> None:
    def lines(p: Any, x: Tensor) -> Tensor:
        gates = torch.sigmoid(h(p, x)).topk(2)[0]
        return gates / over(gates)

    assert added(lines).flow.origin.passed - {"sigmoid", "reciprocal"} == marked


def test_embeddings_are_seen() -> None:
    found = seen(lambda p, x: F.embedding(IDS, p.table), P, X)
    assert found.trace.embeddings == {"table"}
    assert isinstance(found.flow, Activation)


def test_what_has_no_flow() -> None:
    assert seen(lambda p, x: x.argmax(-1), P, X).flow is None
    assert seen(lambda p, x: torch.zeros_like(h(p, x)), P, X).flow is None
    assert seen(lambda p, x: torch.arange(3.0), P, X).flow is None
    assert seen(lambda p, x: h(p, x) > 0, P, X).flow is None


# -- operations nobody has taught ------------------------------------------------------------------------------------
def test_an_unknown_operation_is_an_error_only_where_something_would_be_lost() -> None:
    with pytest.raises(UnknownOperation, match=r"'special_bessel_j0' in the model .* what it does to w cannot be told"):
        seen(lambda p, x: torch.special.bessel_j0(h(p, x)), P, X)
    with pytest.raises(UnknownOperation, match=r"what it does to the residual stream cannot be told"):
        added(lambda p, x: torch.special.bessel_j0(x))
    passed = seen(lambda p, x: torch.special.bessel_j0(F.silu(h(p, x))), P, X)
    assert passed.flow.degrees == ()
    assert passed.flow.origin.weights == {"w"}


class Bessel(LlamaForCausalLM):
    """A llama with a Bessel function in its MLP, in front of its last matrix or behind its activation function."""

    in_front = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            act = layer.mlp.act_fn
            layer.mlp.act_fn = _Bessel() if self.in_front else nn.Sequential(act, _Bessel())


class BesselBehind(Bessel):
    in_front = False


class _Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_a_users_model_with_an_unknown_operation() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    with pytest.raises(StructureError) as error:
        moe_param.plan(Bessel, config, config)
    for part in (
        "Bessel could not be run on fake tensors",
        "'special_bessel_j0' in model.layers.0.mlp.act_fn",
        "model.layers.0.mlp.gate_proj.weight",
        "add a handler to moe_param/structure/operations.py",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    moe_param.plan(BesselBehind, config, config)


@pytest.fixture
def newcomer() -> Iterator[None]:
    """All it takes to teach an operation."""

    @operation("special_bessel_j0")
    def bessel(call: Call) -> Flow:
        return HANDLERS["silu"](call)

    yield
    del HANDLERS["special_bessel_j0"]


def test_a_newcomer_teaches_an_operation(newcomer: None) -> None:
    assert seen(lambda p, x: torch.special.bessel_j0(h(p, x)), P, X).flow.degrees == ()


# -- the table itself ------------------------------------------------------------------------------------------------
def reaches_the_table(name: str) -> bool:
    """Whether torch dispatches some form of an operation as it is, instead of taking it apart before."""
    for op in (getattr(torch.ops.aten, n, None) for n in (name, name + "_")):
        for overload in op.overloads() if op is not None else ():
            schema = getattr(op, overload)._schema
            full = f"{schema.name}.{schema.overload_name}".rstrip(".")
            try:
                if not torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd"):
                    return True
            except RuntimeError:  # of TorchScript alone
                continue
    return False


@pytest.mark.parametrize("name", HANDLERS)
def test_names_of_the_table_are_operations_that_torch_dispatches(name: str) -> None:
    assert reaches_the_table(name)


def test_typos_and_what_torch_takes_apart_would_be_found() -> None:
    assert not reaches_the_table("tranpose")
    assert not reaches_the_table("reshape")
    assert not reaches_the_table("chunk")
