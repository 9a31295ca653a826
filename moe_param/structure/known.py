"""Whether anybody has looked at a family: what is read of one that nobody knows is settled by measuring it."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import resources

import transformers
import yaml
from packaging.version import Version
from transformers import PretrainedConfig

from moe_param.structure.adapters import registered


@cache
def looked_at() -> tuple[frozenset[str], Version]:
    """The model types our tests cover, and the newest transformers they were run with."""
    found = yaml.safe_load((resources.files("moe_param.structure") / "known.yaml").read_text())
    return frozenset(found["model_types"]), Version(found["transformers"])


def unfamiliar(config: PretrainedConfig) -> str | None:
    """One line for a family that no test covers, and none has an adapter registered for, or for a transformers newer
    than was tested; None where somebody has looked."""
    model_type = config.get_text_config().model_type
    model_types, newest = looked_at()
    if registered(model_type):
        return None
    if model_type not in model_types:
        why = f"nobody has looked at {model_type} yet"
    elif Version(transformers.__version__).release[:2] > newest.release[:2]:
        why = f"nobody has looked at {model_type} in transformers {transformers.__version__} yet ({newest} is tested)"
    else:
        return None
    return (
        f"{why}: its roles are what its forward pass says. What settles them is a measurement: "
        "moe-param coord-check CONFIG --base width=… --axis width --out FOLDER"
    )


_said: set[str] = set()


def say_once(config: PretrainedConfig, stacklevel: int) -> None:
    """Warns of an unfamiliar family, once per process and model type."""
    model_type = config.get_text_config().model_type
    line = None if model_type in _said else unfamiliar(config)
    if line is not None:
        _said.add(model_type)
        warnings.warn(line, stacklevel=stacklevel + 1)
