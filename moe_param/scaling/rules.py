"""Spec × roles × two structures → one `Rule` per parameter, forward multipliers folded away.

Adam with epsilon does not see the change w' = a·w, init' = a·init, lr' = a·lr, ε' = ε/a (with lr·λ kept), so a forward
multiplier a in front of or behind a linear map moves into that map (arXiv:2601.20205, D.1: only two of initialization,
learning rate and multiplier are degrees of freedom).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moe_param.errors import MoeParamError
from moe_param.scaling.spec import SHAPE_DIMENSIONS, RoleRule, ScalingSpec
from moe_param.structure.adapters import COARSER
from moe_param.structure.laws import InitLaw
from moe_param.structure.matrices import Matrices
from moe_param.structure.roles import LEFT_ALONE, UNTRAINED, Info, Structure

STACK = 3
"""Dimensions of a tensor that holds the experts of a layer: which one, and those of its matrix."""


class ParameterizationError(MoeParamError):
    """A model, a base and a spec that do not fit together; nothing was written."""


@dataclass(frozen=True)
class Rule:
    """What holds for one parameter, as the optimizer and the initializer see it (folded).

    role: see `moe_param.scaling.spec.ROLES`. shape: of the parameter. init: law and scale of its initial values.
    lr, eps, weight_decay: factors on the user's numbers; weight_decay is 0 where the role is not decayed, otherwise
    1 / lr, so that the shrinkage lr·λ of a step is the same everywhere. multiplier: the forward multiplier folded into
    it (1: none), folded: from which sites. fan_in, fan_in_base: of the contraction it takes part in, None for vectors.
    share: how many elements of the base one element stands for, over all layers of its kind; None in records that
    older versions wrote.
    matrices: those it holds, and muon: the factor on the learning rate of an orthogonalized update of each of their
    parts, √max(1, fan_out / fan_in) of the base's included; None where there is no rule, and why in `no_muon`.
    """

    role: str
    shape: tuple[int, ...]
    init: InitLaw
    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0
    multiplier: float = 1.0
    folded: tuple[str, ...] = ()
    fan_in: int | None = None
    fan_in_base: int | None = None
    padding: int | None = None
    share: float | None = None
    matrices: Matrices | None = None
    muon: tuple[float, ...] | None = None
    no_muon: str = ""

    @property
    def init_std(self) -> float | None:
        """Standard deviation of the initial values; None where they are constant or left to transformers."""
        return self.init.std if self.init.kind in ("normal", "uniform", "trunc_normal") else None

    @property
    def constant(self) -> float | None:
        """The constant the parameter starts at, None where it is random."""
        return self.init.value if self.init.kind == "constant" else None


def derive_rules(
    spec: ScalingSpec,
    base: Structure,
    target: Structure,
    init_std: float | None,
    constants: Mapping[str, Mapping[str, float]],
) -> dict[str, Rule]:
    """A `Rule` per parameter of `target`, scaled from its counterpart in `base`.

    Raises:
        ParameterizationError: a dimension the spec does not scale, a layer or parameter without a counterpart, or a
            multiplier without a place to go.
    """
    sizes = base.shape.sizes  # of a dense model, those of experts have not moved
    moved = {dim: getattr(target.shape, dim) / sizes[dim] if dim in sizes else 1.0 for dim in SHAPE_DIMENSIONS}
    for dim in spec.fixed:
        if moved.get(dim, 1.0) != 1.0:
            raise ParameterizationError(
                f"spec {spec.name} does not scale {dim}: base {getattr(base.shape, dim)}, "
                f"target {getattr(target.shape, dim)}"
            )
    counterparts = _counterparts(base, target)
    pairs = {
        name: _Pair.of(name, base.parameters[counterparts[name]] if name in counterparts else info, info, moved)
        for name, info in target.parameters.items()
    }
    heads_moved = base.head_dims != target.head_dims or any(
        p.base.head_dim != p.target.head_dim for p in pairs.values()
    )
    _check_gaps(spec, base, target, moved, heads_moved)
    shares = _shares(base, target)
    return {
        name: replace(_rule(spec, pair, pairs[pair.target.of or name], init_std, constants), share=shares[name])
        for name, pair in pairs.items()
    }


@dataclass(frozen=True)
class Ratios:
    """target / base of every dimension a table may name (`moe_param.scaling.spec.DIMENSIONS`), for one parameter."""

    width: float
    depth: float
    num_experts: float
    top_k: float
    expert_size: float
    head_dim: float
    fan_in: float
    fan_out: float
    units: float

    @classmethod
    def of(cls, base: Info, target: Info, moved: Mapping[str, float]) -> Ratios:
        """The ratios of one parameter; `moved` holds those of the model (`SHAPE_DIMENSIONS`)."""

        def ratio(here: int | None, there: int | None) -> float:
            return here / there if here and there else 1.0

        return cls(
            **moved,
            head_dim=ratio(target.head_dim, base.head_dim),
            fan_in=ratio(target.fan_in, base.fan_in),
            fan_out=ratio(target.fan_out, base.fan_out),
            units=ratio(target.shape[-1], base.shape[-1]) if len(target.shape) == 1 else 1.0,
        )

    def scale(self, exponents: Mapping[str, float]) -> float:
        """Π ratio^exponent."""
        return math.prod(getattr(self, dimension) ** exponent for dimension, exponent in exponents.items())


@dataclass(frozen=True)
class _Pair:
    """A parameter of the target and the one in the base that it is scaled from."""

    name: str
    base: Info
    target: Info
    ratios: Ratios

    @classmethod
    def of(cls, name: str, base: Info, target: Info, moved: Mapping[str, float]) -> _Pair:
        return cls(name, base, target, Ratios.of(base, target, moved))

    def multipliers(self, spec: ScalingSpec, sites: frozenset[str]) -> dict[str, float]:
        """The forward multiplier of each site on top of what the model's own forward pass has there, those that are 1
        left out."""
        factors = {}
        for site in sorted(sites & spec.multipliers.keys()):
            factor = self.ratios.scale(spec.multipliers[site])
            factor /= self.ratios.scale(self.target.own_multipliers.get(site, {}))
            if site == "attention_logits" and self.target.scaling and self.base.scaling:
                factor /= self.target.scaling / self.base.scaling  # what the model's own factor already does
            if not math.isclose(factor, 1.0, rel_tol=1e-12):
                factors[site] = factor
        return factors


def _rule(
    spec: ScalingSpec,
    pair: _Pair,
    linear: _Pair,
    init_std: float | None,
    constants: Mapping[str, Mapping[str, float]],
) -> Rule:
    """The rule of one parameter; `linear` is the linear or norm that a bias belongs to, otherwise `pair` itself."""
    info = pair.target
    fans = {"fan_in": info.fan_in, "fan_in_base": pair.base.fan_in, "padding": info.padding}
    if info.role in UNTRAINED:
        return Rule(info.role, info.shape, info.law, lr=0.0, weight_decay=0.0, **fans)  # type: ignore[arg-type]
    if info.role == LEFT_ALONE:  # the base's numbers; decayed are matrices, as Trainer does
        return Rule(info.role, info.shape, info.law, weight_decay=float(len(info.shape) > 1))
    row, ratios = spec.roles[info.role], linear.ratios
    factors = pair.multipliers(spec, info.sites)
    own = 1.0 / ratios.scale(info.undo) if spec.init == "base" else 1.0
    if own != 1.0:
        factors = {"own factor": own, **factors}
    multiplier = math.prod(factors.values())
    own_constants = {**constants.get(COARSER.get(info.role, ""), {}), **constants.get(info.role, {})}
    std_ratio = ratios.scale(row.init_std) * own_constants.get("init", 1.0)
    lr = ratios.scale(row.lr) * own_constants.get("lr", 1.0) * multiplier
    matrix = info.fan_in is not None or info.role in ("embedding", "unembedding")
    law = pair.base.law if spec.init == "base" else info.law
    if row.tied and (len(info.shape) != STACK or law.kind == "special"):
        found = "initialized by the model's own code" if law.kind == "special" else info.shape
        raise ParameterizationError(
            f"spec {spec.name} starts all experts of a layer with the same values, and {pair.name} is no stack of them "
            f"(experts, …, …) but {found}: leave 'tied' out of the row {info.role}"
        )
    return Rule(
        role=info.role,
        shape=info.shape,
        init=replace(_fold_law(law, info.offset, std_ratio, multiplier, init_std), tied=row.tied),
        lr=lr,
        eps=_linear_eps(spec, linear) if row.eps is None else ratios.scale(row.eps) / multiplier,
        weight_decay=1.0 / lr if row.decay and matrix else 0.0,
        multiplier=multiplier,
        folded=tuple(factors),
        matrices=info.matrices,
        muon=_muon(row, pair, own_constants.get("lr", 1.0) * multiplier),
        no_muon=info.unclear or (f"spec {spec.name} has no rule for it" if info.matrices and row.muon is None else ""),
        **fans,
    )


def _muon(row: RoleRule, pair: _Pair, factor: float) -> tuple[float, ...] | None:
    """The factor on the rate of each part's orthogonalized update; `factor`: constant and folded multiplier.

    An orthogonalized update does not see the size of the gradient, so that a multiplier a that is folded into the
    weight, w' = a·w, asks for a times the rate, as with Adam. At the base the factor is torch's own,
    √max(1, fan_out / fan_in), and from there it goes by the row.
    """
    ours, theirs, info = pair.target.matrices, pair.base.matrices, pair.target
    if row.muon is None or ours is None or theirs is None or not info.fan_out or not pair.base.fan_out:
        return None
    found = []
    for part, part_base in zip(ours.fan_outs(info.fan_out), theirs.fan_outs(pair.base.fan_out), strict=True):
        ratios = replace(pair.ratios, fan_out=part / part_base)
        found.append(factor * ratios.scale(row.muon) * math.sqrt(max(1.0, part_base / (pair.base.fan_in or 1))))
    return tuple(found)


def _linear_eps(spec: ScalingSpec, linear: _Pair) -> float:
    """Epsilon of the bias of `linear`: with all multipliers folded, y = W·x + b, both have the gradient scale of y.

    A factor behind the linear is folded into W and b, one in front of it (on the logits) into W, or into the final norm
    where W is also the embedding, and never reaches b. The family's own factor stays in front of W, and is none of b's.
    """
    row = spec.roles.get(linear.target.role)
    if row is None:
        raise ParameterizationError(
            f"spec {spec.name} gives a bias the epsilon of {linear.name}, which is not trained and has none: "
            "freeze the bias too, or write the exponents of eps into the row of bias"
        )
    sites = linear.target.sites | ({"logits"} if linear.target.role == "embedding" else set())
    return linear.ratios.scale(row.eps or {}) / math.prod(linear.multipliers(spec, sites).values())


def _fold_law(law: InitLaw, offset: bool, std_ratio: float, multiplier: float, init_std: float | None) -> InitLaw:
    if law.kind == "constant":
        if offset:  # a gain of the form 1 + w: 1 + w' = a·(1 + w)
            return replace(law, value=multiplier * (1.0 + law.value) - 1.0)
        return replace(law, value=multiplier * law.value)
    if law.kind == "special":  # values are transformers' own, times this
        return replace(law, std=std_ratio * multiplier)
    if init_std is not None:
        law = InitLaw("normal", std=init_std)
    factor = std_ratio * multiplier
    return replace(law, std=law.std * factor, bound=law.bound * factor)


def _counterparts(base: Structure, target: Structure) -> dict[str, str]:
    """Which base parameter each target parameter is scaled from: the same name in a layer of the same kind. Those that
    are left alone are scaled from none."""
    of_kind: dict[Any, list[int]] = {}
    for index, kind in enumerate(base.kinds):
        of_kind.setdefault(kind, []).append(index)
    total = Counter(target.kinds)
    seen: Counter[Any] = Counter()
    layer_map = {}
    for index, kind in enumerate(target.kinds):
        if kind not in of_kind:
            raise ParameterizationError(
                f"layer {index} of the target ({kind[0] or 'its parameters'}) has no counterpart in the base: the base "
                "needs a layer with the same parameters in the same roles. Choose a base depth that holds every kind "
                "of layer, or pass a base config."
            )
        candidates = of_kind[kind]
        layer_map[index] = candidates[seen[kind] * len(candidates) // total[kind]]
        seen[kind] += 1
    names = {(info.layer, info.relative): name for name, info in base.parameters.items()}
    found = {}
    for name, info in target.parameters.items():
        if info.role == LEFT_ALONE:
            continue
        layer = None if info.layer is None else layer_map[info.layer]
        if (layer, info.relative) not in names:
            raise ParameterizationError(f"{name} is not in the base model: base and target differ in more than shape")
        found[name] = names[layer, info.relative]
    return found


def _shares(base: Structure, target: Structure) -> dict[str, float]:
    """Elements in the base over elements in the target, of each parameter together with its like in other layers; 1
    for those that are left alone."""

    def kind(structure: Structure, info: Info) -> Any:
        return None if info.layer is None else structure.kinds[info.layer], info.relative

    def elements(structure: Structure) -> Counter[Any]:
        count: Counter[Any] = Counter()
        for info in structure.parameters.values():
            count[kind(structure, info)] += math.prod(info.shape)
        return count

    before, after = elements(base), elements(target)
    return {
        name: 1.0 if info.role == LEFT_ALONE else before[kind(target, info)] / after[kind(target, info)]
        for name, info in target.parameters.items()
    }


def _check_gaps(
    spec: ScalingSpec, base: Structure, target: Structure, ratios: Mapping[str, float], heads_moved: bool
) -> None:
    moved = {dim for dim, ratio in ratios.items() if ratio != 1.0} | ({"head_dim"} if heads_moved else set())
    own = {site: e for info in target.parameters.values() for site, e in info.own_multipliers.items()}
    for site, reason in {**base.gaps, **target.gaps}.items():
        wanted = spec.multipliers.get(site, {})  # what the model's own forward pass has there already is no gap
        used = [dim for dim, e in wanted.items() if e != own.get(site, {}).get(dim, 0.0) and dim in moved]
        if used:
            raise ParameterizationError(
                f"spec {spec.name} multiplies the {site} when {used[0]} changes, and in "
                f"{target.model_class.__name__} there is no parameter to fold that into: {reason}. "
                f"Keep {used[0]} at the base's."
            )
