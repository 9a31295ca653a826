"""What one forward pass tells of a model: the facts that operations and module calls leave behind."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from moe_param.errors import MoeParamError
from moe_param.structure.flow import Origin
from moe_param.structure.laws import InitLaw
from moe_param.structure.matrices import Piece


class StructureError(MoeParamError):
    """The model cannot be read: a forward pass that does not run on fake tensors, no decoder stack, no router."""


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
    """One softmax attention: what its queries, keys and values are made of, and the contracted size (head_dim).

    module: the innermost module that was running. sources: the weights that queries and keys come from.
    scaling: the model's own factor on the products.
    """

    layer: int
    module: str
    query: tuple[str, ...]
    key: tuple[str, ...]
    sources: tuple[str, ...]
    head_dim: int
    scaling: float
    value: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A choice of the `count` largest of `among` values, where those come from the weights `weights`.

    module: the innermost module that was running.
    """

    layer: int
    module: str
    weights: frozenset[str]
    among: int
    count: int


@dataclass(frozen=True)
class Router:
    """What sends the tokens of one layer to experts.

    experts: the module that holds the experts. module: the one that chooses among them, which is around the experts
    where the block chooses itself. weights: those whose products it chooses by.
    num_experts, top_k: experts, and how many of them a token visits. among: candidates it chooses from, which are more
        where some compute nothing. size: hidden units of one expert.
    up, down: parameters of the experts whose products go on to other experts' weights, and those behind them.
    mixes: "mlp", or "attention" where its experts make queries and outputs.
    normalized: its gates pass a sum or a softmax, over whichever experts. constant: over the chosen expert alone, so
    that the gate is 1 whatever the router says.
    """

    experts: str
    module: str
    weights: frozenset[str]
    num_experts: int
    among: int
    top_k: int
    size: int
    up: tuple[str, ...]
    down: tuple[str, ...]
    normalized: bool
    constant: bool = False
    mixes: str = "mlp"


@dataclass
class Trace:
    """Everything one pass tells. Parameter names are those of `named_parameters()` (tied ones once).

    laws: of all parameters, and of the buffers that the model's construction writes in place (selection biases).
    used: what the pass computed with. pickers: modules that ask for the positions at which a mask is true.
    stacked: leading size of a 2-D weight that was viewed as a stack of matrices.
    feeds: weight -> the weights whose products, further on, went into a product with it.
    pieces: weight -> what its product is taken apart into before anything else happens to it.
    factors: where both sides of every product of two activations came from.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    laws: dict[str, InitLaw] = field(default_factory=dict)
    fan_in: dict[str, int] = field(default_factory=dict)
    fan_out: dict[str, int] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    gains: set[str] = field(default_factory=set)
    offset_gains: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    pickers: set[str] = field(default_factory=set)
    stacked: dict[str, int] = field(default_factory=dict)
    feeds: dict[str, frozenset[str]] = field(default_factory=dict)
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    factors: set[Origin] = field(default_factory=set)
    branches: list[Branch] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    routers: list[Router] = field(default_factory=list)
    logits_from: tuple[str, ...] = ()
    plain_residual: bool = True

    def copy(self) -> Trace:
        """One that can be changed without changing this one: what its containers hold is immutable."""
        return Trace(**{name: copy.copy(value) for name, value in vars(self).items()})
