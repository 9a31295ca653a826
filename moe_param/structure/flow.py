"""What a tensor of the forward pass is made of: one of a few named things, each a small frozen class with its algebra.

A tensor is a `Weight` (computed from parameters alone), an `Activation` (it depends on the tokens), or one of the
activations that mean something: the residual `Stream`, attention `Scores`, attention `Probabilities`. What depends on
neither parameters nor tokens (masks, positions, indices) is a constant and has no flow: it is None.

The idea behind all of it is homogeneity. A tensor is homogeneous of degree d in a parameter when it is scaled by c**d
as the parameter is scaled by c, and that is what it takes to fold a forward multiplier into that parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

Degrees = tuple[tuple[str, float], ...]
"""(name of a parameter, degree): scaled by c together, they scale a tensor by c**degree. The degree is that of all."""


def power(a: Degrees, exponent: float) -> Degrees:
    return tuple((name, degree * exponent) for name, degree in a)


def names(degrees: Degrees) -> tuple[str, ...]:
    return tuple(name for name, _ in degrees)


@dataclass(frozen=True)
class Origin:
    """Where values come from, through nonlinearities too, which end degrees.

    weights: of the last product with a matrix. passed: operations since then ("rsqrt" for every inverse root).
    """

    weights: frozenset[str] = frozenset()
    passed: frozenset[str] = frozenset()

    def __or__(self, other: Origin) -> Origin:
        return Origin(self.weights | other.weights, self.passed | other.passed)

    def through(self, *operations: str) -> Origin:
        return Origin(self.weights, self.passed.union(operations))


@dataclass(frozen=True)
class Weight:
    """Computed from parameters alone.

    offset: a gain of the form 1 + w, whose degree is in 1 + w. of: all parameters it is computed from.
    """

    degrees: Degrees = ()
    offset: bool = False
    of: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        return names(self.degrees)


@dataclass(frozen=True)
class Activation:
    """Depends on the tokens.

    degrees: empty where it is homogeneous in no parameter: behind a nonlinearity or a normalization.
    upstream: degrees one weight earlier: an equally good answer, needed where a branch and its own convolution are
        added up.
    inner: the parameters it was homogeneous in before it was normalized.
    factor: the numbers it was multiplied by since the last product with a weight.
    of: all parameters that it was computed from since the residual stream.
    """

    degrees: Degrees = ()
    upstream: Degrees = ()
    inner: tuple[str, ...] = ()
    origin: Origin = Origin()
    factor: float = 1.0
    of: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        return names(self.degrees)

    @property
    def normalized(self) -> bool:
        """Divided by a root of its own square: what multiplies it now is the gain of a norm."""
        return not self.degrees and "rsqrt" in self.origin.passed

    def plain(self) -> Activation:
        """The same tensor without its meaning: what is left of a stream or of scores after a further operation."""
        return Activation(self.degrees, self.upstream, self.inner, self.origin, self.factor, self.of)

    def through(self, *operations: str) -> Activation:
        return replace(self, origin=self.origin.through(*operations))


@dataclass(frozen=True)
class Stream(Activation):
    """The residual stream. scaled: it was multiplied on its way, so the residual is not a plain identity."""

    scaled: bool = False


@dataclass(frozen=True)
class Scores(Activation):
    """Queries times keys: the parameters that scale each, and the contracted size (head_dim).

    sources: the weights that queries and keys come from, also where they do not scale them.
    """

    query: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    head_dim: int = 0


@dataclass(frozen=True)
class Probabilities(Activation):
    """Softmax of scores. attention: the index of its `Attention` among those that were seen."""

    attention: int = 0


Flow = Weight | Activation


def times(first: Flow, second: Flow) -> Degrees:
    """Degrees of a product. What both factors are homogeneous in, they are together. Otherwise the first's degrees are
    an answer, or else the second's: in each case of what the other factor depends on in no other way."""
    mine, others = set(first.names), set(second.names)
    if mine & others:
        degree = first.degrees[0][1] + second.degrees[0][1]
        tangled = (others - mine) & first.of or (mine - others) & second.of
        return tuple((name, degree) for name in dict(first.degrees + second.degrees) if degree and not tangled)
    if mine and not mine & second.of:
        return first.degrees
    return () if others & first.of else second.degrees


def activation_sum(flows: Sequence[Flow]) -> Activation:
    """A sum (or a concatenation, or a choice) of terms of which at least one depends on the tokens."""
    activations = [f for f in flows if isinstance(f, Activation)]
    degrees, upstream = joint(flows)
    inner = tuple(dict.fromkeys(name for f in activations for name in f.inner))
    origin = reduce(Origin.__or__, (f.origin for f in activations))
    scores = next((f for f in activations if isinstance(f, Scores)), None)  # a mask, a bias, a sink beside them
    if scores is not None:
        return replace(scores, degrees=degrees, upstream=upstream, inner=inner, origin=origin)
    same = len({f.factor for f in activations}) == 1
    return Activation(degrees, upstream, inner, origin, activations[0].factor if same else 1.0)


def joint(flows: Iterable[Flow]) -> tuple[Degrees, Degrees]:
    """(degrees, upstream) of a sum: of terms that are of one degree, and depend on each other's parameters in no other
    way. Where one term is another one behind a further weight, the common origin."""
    flows = list(flows)
    if any(not f.degrees for f in flows):
        return (), ()
    heads = [f.degrees for f in flows]
    earlier = [f.upstream if isinstance(f, Activation) else () for f in flows]
    terms = [up if up in heads else head for up, head in zip(earlier, heads, strict=True)]
    degrees = dict(pair for term in terms for pair in term)
    tangled = any((degrees.keys() - set(names(term))) & f.of for term, f in zip(terms, flows, strict=True))
    if tangled or len(set(degrees.values())) > 1:
        return (), ()
    return tuple(degrees.items()), tuple(dict(pair for up in earlier for pair in up).items())
