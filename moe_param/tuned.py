"""What was found at a base, from the file it was written to: `apply(model, "best.yaml")`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PretrainedConfig

from moe_param.shape import Shape, scale_config


class TunedError(ValueError):
    """A file of tuned numbers that cannot be read, contradicts itself, or is contradicted by the call."""


@dataclass(frozen=True)
class Tuned:
    """The base and what was found there. learning_rate is for the optimizer; the rest is what `apply` takes."""

    base: PretrainedConfig
    spec: str
    init_std: float | None
    constants: Mapping[str, Mapping[str, float]] | None
    learning_rate: float | None


def read_tuned(path: str | Path) -> Tuned:
    """Reads a YAML file as `recipes.sweep` writes it and `recipes.pretrain --config` takes it.

    Keys: model (folder or Hub id of a config) or model_type, overrides (config attributes), base_shape (sizes that
    change it), spec, init_std, constants, learning_rate, tuned_at (the base's sizes, checked). Others are for training.

    Raises:
        TunedError: no such file, no model in it, or a base that is not the one the numbers were found at.
    """
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise TunedError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise TunedError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict) or ("model" in values) == ("model_type" in values):
        raise TunedError(f"{path}: expected a mapping with one of model and model_type, as recipes.sweep writes it")
    overrides: dict[str, Any] = values.get("overrides") or {}
    try:
        if "model" in values:
            base = AutoConfig.from_pretrained(values["model"], **overrides)
        else:
            base = AutoConfig.for_model(values["model_type"], **overrides)
        base = scale_config(base, **(values.get("base_shape") or {}))
        shape = Shape.from_config(base)
    except (OSError, ValueError, TypeError) as error:
        raise TunedError(f"{path}: its base cannot be built: {str(error).splitlines()[0]}") from error
    for size, value in (values.get("tuned_at") or {}).items():
        found = getattr(shape, size, "no such size")
        if found != value:
            raise TunedError(
                f"{path} was tuned at {size} {value}, and describes a base with {found}: "
                "sweep this base, or give the one it was tuned at"
            )
    return Tuned(
        base,
        values.get("spec", "moe-completep"),
        values.get("init_std"),
        values.get("constants") or None,
        values.get("learning_rate"),
    )
