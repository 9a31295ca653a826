"""`register_adapter`: what `adapters.yaml` says, for a model of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from moe_param import RoleError, ShapeError, register_adapter, scale_config
from moe_param.structure import adapters
from moe_param.structure.adapters import AdapterError, adapter_for
from moe_param.structure.roles import read_structure
from tests.models import FAMILIES, tiny_config


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    before = dict(adapters._registered)  # what a model that another test imported says of itself
    yield
    adapters._registered.clear()
    adapters._registered.update(before)


class OwnConfig(MixtralConfig):
    model_type = "own_mixtral"


class OwnMixtral(MixtralForCausalLM):
    """Holds a matrix that text never reaches."""

    config_class = OwnConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.vision_gate = nn.Linear(config.hidden_size, 8, bias=False)


def own_config() -> OwnConfig:
    return OwnConfig(**FAMILIES["mixtral"]["tiny_config"])


def test_a_role_for_what_text_never_reaches() -> None:
    """Also after the model was read without it: what is remembered of a model goes with its adapter."""
    with pytest.raises(RoleError, match=r"register_adapter\('own_mixtral'"):
        read_structure(OwnMixtral, own_config())
    register_adapter("own_mixtral", {"roles": {r"mlp\.vision_gate\.weight": "router"}})
    found = read_structure(OwnMixtral, own_config()).parameters
    assert found["model.layers.0.mlp.vision_gate.weight"].role == "router"


def test_an_axis_that_cannot_be_scaled() -> None:
    register_adapter("mixtral", {"refuse": {"depth": "its layers share their weights"}}, replace=True)
    with pytest.raises(ShapeError, match="cannot change depth: its layers share their weights"):
        scale_config(tiny_config("mixtral"), depth=2)


def test_an_entry_is_replaced_only_when_it_is_said() -> None:
    shipped = adapter_for(tiny_config("minimax"))
    with pytest.raises(AdapterError, match=r"minimax has an adapter already.*replace=True"):
        register_adapter("minimax", {"tokens": 16})
    assert adapter_for(tiny_config("minimax")) == shipped
    register_adapter("minimax", {"tokens": 16}, replace=True)
    assert adapter_for(tiny_config("minimax")) == adapters.Adapter(tokens=16)


@pytest.mark.parametrize(
    "entry, complaint",
    [
        ({"role": {}}, "unknown key 'role' .did you mean 'roles'"),
        ({"roles": {"x": "routr"}}, "roles: unknown role 'routr' .did you mean 'router'"),
        ({"roles": {"(": "router"}}, r"'\(' is no regular expression"),
        ({"roles": ["x"]}, "roles must be a mapping"),
        ({"refuse": {"deph": "why"}}, "refuse: unknown dimension 'deph' .did you mean 'depth'"),
        ({"refuse": {"depth": ""}}, r"refuse\.depth must be a sentence"),
        ({"own_factors": {"embedding": {"width": "half"}}}, r"own_factors\.embedding\.width must be a finite number"),
        ({"own_factors": {"embedding": 0.5}}, r"own_factors\.embedding must be a mapping"),
        (
            {"multipliers": {"residual": {"depth": -1}}},
            "multipliers: unknown site 'residual' .did you mean 'residual_br",
        ),
        ({"multipliers": {"attention_logits": {"head_dim": -1}}}, "is read off it: leave that site out"),
        ({"gate": {"score": "sigmoid"}}, "gate: unknown key 'score' .did you mean 'scores'"),
        ({"gate": {"groups": "max3"}}, r"gate\.groups must be one of 'max', 'top2', got 'max3'"),
        ({"gate": {"divide": 2}}, r"gate\.divide must be the name of an attribute"),
        ({"tokens": 0}, "tokens must be a whole number above 0"),
        ({"normed_stream": "yes"}, "normed_stream must be true or false"),
        ("router", "expected a mapping"),
    ],
)
def test_what_an_entry_may_not_say(entry: Any, complaint: str) -> None:
    with pytest.raises(AdapterError, match=complaint):
        register_adapter("own_mixtral", entry)
    assert "own_mixtral" not in adapters.adapters()


def test_entries_cannot_be_changed_in_place() -> None:
    given = {"refuse": {"depth": "why"}}
    register_adapter("own_mixtral", given)
    given["refuse"]["width"] = "no"
    assert set(adapter_for(own_config()).refuse) == {"depth"}
    for entry in (adapter_for(own_config()).refuse, adapters.adapters()["gemma4_text"].own_factors["router"]):
        with pytest.raises(TypeError):
            entry["width"] = 1.0  # type: ignore[index]
