"""`apply`, its `Parameterization`, and what is written into `config.moe_param`."""

from __future__ import annotations

import io
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from moe_param import optim
from moe_param.init import check_writable, initialize
from moe_param.laws import InitLaw
from moe_param.roles import UNTRAINED, layer_pattern, read_structure
from moe_param.rules import ParameterizationError, Rule, derive_rules
from moe_param.shape import Shape, ShapeError, scale_config
from moe_param.spec import DEFAULT_SPEC, ROLES, ScalingSpec
from moe_param.tuned import read_tuned

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of what `Parameterization.to_dict` writes."""


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

    # -- training ----------------------------------------------------------------------------------------------
    def param_groups(self, model: torch.nn.Module, **numbers: Unpack[optim.BaseNumbers]) -> list[dict[str, Any]]:
        """Optimizer groups for `model`, wrapped or sharded or not: `lr` and the other numbers of the base model.

        Arguments, result and errors are those of `moe_param.optim.param_groups`.
        """
        return optim.param_groups(self.rules, model, **numbers)

    def optimizer_factory(self, optimizer_class: type[torch.optim.Optimizer]) -> type:
        """For `Trainer(optimizer_cls_and_kwargs=(factory, {"lr": …}))`; see `moe_param.optim.optimizer_factory`."""
        return optim.optimizer_factory(self.rules, optimizer_class)

    # -- explanation -------------------------------------------------------------------------------------------
    def rows(self, full: bool = False) -> list[dict[str, Any]]:
        """One row per role and rule, or with `full` one per parameter: plain values, ready for JSON or a table."""
        rows: dict[Any, dict[str, Any]] = {}
        for name, rule in self.rules.items():
            pattern = name if full else layer_pattern(name)[0]
            values = {
                "role": rule.role,
                "parameter": pattern,
                "shape": list(rule.shape),
                "fan_in_ratio": rule.fan_in / rule.fan_in_base if rule.fan_in and rule.fan_in_base else None,
                "init": _describe_init(rule.init),
                "init_std": rule.init_std,
                "constant": rule.constant,
                "lr": rule.lr if rule.role not in UNTRAINED else None,
                "eps": rule.eps if rule.role not in UNTRAINED else None,
                "weight_decay": rule.weight_decay if rule.role not in UNTRAINED else None,
                "multiplier": rule.multiplier,
                "folded": list(rule.folded),
                "parameters": 0,
            }
            key = json.dumps(values)
            rows.setdefault(key, values)["parameters"] += 1
        order = {role: i for i, role in enumerate((*ROLES, *UNTRAINED))}
        found = list(rows.values())
        return found if full else sorted(found, key=lambda row: order[row["role"]])

    def table(self, full: bool = False) -> str:
        """The rules as text: one line per role and rule, or with `full` one per parameter."""
        from rich.console import Console

        console = Console(width=200, file=io.StringIO(), record=True)
        console.print(self.rich_table(full))
        return "\n".join(line.rstrip() for line in console.export_text().splitlines())

    def rich_table(self, full: bool = False, *, narrow: bool = False) -> Any:
        """`table` as a `rich.table.Table`, for terminals; `narrow` leaves the names of the parameters out."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=f"{self.spec.name}: {_ratios(self.base_shape, self.shape)}",
            caption="fan-in: target / base. init std: '= c' is a constant. lr, eps, decay: factors on the base's "
            "numbers. folded in: the forward multiplier that a parameter carries.",
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )

        def number(value: float | None) -> str:
            return "" if value is None else f"{value:.4g}"

        columns = ["role", "parameter", "shape", "fan-in", "init std", "lr", "eps", "decay", "folded in"]
        for column in columns:
            if not (narrow and column == "parameter"):
                wrap = column in ("parameter", "folded in")
                table.add_column(column, overflow="fold", no_wrap=not wrap, min_width=8 if wrap else None)
        for row in self.rows(full):
            count = f" ({row['parameters']})" if row["parameters"] > 1 else ""
            folded = [number(row["multiplier"]), *(site.replace("_", " ") for site in row["folded"])]
            table.add_row(
                row["role"],
                *([] if narrow else [row["parameter"] + count]),
                "×".join(map(str, row["shape"])),
                number(row["fan_in_ratio"]),
                row["init"].removeprefix("normal "),
                *(number(row[factor]) for factor in ("lr", "eps", "weight_decay")),
                " ".join(folded) if row["folded"] else "",
            )
        return table

    def __str__(self) -> str:
        return self.table()

    # -- persistence -------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that `from_dict` reads back exactly; what `apply` stores in `config.moe_param`."""
        entries: dict[str, dict[str, Any]] = {}
        for name, rule in self.rules.items():
            pattern, layer = layer_pattern(name)
            values = _encode(rule)
            entry = entries.setdefault(json.dumps([pattern, values]), {"parameter": pattern, **values})
            if layer is not None:
                entry.setdefault("layers", []).append(layer)
        for entry in entries.values():
            if "layers" in entry:
                entry["layers"] = _spans(entry["layers"])
        return {
            "format": FORMAT,
            "spec": self.spec.to_dict(),
            "base_shape": asdict(self.base_shape),
            "shape": asdict(self.shape),
            "seed": self.seed,
            "init_std": self.init_std,
            "constants": {role: dict(c) for role, c in (self.constants or {}).items()},
            "rules": list(entries.values()),
        }

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
                rules[name] = _decode(entry)
        return cls(
            rules=rules,
            spec=ScalingSpec.from_dict(data["spec"]),
            base_shape=Shape(**data["base_shape"]),
            shape=Shape(**data["shape"]),
            seed=data["seed"],
            init_std=data["init_std"],
            constants=data["constants"] or None,
        )

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Parameterization:
        """Reads the rules from `model.config.moe_param`, for instance after `from_pretrained`. Weights are not touched.

        Raises:
            ParameterizationError: no record, or one whose parameters or shapes are not the model's.
        """
        record = getattr(model.config, "moe_param", None)
        if record is None:
            raise ParameterizationError(
                f"{type(model).__name__} carries no parameterization (`config.moe_param` is missing): "
                "call moe_param.apply(model, base_shape, reinit=False)"
            )
        parameterization = cls.from_dict(record)
        shapes = {name: tuple(rule.shape) for name, rule in parameterization.rules.items()}
        _check_shapes(shapes, model, "config.moe_param records")
        return parameterization


def plan(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    base_shape: Shape | PretrainedConfig | str | Path,
    target_shape: Shape | None = None,
    *,
    spec: str | Path | Mapping[str, Any] | ScalingSpec = DEFAULT_SPEC,
    init_std: float | None = None,
    constants: Mapping[str, Mapping[str, float]] | None = None,
    seed: int | None = None,
    allow_sparsity_change: bool = False,
) -> Parameterization:
    """The rules `apply` would write, from configs alone: nothing is built in memory. Arguments are those of `apply`.

    Raises:
        ParameterizationError, ShapeError, SpecError, StructureError, RoleError: as `apply`.
    """
    if isinstance(base_shape, str | Path):
        base_shape, spec, init_std, constants = _tuned(base_shape, spec, init_std, constants)
    table = ScalingSpec.load(spec)
    _check_numbers(init_std, constants)
    if isinstance(base_shape, Shape):
        wanted = {k: v for k, v in asdict(base_shape).items() if k != "head_dim"}
        base_config = scale_config(config, **wanted, model_class=model_class)
    elif isinstance(base_shape, PretrainedConfig):
        base_config = base_shape
        if base_config.model_type != config.model_type:
            raise ParameterizationError(
                f"base and target are different architectures: {base_config.model_type} and {config.model_type}"
            )
    else:
        raise ParameterizationError(
            "base_shape must be a Shape, a PretrainedConfig or the path of a YAML file, "
            f"got {type(base_shape).__name__}"
        )
    target = read_structure(model_class, config)
    base = read_structure(model_class, base_config)
    if isinstance(base_shape, Shape) and base_shape.head_dim not in (None, base.shape.head_dim):
        raise ShapeError(
            f"base_shape.head_dim = {base_shape.head_dim}, but heads are scaled at the model's head_dim "
            f"{base.shape.head_dim}: for another head_dim at the base pass the base config instead of a Shape"
        )
    if target_shape is not None and not isinstance(target_shape, Shape):
        raise ParameterizationError(f"target_shape must be a Shape, got {type(target_shape).__name__}")
    if target_shape is not None:
        given = target_shape if target_shape.head_dim else replace(target_shape, head_dim=target.shape.head_dim)
        if given != target.shape:
            raise ShapeError(f"target_shape {given} is not the model's shape {target.shape}")
    _check_sparsity(base.shape, target.shape, allow_sparsity_change)
    rules = derive_rules(table, base, target, init_std, constants or {})
    return Parameterization(rules, table, base.shape, target.shape, seed, init_std, constants)


def apply(
    model: PreTrainedModel,
    base_shape: Shape | PretrainedConfig | str | Path,
    target_shape: Shape | None = None,
    *,
    spec: str | Path | Mapping[str, Any] | ScalingSpec = DEFAULT_SPEC,
    init_std: float | None = None,
    constants: Mapping[str, Mapping[str, float]] | None = None,
    seed: int | None = None,
    reinit: bool = True,
    experts: str | None = "auto",
    allow_sparsity_change: bool = False,
) -> Parameterization:
    """Rewrites the initialization of `model` in place and returns the rules of its parameters.

    The forward pass is not touched: multipliers are folded into init, learning rate and epsilon (the abc-symmetry of
    Adam; arXiv:2601.20205, D.1). At `base_shape` everything is as transformers has it, with one learning rate.

    Args:
        model: any Hugging Face MoE model whose experts use transformers' experts interface, with real weights.
        base_shape: the shape the numbers were tuned at, or the base config, or the path of the YAML file that a sweep
            wrote (`read_tuned`): base, spec, init_std and constants are then the file's.
        target_shape: checked against the model; the model's own shape by default.
        spec: a preset (`moe-completep`, `completep`, `mup`, `mup-moe`, `kakao`, `standard`), a YAML path, a mapping.
        init_std: σ of every randomly initialized parameter of the base; by default transformers' own.
        constants: {role: {"init": c, "lr": c}}, constant factors found on the base (arXiv:2601.20205, D.1).
        seed: of the initialization; with the parameter's name it decides every value, whatever the order, the device
            or the sharding. Default: drawn from torch's global generator (give one where ranks must agree).
        reinit: False leaves the weights alone (continued training, a loaded checkpoint) and gives only the rates.
        experts: an implementation for transformers' experts interface; "auto" takes "megablocks" where it is usable
            on the model's device and otherwise leaves transformers' choice; None leaves it without a word.
        allow_sparsity_change: warn instead of raising where top_k / num_experts differs from the base.

    Returns:
        The `Parameterization`, also recorded as plain JSON in `model.config.moe_param`.

    Raises:
        StructureError: no experts, or a forward pass that cannot be read.
        RoleError: parameters without a role, all of them listed.
        ShapeError: sizes that contradict the model or do not divide.
        SpecError: an invalid scaling table.
        WeightsError: meta weights.
        ParameterizationError: a model already parameterized or quantized, another architecture than the base, another
            sparsity, a multiplier without a place to go, NaN or negative constants, numbers that contradict a file.
        TunedError: a file of tuned numbers that cannot be read or is not for its base.
        In every case the model is left as it was.
    """
    if reinit and _is_parameterized(model):
        raise ParameterizationError(
            f"{type(model).__name__} is already parameterized (config.moe_param is set): read its rules with "
            "Parameterization.from_model(model), or pass reinit=False to replace the rates and keep the weights. "
            "Where the weights are new and only the config was loaded, delete config.moe_param first."
        )
    if seed is None and reinit:
        seed = int(torch.randint(2**31, (), device="cpu").item())
    parameterization = plan(
        type(model),
        model.config,
        base_shape,
        target_shape,
        spec=spec,
        init_std=init_std,
        constants=constants,
        seed=seed,
        allow_sparsity_change=allow_sparsity_change,
    )
    shapes = {name: rule.shape for name, rule in parameterization.rules.items()}
    _check_shapes(shapes, model, "its config builds")
    backend = _choose_experts(model, experts)
    if reinit:
        assert seed is not None
        check_writable(model)
        initialize(model, {name: (rule.init, rule.padding) for name, rule in parameterization.rules.items()}, seed)
    if backend is not None:
        model.set_experts_implementation(backend)
    model.config.moe_param = parameterization.to_dict()
    model._moe_param = True  # type: ignore[assignment]
    return parameterization


def _is_parameterized(model: PreTrainedModel) -> bool:
    """By this process (the model is marked), or by the one that saved what it was loaded from.

    The record in the config alone does not tell: models built from one config object share it.
    """
    recorded = getattr(model.config, "moe_param", None) is not None
    return getattr(model, "_moe_param", False) or (recorded and bool(model.config.name_or_path))


def _tuned(
    path: str | Path,
    spec: Any,
    init_std: float | None,
    constants: Mapping[str, Mapping[str, float]] | None,
) -> tuple[PretrainedConfig, str, float | None, Mapping[str, Mapping[str, float]] | None]:
    tuned = read_tuned(path)
    given = {"init_std": init_std, "constants": constants, "spec": None if spec == DEFAULT_SPEC else spec}
    for name, value in given.items():
        if value is not None and value != getattr(tuned, name):
            raise ParameterizationError(
                f"{name} is {value!r} here and {getattr(tuned, name)!r} in {path}: leave it to the file, or give "
                "base_shape as a Shape"
            )
    return tuned.base, tuned.spec, tuned.init_std, tuned.constants


def _choose_experts(model: PreTrainedModel, experts: str | None) -> str | None:
    if experts is None:
        return None
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from moe_param.experts import is_available

    if experts != "auto":
        if experts not in ("eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()):
            valid = ", ".join(["eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())])
            raise ParameterizationError(f"unknown experts implementation {experts!r} (valid: {valid}, auto)")
        return experts
    if model.device.type == "cuda" and is_available():
        return "megablocks"
    reason = "it is not installed" if model.device.type == "cuda" else f"it does not run on {model.device.type}"
    _say_once(
        f"experts='auto': no megablocks, {reason}; transformers' own experts implementation "
        f"({model.config._experts_implementation}) stays"
    )
    return None


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning(message)


def _check_sparsity(base: Shape, target: Shape, allowed: bool) -> None:
    if base.sparsity == target.sparsity:
        return
    message = (
        f"the target activates {target.top_k} of {target.num_experts} experts, the base {base.top_k} of "
        f"{base.num_experts}: the rules hold at fixed sparsity top_k / num_experts (arXiv:2601.20205, Section 3.2)."
    )
    if not allowed:
        raise ParameterizationError(message + " Scale top_k with num_experts, or pass allow_sparsity_change=True.")
    warnings.warn(
        message + " The paper saw the transferred optimum degrade slowly when sparsity changes (Figure 11).",
        stacklevel=4,
    )


def _check_numbers(init_std: float | None, constants: Mapping[str, Mapping[str, float]] | None) -> None:
    if init_std is not None and not _positive(init_std):
        raise ParameterizationError(f"init_std must be a positive number, got {init_std!r}")
    if constants is not None and not isinstance(constants, Mapping):
        raise ParameterizationError(f"constants must map roles to {{'init': c, 'lr': c}}, got {constants!r}")
    for role, values in (constants or {}).items():
        if role not in ROLES:
            raise ParameterizationError(f"constants: unknown role {role!r} (valid: {', '.join(ROLES)})")
        if not isinstance(values, Mapping):
            raise ParameterizationError(f"constants.{role} must be a mapping like {{'lr': 0.5}}, got {values!r}")
        for key, value in values.items():
            if key not in ("init", "lr"):
                raise ParameterizationError(f"constants.{role}: unknown key {key!r} (valid: init, lr)")
            if not _positive(value):
                raise ParameterizationError(f"constants.{role}.{key} must be a positive number, got {value!r}")


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _check_shapes(expected: Mapping[str, tuple[int, ...]], model: PreTrainedModel, source: str) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        raise ParameterizationError(
            f"{type(model).__name__} is quantized ({type(quantizer).__name__}): parameterize the model it was made from"
        )
    actual = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = [
        f"{n}: {source} {expected[n]}, the model has {actual[n]}"
        for n in actual
        if expected.get(n, actual[n]) != actual[n]
    ]
    wrong += [f"{n}: not in what {source}" for n in actual if n not in expected]
    wrong += [f"{n}: {source} {expected[n]}, the model has no such parameter" for n in expected if n not in actual]
    if wrong:
        listing = "\n  ".join(wrong[:20]) + (f"\n  … and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise ShapeError(f"{type(model).__name__} does not match:\n  {listing}")


# -- encoding --------------------------------------------------------------------------------------------------------
def _encode(rule: Rule) -> dict[str, Any]:
    values = {k: v for k, v in asdict(rule).items() if k != "init"}
    values["shape"], values["folded"] = list(rule.shape), list(rule.folded)
    values["init"] = {k: v for k, v in asdict(rule.init).items() if v != 0.0}
    return values


def _decode(entry: Mapping[str, Any]) -> Rule:
    values = {k: v for k, v in entry.items() if k not in ("parameter", "layers")}
    values["shape"], values["folded"] = tuple(values["shape"]), tuple(values["folded"])
    values["init"] = InitLaw(**values["init"])
    return Rule(**values)


def _spans(layers: list[int]) -> list[list[int]]:
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return spans


def _describe_init(law: InitLaw) -> str:
    if law.kind == "constant":
        return f"= {law.value:.4g}"
    if law.kind == "special":
        return "transformers' own" + (f" × {law.std:.4g}" if law.std not in (0.0, 1.0) else "")
    return f"{law.kind} {law.std:.4g}"


def _ratios(base: Shape, target: Shape) -> str:
    def each() -> Iterator[str]:
        for name, value in asdict(target).items():
            before = getattr(base, name)
            if value is not None:
                yield f"{name} {before} → {value}" if before != value else f"{name} {value}"

    return ", ".join(each())
