"""Muon's rules keep changes the same at every size, and what they could be taken for does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_param.checks.verdicts import GROW, floor
from recipes.evidence.coord_check.muon import BASES, CONTROLS, FACTORS, HERE, Check

pytestmark = pytest.mark.slow


OURS = {"width": (1, 4), "num_experts": (1, 4), "expert_size": (4, 16)}
"""The updates of several steps agree better the larger an expert is, up to some 16 times α = 1: look beyond 4."""


@pytest.mark.parametrize(("axis", "factors"), OURS.items())
def test_changes_neither_grow_nor_vanish(axis: str, factors: tuple[int, ...]) -> None:
    found = Check("mixtral", axis).run(factors, seeds=1)
    change = {quantity: slope.value for quantity, slope in found.slopes["change"].items()}
    assert all(floor(quantity, axis) <= value <= GROW for quantity, value in change.items()), change


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: f"{control.axis}-{control.rule}".replace(" ", "-"))
def test_other_rules_fail(control: Check) -> None:
    """By the quantity that the rule gets wrong, and further than our own rule strays where it is tested above."""
    found = control.run(OURS[control.axis], seeds=1)
    slope = found.slopes["change"][control.wrong].value
    assert found.verdicts[control.wrong].status == "failed" and control.sign * slope > 0.3, found.slopes


def test_the_committed_checks() -> None:
    """Every family and axis is there, none has failed, and every control has."""
    record = json.loads((HERE / "results" / "muon.json").read_text("utf-8"))
    verdicts = {(row["family"], row["axis"], row["rule"]): row["status"] for row in record["rows"]}
    ours = {key: status for key, status in verdicts.items() if key[2] == "moe-completep"}
    assert {key[:2] for key in ours} == {(family, axis) for family in BASES for axis in FACTORS}
    assert "failed" not in ours.values(), ours
    assert {verdicts[control.family, control.axis, control.rule] for control in CONTROLS} == {"failed"}
    reasons = {(row["axis"], row["rule"]): row["reasons"] for row in record["rows"]}
    assert all(control.wrong in reasons[control.axis, control.rule] for control in CONTROLS)
    first, *_, last = record["expert_hidden_by_weight along expert_size"]["iterated"]
    assert max(first) < 1.1 * min(first) and last[1] > 1.2 * last[0], "the first step is the same at every size"


def test_a_control_leaves_everything_else_as_it_is(tmp_path: Path) -> None:
    """What is orthogonalized as one stack is so only while the control runs."""
    stack = next(control for control in CONTROLS if control.whole_stack)
    before = Check("mixtral", "num_experts").run((1, 2), seeds=1).records
    stack.run((1, 2), seeds=1)
    assert Check("mixtral", "num_experts").run((1, 2), seeds=1).records == before
