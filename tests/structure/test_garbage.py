"""Controls: with any one closing weight, fan-in or fold wrong, the evidence of `test_families` and `test_fans` fails.

For every family one of each kind is made wrong. Which one is drawn by GARBAGE_SEED (default 0): each seed tries others.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from moe_param.structure.roles import Info, Structure
from tests.models import FAMILIES, families
from tests.structure import test_families as evidence
from tests.structure import test_fans as fans
from tests.structure.test_families import NO_CLOSERS, NO_QUERY_FOLD, NOT_IDENTITY, structure_of

SEED = os.environ.get("GARBAGE_SEED", "0")

TOLD = ("expert_up", "expert_down", "dense_up", "dense_down", "shared_up", "shared_down", "attention_out")
"""Roles of matrices whose fan-in `test_fans` can tell in every family."""


def draw(family: str, kind: str, names: list[str]) -> str:
    return random.Random(f"{SEED} {family} {kind}").choice(sorted(names))


def garbled(monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Callable[[Info], Info]]) -> Structure:
    """The family's structure with the entries of some parameters changed, as the tests of evidence will read it."""
    config, structure, trace, shape = structure_of(family)
    changed = {name: change(structure.parameters[name]) for name, change in changes.items()}
    wrong = replace(structure, parameters={**structure.parameters, **changed})
    monkeypatch.setattr(evidence, "structure_of", lambda _: (config, wrong, trace, shape))
    return wrong


def with_site(family: str, site: str) -> list[str]:
    return [name for name, info in structure_of(family)[1].parameters.items() if site in info.sites]


def without(site: str) -> Callable[[Info], Info]:
    return lambda info: replace(info, sites=info.sites - {site})


def fails(test: Any, family: str, name: str) -> None:
    __tracebackhide__ = True
    try:
        test(family)
    except AssertionError:
        return
    pytest.fail(f"{test.__name__} passes with a wrong entry for {name}")


@pytest.mark.parametrize("family", families(sorted(set(FAMILIES) - NO_CLOSERS)))
def test_a_closing_weight_that_is_forgotten(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = draw(family, "closer", with_site(family, "residual_branch"))
    garbled(monkeypatch, family, {name: without("residual_branch")})
    if family in NOT_IDENTITY:
        fails(evidence.test_nothing_inside_silent_branches_reaches_the_stream, family, name)
    else:
        fails(evidence.test_silent_branches_leave_the_residual_stream_alone, family, name)


@pytest.mark.parametrize("family", families(FAMILIES))
def test_a_fold_on_the_logits_at_a_weight_that_does_not_scale_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [name for name, info in structure_of(family)[1].parameters.items() if info.role == "attention_in"]
    name = draw(family, "logits", others)
    changes = {right: without("logits") for right in with_site(family, "logits")}
    garbled(monkeypatch, family, {**changes, name: lambda info: replace(info, sites=info.sites | {"logits"})})
    fails(evidence.test_the_logit_fold_scales_the_logits, family, name)


@pytest.mark.parametrize("family", families(sorted(set(FAMILIES) - set(NO_QUERY_FOLD))))
def test_a_fold_on_queries_that_is_forgotten(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = draw(family, "queries", with_site(family, "attention_logits"))
    garbled(monkeypatch, family, {name: without("attention_logits")})
    fails(evidence.test_the_query_fold_scales_the_attention_logits, family, name)


@pytest.mark.parametrize("family", families(FAMILIES))
def test_a_fan_in_that_is_a_fan_out(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = structure_of(family)[1]
    names = [
        name
        for name in fans.once(evidence.real_model(family), structure)
        if (info := structure.parameters[name]).role in TOLD and info.fan_in != info.fan_out
    ]
    name = draw(family, "fan-in", names)
    wrong = garbled(monkeypatch, family, {name: lambda info: replace(info, fan_in=info.fan_out, fan_out=info.fan_in)})
    monkeypatch.setattr(fans, "once", lambda model, structure: [name])
    assert fans.told(family, structure) == {structure.parameters[name].role}
    with pytest.raises(AssertionError, match=re.escape(name)):
        fans.told(family, wrong)
