"""What was found at a base, from the file it was written to: `apply(model, "tuned.yaml")`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from moe_param.errors import MoeParamError
from moe_param.naming import check_known, parse_sizes
from moe_param.optim.adam import ADAMS
from moe_param.optim.groups import DECAYS
from moe_param.scaling.spec import DEFAULT_SPEC
from moe_param.structure.scaling_config import scale_config, without_records
from moe_param.structure.shape import SIZES, Shape


class TunedError(MoeParamError):
    """Tuned numbers, or the base they are for, that cannot be read or contradict each other."""


@dataclass(frozen=True)
class TunedNumbers:
    """What was found at the base for the optimizer, under the names of `TrainingArguments`. None: nothing was said.

    learning_rate: peak rate of the base. adam_epsilon, adam_beta1, adam_beta2, weight_decay: of its AdamW. decay:
    what of weight_decay stays constant (`moe_param.optim.groups.DECAYS`). optimizer, matrix_lr_ratio: see
    `Parameterization.optimizer`.
    """

    learning_rate: float | None = None
    adam_epsilon: float | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    weight_decay: float | None = None
    decay: str | None = None
    optimizer: str | None = None
    matrix_lr_ratio: float | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> TunedNumbers:
        """Takes its own fields out of `values`; text is read as a number (YAML reads 1e-12, without a dot, as text).

        Raises:
            TunedError: no number, one out of range, or an unknown convention of decay.
        """
        found: dict[str, Any] = {f.name: values.get(f.name) for f in fields(cls)}
        for name, (least, below) in _RANGES.items():
            if found[name] is None:
                continue
            found[name] = _number(name, found[name])
            if not least <= found[name] < below:
                raise TunedError(f"{name} must be at least {least:g} and below {below:g}, got {found[name]:g}")
        if found["decay"] not in (None, *DECAYS):
            raise TunedError(f"decay {found['decay']!r} is not a convention: choose one of {', '.join(DECAYS)}")
        if found["optimizer"] not in (None, *ADAMS):
            raise TunedError(f"optimizer {found['optimizer']!r} is not one of {', '.join(ADAMS)}")
        return cls(**found)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TunedError(f"{name} must be a number, got {value!r}") from None


_RANGES = {
    "learning_rate": (sys.float_info.min, math.inf),
    "adam_epsilon": (0.0, math.inf),
    "adam_beta1": (0.0, 1.0),
    "adam_beta2": (0.0, 1.0),
    "weight_decay": (0.0, math.inf),
    "matrix_lr_ratio": (sys.float_info.min, math.inf),
}


@dataclass(frozen=True)
class Tuned:
    """A base and what was found there: base, spec, init_std and constants are for `apply`, numbers for the optimizer.

    target: the config at the shape the file says to train (`shape`), the base's own config where it says none.
    """

    base: PretrainedConfig
    target: PretrainedConfig
    spec: str
    init_std: float | None
    constants: Mapping[str, Mapping[str, float]] | None
    numbers: TunedNumbers


def read_tuned(path: str | Path, shape: Mapping[str, int] | None = None) -> Tuned:
    """Reads a YAML file as `moe-param tune` writes it and `moe-param train` takes it.

    Keys: those of `base_and_target`, of `TunedNumbers`, and spec, init_std, constants. Others are for training.
    `shape` takes the place of the file's.

    Raises:
        TunedError: no such file, no model in it, a base that is not the one the numbers were found at, or a number
            out of range.
    """
    values = read_yaml(path)
    if shape is not None:
        values = {**values, "shape": shape, "target_shape": None}
    if ("model" in values) == ("model_type" in values):
        raise TunedError(f"{path}: expected one of model and model_type, as moe-param tune writes it")
    try:
        base, target = base_and_target(values)
        numbers = TunedNumbers.read(values)
        init_std = values.get("init_std")
        init_std = None if init_std is None else _number("init_std", init_std)
    except (ValueError, TypeError) as error:
        raise TunedError(f"{path}: {str(error).splitlines()[0]}") from error
    return Tuned(
        base,
        target,
        values.get("spec", DEFAULT_SPEC),
        init_std,
        values.get("constants") or None,
        numbers,
    )


def base_and_target(values: Mapping[str, Any]) -> tuple[PretrainedConfig, PretrainedConfig]:
    """One config at two shapes: where the numbers were found, and what is trained.

    Keys: model (folder or Hub id of a config) or model_type, overrides (config attributes), base_shape and shape (or
    target_shape; sizes that change the config, each by itself), tuned_at (the base's sizes, checked), imports (modules
    to import first, which register models of your own).

    Raises:
        TunedError: no such module or model, an unknown size, or a base that is not the one the numbers were found at.
        ShapeError: sizes that do not divide.
    """
    import_modules(values.get("imports"))
    config = build_config(values.get("model"), values.get("model_type"), values.get("overrides") or {})
    found = []
    for name in ("base_shape", "shape"):
        sizes = values.get(name) or (values.get("target_shape") if name == "shape" else None) or {}
        if isinstance(sizes, str):
            sizes = parse_sizes(sizes, SIZES, int, option=name)
        if not isinstance(sizes, Mapping):
            raise TunedError(f"{name} is {sizes!r}: expected sizes like width=64,depth=2, or a mapping of them")
        check_known(sizes, SIZES, "size", name, TunedError)
        found.append(scale_config(config, **sizes) if sizes else config)
    base, target = found
    if values.get("tuned_at"):
        check_tuned_at(base, values["tuned_at"])
    return base, target


def import_modules(given: str | Sequence[str] | None) -> list[str]:
    """Imports modules that register models of a user's own with transformers, from the current folder too.

    Args:
        given: one name, several or none, as files and command lines have them.

    Returns:
        The names.

    Raises:
        TunedError: something else than names, no such module, or one that cannot be imported.
    """
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else given or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TunedError(f"imports: expected names of modules, like package.module, found {given!r}")
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` has it, and the console script has not
    for name in names:
        try:
            import_module(name)
        except (ImportError, TypeError, ValueError, AttributeError) as error:
            raise TunedError(
                f"imports: {name!r} cannot be imported ({error}): expected the name of a module, like package.module, "
                f"that is installed or in {os.getcwd()}"
            ) from error
    return names


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        TunedError: no such file, not YAML, something else than a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise TunedError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TunedError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise TunedError(f"{path}: expected a mapping of names to values")
    return values


def build_config(model: str | None, model_type: str | None, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """The config of `model` (a folder or Hub id) or the default one of `model_type`, with attributes replaced.

    Raises:
        TunedError: no such model, attributes that its config does not have.
    """
    if model and not Path(model).exists() and (model.count("/") > 1 or model.startswith(("/", "./", "../", "~"))):
        raise TunedError(f"no folder or file {model}, and it is no Hub id either (owner/name)")
    try:
        if model:
            config = AutoConfig.from_pretrained(model, **overrides)
        else:
            config = AutoConfig.for_model(model_type or "", **overrides)
    except StrictDataclassError as error:
        raise TunedError(f"overrides: {' '.join(str(error).split())}") from error
    except (ValueError, OSError) as error:
        raise TunedError(f"no config for {model or model_type!r}: {str(error).splitlines()[0]}") from error
    config = without_records(config)
    declared = type(config)()
    known = {"head_dim", *declared.to_dict()}  # head_dim: some families read it without declaring it
    unknown = [key for key in overrides if key not in known and not hasattr(declared, key)]
    if unknown:
        raise TunedError(f"overrides: {config.model_type} configs have no {', '.join(unknown)}")
    return config


def check_tuned_at(base: PretrainedConfig, tuned_at: Mapping[str, Any]) -> None:
    """Refuses numbers that were found on another base.

    Raises:
        TunedError: a size that is not the base's, that is not named, or that there is not.
    """
    if not isinstance(tuned_at, Mapping):
        raise TunedError(f"tuned_at is {tuned_at!r}: expected a mapping of sizes, as moe-param tune writes it")
    shape = Shape.from_config(base)
    wrong = []
    for size in dict.fromkeys((*shape.sizes, *tuned_at)):
        found = getattr(shape, size, "unknown")
        if size not in tuned_at:
            wrong.append(f"{size} not named")
        elif tuned_at[size] != found:
            wrong.append(f"{size} {tuned_at[size]}, not {found}")
    if wrong:
        raise TunedError(
            f"tuned_at: the numbers were found on another base than the one described ({'; '.join(wrong)}): "
            "set base_shape to where they were found"
        )
