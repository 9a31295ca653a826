"""What structure cannot tell of a family: the shipped table (`adapters.yaml`) and what a user registers beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from moe_param.errors import MoeParamError
from moe_param.naming import check_known

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROLES = (
    "embedding",
    "unembedding",
    "attention_in",
    "attention_value",
    "attention_out",
    "router",
    "expert_up",
    "expert_down",
    "shared_up",
    "shared_down",
    "dense_up",
    "dense_down",
    "norm",
    "post_norm",
    "query_norm",
    "key_norm",
    "final_norm",
    "bias",
    "other",
    "other_out",
)
"""Roles of trained parameters: those a scaling table has a row for. `frozen` and `selection_bias` have none."""

MATRICES = (
    *("attention_in", "attention_value", "attention_out", "router", "expert_up", "expert_down"),
    *("shared_up", "shared_down", "dense_up", "dense_down"),
)
"""Roles whose parameters are matrices that an optimizer may treat as such."""

SITES = ("residual_branch", "unnormalized_gates", "logits", "attention_logits")
"""Where an unfolded parameterization multiplies the forward pass."""

_DECLARED_SITES = tuple(site for site in SITES if site != "attention_logits")
"""Those at which a model's own factor is declared; that on its attention is read."""

COARSER = {"attention_value": "attention_in"}
"""A finer role -> the one whose row and constants hold for it too, where a table or a user says nothing of it alone."""

_DIMENSIONS = ("width", "depth", "num_experts", "top_k", "expert_size", "head_dim")


class AdapterError(MoeParamError):
    """An entry that says something unknown, or one for a family that has an entry already."""


@dataclass(frozen=True)
class Adapter:
    """One entry; the keys are explained in `adapters.yaml`. The empty adapter is every family's default."""

    residual: str | None = None
    normed_stream: bool = False
    own_factors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    multipliers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tokens: int = 8
    roles: Mapping[str, str] = field(default_factory=dict)
    gate: Mapping[str, Any] | str = field(default_factory=dict)
    refuse: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, model_type: str, entry: Mapping[str, Any]) -> Adapter:
        """The entry as an immutable object.

        Raises:
            AdapterError: an unknown key, role or dimension (with the nearest there is), or a value of the wrong type.
        """
        if not isinstance(entry, Mapping):
            raise AdapterError(f"adapter of {model_type}: expected a mapping of keys to values, got {entry!r}")
        check_known(entry, tuple(f.name for f in fields(cls)), "key", f"adapter of {model_type}", AdapterError)
        values = dict(entry)
        for key, check in _CHECKS.items():
            if key in values:
                values[key] = check(values[key], f"adapter of {model_type}: {key}")
        return cls(**values)


def register_adapter(model_type: str, entry: Mapping[str, Any], *, replace: bool = False) -> None:
    """Says of a model of your own what its forward pass cannot tell; for this process.

    Args:
        model_type: of its config (of the text part where the config is composite).
        entry: keys and values as in `moe_param/structure/adapters.yaml`, where they are explained:
            {"roles": {r"mlp\\.extra\\.weight": "router"}, "refuse": {"depth": "why"}}.
        replace: take the place of an entry that is there already, a shipped one included.

    Raises:
        AdapterError: an unknown key, role or dimension (with the nearest there is), a value of the wrong type, or a
            family that has an entry already. Nothing is registered then.
    """
    adapter = Adapter.read(model_type, entry)
    if model_type in adapters() and not replace:
        raise AdapterError(f"{model_type} has an adapter already ({adapters()[model_type]}): pass replace=True")
    _registered[model_type] = adapter


_registered: dict[str, Adapter] = {}


def registered(model_type: str) -> bool:
    """Whether `register_adapter` was called for it."""
    return model_type in _registered


@cache
def _shipped() -> Mapping[str, Adapter]:
    text = (resources.files("moe_param.structure") / "adapters.yaml").read_text()
    return {model_type: Adapter.read(model_type, entry) for model_type, entry in yaml.safe_load(text).items()}


def adapters() -> Mapping[str, Adapter]:
    """All entries, by model_type."""
    return MappingProxyType({**_shipped(), **_registered})


def adapter_for(config: PretrainedConfig) -> Adapter:
    """The entry of a config's model_type (of its text part where it is composite)."""
    return adapters().get(config.get_text_config().model_type, Adapter())


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise AdapterError(f"{where} must be a sentence (why), got {value!r}")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise AdapterError(f"{where} must be true or false, got {value!r}")
    return value


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{where} must be a whole number above 0, got {value!r}")
    return value


def _mapping(
    value: Any, where: str, example: str, valid: tuple[str, ...] | None = None, kind: str = "dimension"
) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise AdapterError(f"{where} must be a mapping like {example}, got {value!r}")
    check_known(() if valid is None else value, valid or (), kind, where, AdapterError)
    return value


def exponents(values: Mapping[str, Any], where: str, error: type[MoeParamError]) -> dict[str, float]:
    """The exponents of dimensions, as numbers; raises `error` where one is no finite number."""
    for dimension, exponent in values.items():
        number = isinstance(exponent, (int, float)) and not isinstance(exponent, bool)
        if not number or not math.isfinite(exponent):
            raise error(f"{where}.{dimension} must be a finite number, got {exponent!r}")
    return {dimension: float(exponent) for dimension, exponent in values.items()}


def _factors(value: Any, where: str) -> Mapping[str, Mapping[str, float]]:
    return _exponents_of(value, where, "{'embedding': {'width': 0.5}}", ROLES, "role")


def _multipliers(value: Any, where: str) -> Mapping[str, Mapping[str, float]]:
    if isinstance(value, Mapping) and "attention_logits" in value:
        raise AdapterError(f"{where}: a model's own factor on its attention_logits is read off it: leave that site out")
    return _exponents_of(value, where, "{'residual_branch': {'depth': -1}}", _DECLARED_SITES, "site")


def _exponents_of(
    value: Any, where: str, example: str, valid: tuple[str, ...], kind: str
) -> Mapping[str, Mapping[str, float]]:
    read = {}
    for name, row in _mapping(value, where, example, valid, kind).items():
        of_name = _mapping(row, f"{where}.{name}", "{'width': 0.5}", _DIMENSIONS)
        read[name] = MappingProxyType(exponents(of_name, f"{where}.{name}", AdapterError))
    return MappingProxyType(read)


def _patterns(value: Any, where: str) -> Mapping[str, str]:
    for pattern, role in _mapping(value, where, r"{'mlp\.extra\.weight': 'router'}").items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise AdapterError(f"{where}: {pattern!r} is no regular expression ({error})") from None
        check_known((role,), ROLES, "role", where, AdapterError)
    return MappingProxyType(dict(value))


def _refusals(value: Any, where: str) -> Mapping[str, str]:
    refused = _mapping(value, where, "{'depth': 'why it cannot be scaled'}", _DIMENSIONS)
    return MappingProxyType({dimension: _text(why, f"{where}.{dimension}") for dimension, why in refused.items()})


def _gate(value: Any, where: str) -> Mapping[str, Any] | str:
    if isinstance(value, str):
        return _text(value, where)
    for key, found in _mapping(value, where, "{'scores': 'sigmoid'}, or a sentence", tuple(_GATE), "key").items():
        valid = _GATE[key]
        if found not in valid if valid else not isinstance(found, str):
            what = f"one of {', '.join(map(repr, valid))}" if valid else "the name of an attribute of the router"
            raise AdapterError(f"{where}.{key} must be {what}, got {found!r}")
    return MappingProxyType(dict(value))


_GATE: dict[str, tuple[Any, ...]] = {
    "scores": ("softmax", "sigmoid"),
    "over": ("chosen",),
    "float32": (True, False),
    "normalize": (True, False),
    "divide": (),
    "groups": ("max", "top2"),
    "ordered": (True, False),
}

_CHECKS = {
    "residual": _text,
    "normed_stream": _flag,
    "own_factors": _factors,
    "multipliers": _multipliers,
    "tokens": _count,
    "roles": _patterns,
    "gate": _gate,
    "refuse": _refusals,
}
