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
from moe_param.scaling.spec import ScalingSpec
from moe_param.structure.laws import InitLaw
from moe_param.structure.roles import UNTRAINED, Info, Structure


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
    dims = ("width", "depth", "num_experts", "top_k", "expert_size")
    ratios = {dim: getattr(target.shape, dim) / getattr(base.shape, dim) for dim in dims}
    for dim in spec.fixed:
        if ratios.get(dim, 1.0) != 1.0:
            raise ParameterizationError(
                f"spec {spec.name} does not scale {dim}: base {getattr(base.shape, dim)}, "
                f"target {getattr(target.shape, dim)}"
            )
    counterparts = _counterparts(base, target)
    pairs = {name: (base.parameters[counterparts[name]], info) for name, info in target.parameters.items()}
    # Where no queries were seen, a head_dim shows in the factor that transformers puts on the attention logits.
    moved = any(b.head_dim != t.head_dim or b.scaling != t.scaling for b, t in pairs.values())
    _check_gaps(spec, base, target, ratios, moved)
    shares = _shares(base, target)
    return {
        name: replace(_rule(spec, ratios, b, t, init_std, constants), share=shares[name])
        for name, (b, t) in pairs.items()
    }


def _rule(
    spec: ScalingSpec,
    ratios: Mapping[str, float],
    base: Info,
    info: Info,
    init_std: float | None,
    constants: Mapping[str, Mapping[str, float]],
) -> Rule:
    fans = {"fan_in": info.fan_in, "fan_in_base": base.fan_in, "padding": info.padding}
    if info.role in UNTRAINED:
        return Rule(info.role, info.shape, info.law, lr=0.0, weight_decay=0.0, **fans)  # type: ignore[arg-type]
    own = dict(ratios)
    for fan in ("fan_in", "fan_out"):
        here, there = getattr(info, fan), getattr(base, fan)
        own[fan] = here / there if here and there else 1.0
    own["units"] = info.shape[-1] / base.shape[-1] if len(info.shape) == 1 else 1.0
    own["head_dim"] = info.head_dim / base.head_dim if info.head_dim and base.head_dim else 1.0

    def scale(exponents: Mapping[str, float]) -> float:
        return math.prod(own[dim] ** exponent for dim, exponent in exponents.items())

    multiplier, folded = 1.0 / scale(info.undo) if spec.init == "base" else 1.0, []
    if multiplier != 1.0:
        folded.append("own factor")
    for site in sorted(info.sites):
        if site not in spec.multipliers:
            continue
        factor = scale(spec.multipliers[site])
        if site == "attention_logits" and info.scaling and base.scaling:
            factor /= info.scaling / base.scaling  # what the model's own factor already does
        if not math.isclose(factor, 1.0, rel_tol=1e-12):
            multiplier *= factor
            folded.append(site)

    row = spec.roles[info.role]
    eps_row = spec.roles[info.of or info.role] if row.eps is None else row
    own_constants = constants.get(info.role, {})
    std_ratio = scale(row.init_std) * own_constants.get("init", 1.0)
    lr = scale(row.lr) * own_constants.get("lr", 1.0) * multiplier
    eps = scale(eps_row.eps or {}) / multiplier
    matrix = info.fan_in is not None or info.role in ("embedding", "unembedding")
    law = base.law if spec.init == "base" else info.law
    return Rule(
        role=info.role,
        shape=info.shape,
        init=_fold_law(law, info.offset, std_ratio, multiplier, init_std),
        lr=lr,
        eps=eps,
        weight_decay=1.0 / lr if row.decay and matrix else 0.0,
        multiplier=multiplier,
        folded=tuple(folded),
        **fans,
    )


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
    """Which base parameter each target parameter is scaled from: the same name in a layer of the same kind."""
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
        layer = None if info.layer is None else layer_map[info.layer]
        if (layer, info.relative) not in names:
            raise ParameterizationError(f"{name} is not in the base model: base and target differ in more than shape")
        found[name] = names[layer, info.relative]
    return found


def _shares(base: Structure, target: Structure) -> dict[str, float]:
    """Elements in the base over elements in the target, of each parameter together with its like in other layers."""

    def kind(structure: Structure, info: Info) -> Any:
        return None if info.layer is None else structure.kinds[info.layer], info.relative

    def elements(structure: Structure) -> Counter[Any]:
        count: Counter[Any] = Counter()
        for info in structure.parameters.values():
            count[kind(structure, info)] += math.prod(info.shape)
        return count

    before, after = elements(base), elements(target)
    return {name: before[kind(target, info)] / after[kind(target, info)] for name, info in target.parameters.items()}


def _check_gaps(
    spec: ScalingSpec, base: Structure, target: Structure, ratios: Mapping[str, float], head_dim_moved: bool
) -> None:
    moved = {dim for dim, ratio in ratios.items() if ratio != 1.0} | ({"head_dim"} if head_dim_moved else set())
    for site, reason in {**base.gaps, **target.gaps}.items():
        used = [dim for dim, e in spec.multipliers.get(site, {}).items() if e and dim in moved]
        if used:
            raise ParameterizationError(
                f"spec {spec.name} multiplies the {site} when {used[0]} changes, and in "
                f"{target.model_class.__name__} there is no parameter to fold that into: {reason}. "
                f"Keep {used[0]} at the base's."
            )
