"""`ScalingSpec`: a parameterization as one declarative table, loaded strictly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from moe_param.errors import MoeParamError
from moe_param.naming import nearest

DIMENSIONS = ("width", "depth", "num_experts", "top_k", "expert_size", "head_dim", "fan_in", "fan_out", "units")
"""Exponents are of target/base ratios of these. fan_in and fan_out are the parameter's own, read off its matmul; units
is the length of a vector (a gain over head_dim, shared by all heads, keeps its gradient when the width grows)."""

ROLES = (
    "embedding",
    "unembedding",
    "attention_in",
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
"""Roles a table has a row for; `frozen` and `selection_bias` are not trained by the optimizer and have none."""

SITES = ("residual_branch", "unnormalized_gates", "logits", "attention_logits")
"""Where the unfolded parameterization multiplies the forward pass."""

DEFAULT_SPEC = "moe-completep"
"""The preset of arXiv:2601.20205."""

_KEYS = ("name", "source", "init", "fixed", "multipliers", "roles")
_ROW_KEYS = ("init_std", "lr", "eps", "decay", "source")

Exponents = Mapping[str, float]


class SpecError(MoeParamError):
    """A scaling table that says something unknown or impossible."""


@dataclass(frozen=True)
class RoleRule:
    """One row: exponents of init std, Adam learning rate and Adam epsilon, unfolded, and whether it is decayed.

    eps is the expected gradient RMS; None (written `linear`) takes the row of the linear or norm a bias belongs to.
    """

    init_std: Exponents
    lr: Exponents
    eps: Exponents | None
    decay: bool
    source: str


@dataclass(frozen=True)
class ScalingSpec:
    """A parameterization: exponents of target/base ratios, as the papers write them, before folding.

    init: "base" scales the base model's own init; "model" leaves the target's init as transformers has it.
    fixed: dimensions that the parameterization does not scale (a ratio other than 1 is an error).
    multipliers: exponents of the forward multipliers by site (see `SITES`). `attention_logits` is the exponent of
        the whole factor in front of q·k, the model's own 1/√head_dim included.
    """

    name: str
    source: str
    init: str
    fixed: tuple[str, ...]
    multipliers: Mapping[str, Exponents]
    roles: Mapping[str, RoleRule]

    @classmethod
    def load(cls, spec: str | Path | Mapping[str, Any] | ScalingSpec) -> ScalingSpec:
        """Loads a preset by name, a YAML file by path, or a mapping.

        Raises:
            SpecError: unknown preset, key, role, site or dimension (with the nearest valid name), a missing row, or
                an exponent that is not a finite number.
        """
        if isinstance(spec, ScalingSpec):
            return spec
        if isinstance(spec, Mapping):
            return cls.from_dict(spec)
        text = str(spec)
        if text in presets():
            return cls.from_dict(
                yaml.safe_load((resources.files("moe_param.scaling") / "specs" / f"{text}.yaml").read_text())
            )
        path = Path(text)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise SpecError(f"no scaling spec {text!r}{nearest(text, presets())}: give a preset or a YAML file")
        try:
            table = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise SpecError(f"{path} is not YAML: {error}") from error
        if not isinstance(table, Mapping):
            raise SpecError(f"{path} must hold a mapping, found {type(table).__name__}")
        return cls.from_dict(table)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> ScalingSpec:
        """The spec of an already parsed table; the same checks as `load`."""
        _known(table, _KEYS, "key", "spec")
        for key in ("name", "source", "roles"):
            if key not in table:
                raise SpecError(f"spec: the key {key!r} is missing")
        name = str(table["name"])
        init = table.get("init", "base")
        if init not in ("base", "model"):
            raise SpecError(f"spec {name}: init must be 'base' or 'model', got {init!r}")
        fixed = tuple(table.get("fixed", ()))
        _known(fixed, DIMENSIONS, "dimension", f"spec {name}: fixed")
        sites = table.get("multipliers") or {}
        _known(sites, SITES, "site", f"spec {name}: multipliers")
        multipliers = {site: _exponents(value, f"spec {name}: multipliers.{site}") for site, value in sites.items()}
        _known(table["roles"], ROLES, "role", f"spec {name}")
        missing = [role for role in ROLES if role not in table["roles"]]
        if missing:
            raise SpecError(f"spec {name}: no row for {', '.join(missing)}")
        roles = {role: _row(row, f"spec {name}: {role}") for role, row in table["roles"].items()}
        return cls(name, str(table["source"]), init, fixed, multipliers, roles)

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping that `from_dict` reads back."""
        rows = {
            role: {
                "init_std": dict(row.init_std),
                "lr": dict(row.lr),
                "eps": "linear" if row.eps is None else dict(row.eps),
                "decay": row.decay,
                "source": row.source,
            }
            for role, row in self.roles.items()
        }
        return {
            "name": self.name,
            "source": self.source,
            "init": self.init,
            "fixed": list(self.fixed),
            "multipliers": {site: dict(value) for site, value in self.multipliers.items()},
            "roles": rows,
        }


@cache
def presets() -> tuple[str, ...]:
    """Names of the tables that come with the package."""
    folder = resources.files("moe_param.scaling") / "specs"
    return tuple(sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def _row(row: Any, where: str) -> RoleRule:
    if not isinstance(row, Mapping):
        raise SpecError(f"{where} must be a mapping, found {row!r}")
    _known(row, _ROW_KEYS, "key", where)
    if not row.get("source"):
        raise SpecError(f"{where}: every row names its source (paper, table)")
    eps = row.get("eps", {})
    if eps == "linear" and not where.endswith(": bias"):
        raise SpecError(f"{where}: only biases can take the epsilon of their linear")
    decay = row.get("decay", False)
    if not isinstance(decay, bool):
        raise SpecError(f"{where}.decay must be true or false, got {decay!r}")
    return RoleRule(
        init_std=_exponents(row.get("init_std", {}), f"{where}.init_std"),
        lr=_exponents(row.get("lr", {}), f"{where}.lr"),
        eps=None if eps == "linear" else _exponents(eps, f"{where}.eps"),
        decay=decay,
        source=str(row["source"]),
    )


def _exponents(value: Any, where: str) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise SpecError(f"{where} must map dimensions to exponents, found {value!r}")
    _known(value, DIMENSIONS, "dimension", where)
    for dimension, exponent in value.items():
        number = isinstance(exponent, (int, float)) and not isinstance(exponent, bool)
        if not number or not math.isfinite(exponent):
            raise SpecError(f"{where}.{dimension} must be a finite number, got {exponent!r}")
    return {dimension: float(exponent) for dimension, exponent in value.items()}


def _known(names: Any, valid: tuple[str, ...], kind: str, where: str) -> None:
    for name in names:
        if name not in valid:
            raise SpecError(f"{where}: unknown {kind} {name!r}{nearest(str(name), valid)}")
