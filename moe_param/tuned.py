"""What was found at a base, from the file it was written to: `apply(model, "best.yaml")`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PretrainedConfig

from moe_param.errors import MoeParamError
from moe_param.scaling.spec import DEFAULT_SPEC
from moe_param.structure.shape import SIZES, Shape, scale_config


class TunedError(MoeParamError):
    """Tuned numbers, or the base they are for, that cannot be read or contradict each other."""


@dataclass(frozen=True)
class Tuned:
    """The base and what was found there. learning_rate is for the optimizer; the rest is what `apply` takes."""

    base: PretrainedConfig
    spec: str
    init_std: float | None
    constants: Mapping[str, Mapping[str, float]] | None
    learning_rate: float | None


def read_tuned(path: str | Path) -> Tuned:
    """Reads a YAML file as `moe_param.tuning.sweep` writes it and `moe_param.training.pretrain --config` takes it.

    Keys: model (folder or Hub id of a config) or model_type, overrides (config attributes), base_shape (sizes that
    change it), spec, init_std, constants, learning_rate, tuned_at (the base's sizes, checked). Others are for training.

    Raises:
        TunedError: no such file, no model in it, or a base that is not the one the numbers were found at.
    """
    values = read_yaml(path)
    if ("model" in values) == ("model_type" in values):
        raise TunedError(f"{path}: expected one of model and model_type, as moe_param.tuning.sweep writes it")
    try:
        config = build_config(values.get("model"), values.get("model_type"), values.get("overrides") or {})
        base = scale_config(config, **(values.get("base_shape") or {}))
        if values.get("tuned_at"):
            check_tuned_at(base, values["tuned_at"])
    except (ValueError, TypeError) as error:
        raise TunedError(f"{path}: {str(error).splitlines()[0]}") from error
    return Tuned(
        base,
        values.get("spec", DEFAULT_SPEC),
        values.get("init_std"),
        values.get("constants") or None,
        values.get("learning_rate"),
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        TunedError: no such file, not YAML, something else than a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise TunedError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise TunedError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise TunedError(f"{path}: expected a mapping of names to values")
    return values


def build_config(model: str | None, model_type: str | None, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """The config of `model` (a folder or Hub id) or the default one of `model_type`, with attributes replaced.

    Raises:
        TunedError: no such model, attributes that its config does not have.
    """
    try:
        if model:
            config = AutoConfig.from_pretrained(model, **overrides)
        else:
            config = AutoConfig.for_model(model_type or "", **overrides)
    except (ValueError, OSError) as error:
        raise TunedError(f"no config for {model or model_type!r}: {str(error).splitlines()[0]}") from error
    if hasattr(config, "moe_param"):  # of the run that wrote this config; what is built of it starts from scratch
        del config.moe_param
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
    shape = Shape.from_config(base)
    wrong = []
    for size in dict.fromkeys((*SIZES, *tuned_at)):
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
