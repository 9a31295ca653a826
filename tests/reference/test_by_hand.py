"""The rules of every parameter against `tests/reference/by_hand.py`, which was derived without them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import moe_param
from tests.models import classes
from tests.reference import by_hand
from tests.reference.by_hand import CASES as MIXTURES
from tests.reference.by_hand import Case, Line
from tests.reference.by_hand_dense import DENSE_CASES

CASES = {**MIXTURES, **DENSE_CASES}

STD = 1 / 64

AHEAD = {
    "opt": "an MLP without a module of its own has no role of its own",
}
"""Not read yet."""

EVERY = [
    pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=AHEAD[name])) if name in AHEAD else name
    for name in CASES
]


def rules_of(case: Case, spec: str | None = None) -> Mapping[str, Any]:
    model_class, config_class = classes(case.family)
    base, target = config_class(**case.base), config_class(**case.target)
    return moe_param.plan(model_class, target, base, init_std=STD, spec=spec).rules


def line_of(case: Case, name: str) -> tuple[str, Line]:
    found = [(pattern, line) for pattern, line in case.lines.items() if _fits(pattern, name)]
    assert len(found) == 1, f"{name} is on {len(found)} lines"
    return found[0]


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def seen(rule: Any) -> dict[str, float | None]:
    """A rule in the terms of a `Line`; the decay factor keeps lr·λ."""
    std = None if rule.init_std is None else rule.init_std / STD
    return {"std": std, "constant": rule.constant, "lr": rule.lr, "eps": rule.eps, "decay": rule.weight_decay}


def expected(line: Line) -> dict[str, float | None]:
    decay = 1 / line.lr if line.decay else 0.0
    return {"std": line.std, "constant": line.constant, "lr": line.lr, "eps": line.eps, "decay": decay}


@pytest.mark.parametrize("name", EVERY)
def test_every_rule_is_the_one_derived_by_hand(name: str) -> None:
    case = CASES[name]
    for parameter, rule in rules_of(case).items():
        _, line = line_of(case, parameter)
        assert seen(rule) == pytest.approx(expected(line), rel=1e-12), f"{parameter} ({rule.role})"


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_on_one_line(name: str) -> None:
    case = CASES[name]
    model_class, config_class = classes(case.family)
    with torch.device("meta"):
        model = model_class(config_class(**case.target))
    assert {line_of(case, parameter)[0] for parameter, _ in model.named_parameters()} == set(case.lines)


@pytest.mark.parametrize("spec", ["standard", "mup", "mup-moe", "completep"])
@pytest.mark.parametrize("name", ["mixtral", "llama", "gpt2"])
def test_another_parameterization_is_told_apart(name: str, spec: str) -> None:
    case = CASES[name]
    rules = rules_of(case, spec)
    assert any(seen(rule) != pytest.approx(expected(line_of(case, p)[1]), rel=1e-12) for p, rule in rules.items())


def test_no_size_passes_for_another() -> None:
    """No power of a ratio that stands in a line is a power of another ratio, so a mix-up is another number."""
    names = ("N", "L", "K", "H", "D", "A", "F", "S", "R_Q", "R_KV", "V", "D_OLMOE", "KEYS_OLMOE")
    powers = [round(getattr(by_hand, name) ** e, 9) for name in names for e in (-1.0, -0.5, 0.5, 1.0)]
    assert len(set(powers)) == len(powers)
