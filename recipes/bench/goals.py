"""The speed goals, all of them: what a number is held against wherever it is measured, reported or documented."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A bound on one number, which is at its best in `at_least` or below it."""

    what: str
    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    @property
    def text(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"


LARGE, COARSE = 32768, 1024
"""Tokens, and an expert size, from which the grouped products should run like a dense one."""

GOALS = {
    "fastest other": Goal(
        "time of the fastest other implementation / `megablocks` (`auto`), every shape", 1.0, at_least=True
    ),
    "eager": Goal("time of eager / `megablocks` (`auto`), every shape", 1.5, at_least=True),
    "dense": Goal(
        f"time of `megablocks` (`auto`) / dense MLP of the same FLOPs, {LARGE} tokens, experts of {COARSE} or more",
        1.25,
    ),
    "balancing": Goal("time of a step with balancing / without", 1.005),
    "balancing waits": Goal("synchronizations that balancing adds to a step", 0),
    "step, Adam": Goal("time of a step with our groups of AdamW / with Trainer's", 1.005),
    "step, Muon": Goal("time of a step with our groups of Muon / with torch's on every matrix by itself", 1.005),
    "training": Goal(
        "tokens a second of a training run, `megablocks` (`auto`) / `grouped_mm`, 100M active parameters",
        1.0,
        at_least=True,
    ),
    "same loss": Goal("difference of the two runs' validation losses, nats per token", 0.02),
}
"""By name. The numbers are those of one GPU, in bf16; what a CPU is held against stands beside its benchmark."""


def held(name: str, value: float, **details: Any) -> dict[str, Any]:
    """A measured number beside its goal, as reports keep it."""
    goal = GOALS[name]
    return {"goal": name, "bound": goal.bound, "value": value, "met": goal.met(value), **details}


def collect(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The numbers beside goals in what a benchmark left behind."""
    return [found for result in report.get("results", ()) for found in result.get("goals", ())]


def worst(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each goal the number furthest from it, with how many there were and how many met it."""
    rows: dict[str, dict[str, Any]] = {}
    for name, goal in GOALS.items():
        mine = [one for one in found if one["goal"] == name]
        if mine:
            pick = min if goal.at_least else max
            value = pick(mine, key=lambda one: one["value"])
            rows[name] = {**value, "numbers": len(mine), "met_by": sum(one["met"] for one in mine)}
    return rows


def table(found: list[dict[str, Any]], heading: str = "measured") -> str:
    """In Markdown: every goal, and the number beside it, or that there is none."""
    rows, lines = worst(found), [f"| number | goal | {heading} |", "|---|---|---|"]
    for name, goal in GOALS.items():
        measured = "not measured"
        if row := rows.get(name):
            measured = f"{row['value']:.4g}, {'met' if row['met'] else 'missed'}"
            if row["numbers"] > 1:
                measured = f"{row['value']:.4g} at worst, met by {row['met_by']} of {row['numbers']}"
        lines.append(f"| {goal.what} | {goal.text} | {measured} |")
    return "\n".join(lines)
