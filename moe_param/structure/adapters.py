"""The table of exceptions: what structure cannot tell of a family (`adapters.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Adapter:
    """One entry; the keys are explained in `adapters.yaml`. The empty adapter is every family's default."""

    residual: str | None = None
    normed_stream: bool = False
    own_factors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    tokens: int = 8
    roles: Mapping[str, str] = field(default_factory=dict)
    gate: Mapping[str, Any] | str = field(default_factory=dict)
    refuse: Mapping[str, str] = field(default_factory=dict)


@cache
def adapters() -> Mapping[str, Adapter]:
    """All entries, by model_type."""
    text = (resources.files("moe_param.structure") / "adapters.yaml").read_text()
    return {model_type: Adapter(**entry) for model_type, entry in yaml.safe_load(text).items()}


def adapter_for(config: PretrainedConfig) -> Adapter:
    """The entry of a config's model_type (of its text part where it is composite)."""
    return adapters().get(config.get_text_config().model_type, Adapter())
