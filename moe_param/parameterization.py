"""`Parameterization`: the rules of one model, and what is written of them into `config.moe_param`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from moe_param import explain
from moe_param.balancing.selection import require_selection_biases
from moe_param.optim import groups as optim
from moe_param.record import FORMAT, check_shapes, decode, encode, spans
from moe_param.scaling.rules import ParameterizationError, Rule
from moe_param.scaling.spec import ScalingSpec
from moe_param.structure.roles import layer_pattern
from moe_param.structure.shape import Shape
from moe_param.tuned import TunedNumbers

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on


@dataclass(frozen=True)
class Parameterization:
    """The rules of one model: made by `apply`, or read back from `model.config.moe_param` by `from_model`."""

    rules: dict[str, Rule]
    spec: ScalingSpec
    base_shape: Shape
    shape: Shape
    seed: int | None = None
    init_std: float | None = None
    constants: Mapping[str, Mapping[str, float]] | None = None
    tuned: TunedNumbers | None = None
    """What the file of the base says about the optimizer; None where the base was given as a shape or a config."""

    # -- training ----------------------------------------------------------------------------------------------
    def param_groups(self, model: torch.nn.Module, **numbers: Unpack[optim.BaseNumbers]) -> list[dict[str, Any]]:
        """Optimizer groups for `model`, wrapped or sharded or not: `lr` and the other numbers of the base model.

        Arguments, result and errors are those of `moe_param.optim.groups.param_groups`.
        """
        return optim.param_groups(self.rules, model, **numbers)

    def optimizer_factory(self, optimizer_class: type[torch.optim.Optimizer]) -> type:
        """For `Trainer(optimizer_cls_and_kwargs=(factory, {"lr": …}))`; `optim.groups` has the rest."""
        return optim.optimizer_factory(self.rules, optimizer_class)

    # -- explanation -------------------------------------------------------------------------------------------
    def rows(self, full: bool = False) -> list[dict[str, Any]]:
        """One row per role and rule, or with `full` one per parameter: plain values, ready for JSON or a table."""
        return explain.rows(self, full)

    def table(self, full: bool = False) -> str:
        """The rules as text: one line per role and rule, or with `full` one per parameter."""
        return explain.table(self, full)

    def __str__(self) -> str:
        return self.table()

    # -- persistence -------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that `from_dict` reads back exactly; what `apply` stores in `config.moe_param`."""
        entries: dict[str, dict[str, Any]] = {}
        for name, rule in self.rules.items():
            pattern, layer = layer_pattern(name)
            values = encode(rule)
            entry = entries.setdefault(json.dumps([pattern, values]), {"parameter": pattern, **values})
            if layer is not None:
                entry.setdefault("layers", []).append(layer)
        for entry in entries.values():
            if "layers" in entry:
                entry["layers"] = spans(entry["layers"])
        record = {
            "format": FORMAT,
            "spec": self.spec.to_dict(),
            "base_shape": asdict(self.base_shape),
            "shape": asdict(self.shape),
            "seed": self.seed,
            "init_std": self.init_std,
            "constants": {role: dict(c) for role, c in (self.constants or {}).items()},
            "rules": list(entries.values()),
        }
        if self.tuned is not None:
            record["tuned"] = {name: value for name, value in asdict(self.tuned).items() if value is not None}
        return record

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Parameterization:
        """Reads `to_dict` back.

        Raises:
            ParameterizationError: written by a version of moe_param this one cannot read.
        """
        if data.get("format") != FORMAT:
            raise ParameterizationError(
                f"config.moe_param has format {data.get('format')!r}, this moe_param reads format {FORMAT}: "
                "use the version of moe_param that wrote it"
            )
        rules: dict[str, Rule] = {}
        for entry in data["rules"]:
            layers = [i for a, b in entry["layers"] for i in range(a, b + 1)] if "layers" in entry else [None]
            for layer in layers:
                name = entry["parameter"] if layer is None else entry["parameter"].replace("*", str(layer), 1)
                rules[name] = decode(entry)
        return cls(
            rules=rules,
            spec=ScalingSpec.from_dict(data["spec"]),
            base_shape=Shape(**data["base_shape"]),
            shape=Shape(**data["shape"]),
            seed=data["seed"],
            init_std=data["init_std"],
            constants=data["constants"] or None,
            tuned=TunedNumbers.read(data["tuned"]) if "tuned" in data else None,
        )

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Parameterization:
        """Reads the rules from `model.config.moe_param`, for instance after `from_pretrained`. Weights are not touched.

        Raises:
            ParameterizationError: no record, or one whose parameters or shapes are not the model's.
            BalanceError: the config names injected selection biases that the model lacks (`load_selection_biases`).
        """
        require_selection_biases(model)
        record = getattr(model.config, "moe_param", None)
        if record is None:
            raise ParameterizationError(
                f"{type(model).__name__} carries no parameterization (`config.moe_param` is missing): "
                "call moe_param.apply(model, base_shape, reinit=False)"
            )
        parameterization = cls.from_dict(record)
        shapes = {name: tuple(rule.shape) for name, rule in parameterization.rules.items()}
        check_shapes(shapes, model, "config.moe_param records")
        return parameterization
