"""`ScalingSpec`: a parameterization as one declarative table, loaded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from moe_param.errors import MoeParamError
from moe_param.naming import check_known, nearest
from moe_param.structure.adapters import COARSER, exponents
from moe_param.structure.adapters import ROLES as ROLES
from moe_param.structure.adapters import SITES as SITES

SHAPE_DIMENSIONS = ("width", "depth", "num_experts", "top_k", "expert_size")
"""Dimensions that are the same for every parameter of a model."""

DIMENSIONS = (*SHAPE_DIMENSIONS, "head_dim", "fan_in", "fan_out", "units")
"""Exponents are of target/base ratios of these. head_dim is that of the queries a parameter makes; fan_in and fan_out
are its own, read off its matmul; units is the length of a vector (a gain over head_dim, shared by all heads, keeps its
gradient when the width grows). A bias has the ratios of the linear or norm it belongs to."""

DEFAULT_SPEC = "moe-completep"
"""The preset of arXiv:2601.20205."""

_KEYS = ("name", "source", "extends", "init", "fixed", "multipliers", "roles")
_ROW_KEYS = ("init_std", "lr", "eps", "decay", "source", "muon", "tied")
_MUON_KEYS = ("lr",)

Exponents = Mapping[str, float]


_EXTENDS = f" ('extends: {DEFAULT_SPEC}' takes what you leave out from that table)"


class SpecError(MoeParamError):
    """A scaling table that says something unknown or impossible."""


@dataclass(frozen=True)
class RoleRule:
    """One row: exponents of init std, Adam learning rate and Adam epsilon, unfolded, and whether it is decayed.

    eps is the expected gradient RMS; None (written `linear`) takes the row of the linear or norm a bias belongs to.
    muon: exponents of the learning rate of an orthogonalized update; None: there is no rule for that.
    tied: all experts of a layer start with the same values.
    """

    init_std: Exponents
    lr: Exponents
    eps: Exponents | None
    decay: bool
    source: str
    muon: Exponents | None = None
    tied: bool = False


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
        """Loads a preset by name, a YAML file by path, or a mapping; docs/specs.md explains the format.

        Raises:
            SpecError: unknown preset, key, role, site or dimension (with the nearest valid name), a missing row, a
                value of the wrong kind, an exponent that is not a finite number, or tables that extend each other.
        """
        if isinstance(spec, ScalingSpec):
            return spec
        return cls.from_dict(spec) if isinstance(spec, Mapping) else _load(str(spec), Path(), ())

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> ScalingSpec:
        """The spec of an already parsed table; the same checks as `load`. A file it extends is looked for from the
        current folder."""
        return _build(table, Path(), ())

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping that `from_dict` reads back: all rows, those of the extended table included."""
        rows = {
            role: {
                "init_std": dict(row.init_std),
                "lr": dict(row.lr),
                "eps": "linear" if row.eps is None else dict(row.eps),
                "decay": row.decay,
                "source": row.source,
                **({} if row.muon is None else {"muon": {"lr": dict(row.muon)}}),
                **({"tied": True} if row.tied else {}),
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


def _load(source: str, folder: Path, chain: tuple[Path, ...]) -> ScalingSpec:
    """The preset or file called `source`, seen from `folder`; `chain` holds the files that led here by `extends`."""
    if source in presets():
        text = (resources.files("moe_param.scaling") / "specs" / f"{source}.yaml").read_text(encoding="utf-8")
        return _build(yaml.safe_load(text), Path(), ())
    path = (folder / source).resolve()
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise SpecError(f"no scaling spec {source!r}{nearest(source, presets())}: give a preset or a YAML file")
    if path in chain:
        circle = (*chain[chain.index(path) :], path)
        raise SpecError(f"specs extend each other in a circle: {' → '.join(file.name for file in circle)}")
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not YAML: {error}") from error
    if not isinstance(table, Mapping):
        raise SpecError(f"{path} must hold a mapping, found {type(table).__name__}")
    return _build(table, path.parent, (*chain, path))


def _build(table: Mapping[str, Any], folder: Path, chain: tuple[Path, ...]) -> ScalingSpec:
    """Checks a parsed table; what it leaves out is its parent's, if it extends one."""
    check_known(table, _KEYS, "key", "spec", SpecError)
    name = _text(table, "name", "spec")
    where = f"spec {name}"
    source = _text(table, "source", where)
    parent = _load(_text(table, "extends", where), folder, chain) if "extends" in table else None
    inherited: dict[str, Any] = (
        parent.to_dict() if parent else {"init": "base", "fixed": [], "multipliers": {}, "roles": {}}
    )
    if parent is None and "roles" not in table:
        raise SpecError(f"{where}: the key 'roles' is missing{_EXTENDS}")

    init = table.get("init", inherited["init"])
    if init not in ("base", "model"):
        raise SpecError(f"{where}: init must be 'base' or 'model', got {init!r}")
    fixed = table.get("fixed", inherited["fixed"])
    if not isinstance(fixed, (list, tuple)):
        raise SpecError(f"{where}: fixed must be a list of dimensions, found {fixed!r}")
    check_known(fixed, SHAPE_DIMENSIONS, "dimension", f"{where}: fixed", SpecError)
    sites = _mapping(table.get("multipliers", {}), SITES, "site", f"{where}: multipliers")
    multipliers = {
        site: _exponents(value, f"{where}: multipliers.{site}")
        for site, value in {**inherited["multipliers"], **sites}.items()
    }
    rows = _mapping(table.get("roles", {}), ROLES, "role", f"{where}: roles")
    roles = dict(parent.roles) if parent else {}
    roles |= {role: _row(row, f"{where}: {role}", inherited["roles"].get(role, {})) for role, row in rows.items()}
    for fine, coarse in COARSER.items():
        own = fine in rows or (parent is not None and parent.roles[fine] != parent.roles[coarse])
        if not own and coarse in roles:
            roles[fine] = roles[coarse]
    missing = [role for role in ROLES if role not in roles]
    if missing:
        raise SpecError(f"{where}: no row for {', '.join(missing)}{_EXTENDS}")
    return ScalingSpec(name, source, init, tuple(fixed), multipliers, roles)


def _row(row: Any, where: str, parent: Mapping[str, Any]) -> RoleRule:
    """One row; keys it leaves out are those of `parent`, except its source: a changed row has a reason of its own."""
    row = _mapping(row, _ROW_KEYS, "key", where)
    source = _text(row, "source", f"{where}: every row names its source (paper, table)")
    values = {"init_std": {}, "lr": {}, "eps": {}, "decay": False, "tied": False, **parent, **row}
    if values["eps"] == "linear" and not where.endswith(": bias"):
        raise SpecError(f"{where}: only biases can take the epsilon of their linear")
    for key in ("decay", "tied"):
        if not isinstance(values[key], bool):
            raise SpecError(f"{where}.{key} must be true or false, got {values[key]!r}")
    return RoleRule(
        init_std=_exponents(values["init_std"], f"{where}.init_std"),
        lr=_exponents(values["lr"], f"{where}.lr"),
        eps=None if values["eps"] == "linear" else _exponents(values["eps"], f"{where}.eps"),
        decay=values["decay"],
        source=source,
        muon=_muon(values["muon"], f"{where}.muon") if "muon" in values else None,
        tied=values["tied"],
    )


def _muon(value: Any, where: str) -> dict[str, float]:
    """What a row says for orthogonalized updates: {lr: exponents}."""
    value = _mapping(value, _MUON_KEYS, "key", where)
    if "lr" not in value:
        raise SpecError(f"{where}: the key 'lr' is missing (lr: {{fan_out: 0.5, fan_in: -0.5}})")
    return _exponents(value["lr"], f"{where}.lr")


def _exponents(value: Any, where: str) -> dict[str, float]:
    return exponents(_mapping(value, DIMENSIONS, "dimension", where), where, SpecError)


def _mapping(value: Any, valid: tuple[str, ...], kind: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SpecError(f"{where} must map {kind}s to their values ({{}} for none), found {value!r}")
    check_known(value, valid, kind, where, SpecError)
    return value


def _text(table: Mapping[str, Any], key: str, where: str) -> str:
    if key not in table:
        raise SpecError(f"{where}: the key {key!r} is missing")
    if not isinstance(table[key], str) or not table[key]:
        raise SpecError(f"{where}: {key} must be text, found {table[key]!r}")
    return str(table[key])
