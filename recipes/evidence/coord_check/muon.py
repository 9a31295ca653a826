"""Coordinate checks of Muon's rules, and of what they must not be taken for.

    python -m recipes.evidence.coord_check.muon

Four families along every axis with our rules; then `CONTROLS` on a Mixtral, which have to fail on the axis that is
named with them. The bases are those of `recipes.evidence.transfer`. Interrupted, the same command goes on. Results:
results/muon.json and results/muon.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.progress import track
from transformers import AutoConfig

from moe_param import Shape
from moe_param.checks.coordinates import CoordCheck, coord_check
from moe_param.optim import muon
from moe_param.training.report import versions
from recipes.evidence.transfer.bases import FAMILIES, SIZES

HERE = Path(__file__).parent
BASES: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "gpt_oss": {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32},
}
FACTORS = {"width": (1, 2, 4, 8), "depth": (1, 2, 4, 8), "num_experts": (1, 2, 4, 8), "expert_size": (1, 4, 16)}
EXPERTS = ("expert_up", "expert_down")
MATRICES = ("attention_in", "attention_out", *EXPERTS)
MATCHED = "0.2·√max(fan_out, fan_in)"
"""As exponents: on width the maximum of every matrix grows with the width; that of experts, from α = 1 on, with their
size."""


@dataclass(frozen=True)
class Check:
    """One row of the page."""

    family: str
    axis: str
    rule: str = "moe-completep"
    roles: tuple[str, ...] = ()
    lr: dict[str, float] | None = None  # of these roles, in place of the table's
    whole_stack: bool = False
    wrong: str = ""  # a control: the quantity that must fail, and
    sign: int = 0  # whether it grows or vanishes

    @property
    def spec(self) -> str | dict[str, Any]:
        if self.lr is None:
            return "moe-completep"
        rows = {role: {"muon": {"lr": self.lr}, "source": "a control"} for role in self.roles}
        return {"name": "control", "source": "a control", "extends": "moe-completep", "roles": rows}

    def run(self, factors: tuple[int, ...], seeds: int, resume: Path | None = None) -> CoordCheck:
        config = AutoConfig.for_model(self.family, **SIZES, **BASES[self.family])
        with one_for_the_whole_stack() if self.whole_stack else contextlib.nullcontext():
            return coord_check(
                config,
                Shape.from_config(config),
                axis=self.axis,
                factors=factors,
                spec=self.spec,
                seeds=seeds,
                optimizer="muon",
                matrix_lr_ratio=4.0,
                resume=None if self.whole_stack else resume,  # what a resume file compares does not have it
            )


@contextlib.contextmanager
def one_for_the_whole_stack() -> Iterator[None]:
    """The experts of a tensor are orthogonalized as the rows of one matrix, part by part."""

    def whole(updates: list[tuple[Any, ...]]) -> None:
        for parameter, full, parts, steps in updates:
            for view, rate in parts:
                view.copy_(muon.orthogonalized(view.flatten(0, 1)[None], steps).reshape(view.shape)).mul_(-rate)
            parameter.add_(full)

    with mock.patch.object(muon, "_apply", whole):
        yield


EXCHANGED = "fan_in and fan_out exchanged"
STACKED = "one for the whole stack"
CONTROLS = (
    Check("mixtral", "width", MATCHED, MATRICES, {"width": 0.5}, wrong="expert_output_by_down", sign=1),
    Check("mixtral", "expert_size", MATCHED, EXPERTS, {"expert_size": 0.5}, wrong="expert_output_by_down", sign=1),
    Check(
        *("mixtral", "expert_size", EXCHANGED, EXPERTS, {"fan_out": -0.5, "fan_in": 0.5}),
        wrong="expert_hidden_by_weight",
        sign=-1,
    ),
    Check("mixtral", "num_experts", STACKED, whole_stack=True, wrong="expert_hidden_by_weight", sign=-1),
)
RULES = tuple(Check(family, axis) for family in BASES for axis in FACTORS)


@dataclass
class Row:
    """What a check came to."""

    family: str
    axis: str
    rule: str
    status: str
    slopes: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, check: Check, found: CoordCheck) -> Row:
        verdicts = found.verdicts
        return cls(
            check.family,
            check.axis,
            check.rule,
            found.status,
            {quantity: round(slope.value, 3) for quantity, slope in found.slopes["change"].items()},
            {quantity: verdict.reason for quantity, verdict in verdicts.items() if not verdict.passed},
        )

    @property
    def worst(self) -> str:
        """The quantity that did not pass and moves most; the one that moves most where all did."""
        quantity = max(self.reasons or self.slopes, key=lambda name: abs(self.slopes[name]))
        return f"{quantity.replace('_', ' ')} {self.slopes[quantity]:+.2f}"


def table(rows: list[Row]) -> str:
    lines = ["| family | axis | rule | verdict | moves most |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {row.family} | {row.axis} | {row.rule} | {row.status} | {row.worst} |" for row in rows]
    return "\n".join(lines)


def exact(matrices: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """U·Vᵀ of the singular value decomposition, directions without a gradient left out."""
    u, values, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    there = (values > 1e-6 * values.max()).double()[..., None]
    return (u @ (there * v)).to(matrices.dtype)


def agreement() -> dict[str, Any]:
    """How much further larger experts move: per step and size, with the iteration and with an exact orthogonalization.
    The first step is the same at every size, so that what grows is how well later steps agree with it."""
    sizes = (1, 4, 16, 64)
    found: dict[str, Any] = {"sizes": sizes}
    for name, how in (("iterated", muon.orthogonalized), ("exact", exact)):
        with mock.patch.object(muon, "orthogonalized", how):
            records = Check("mixtral", "expert_size").run(sizes, seeds=1).records
        steps = range(len(records[0]["change"]))
        found[name] = [[record["change"][step]["expert_hidden_by_weight"] for record in records] for step in steps]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--resume", type=Path, default=Path("runs/muon-checks.jsonl"))
    parser.add_argument("--smallest", action="store_true", help="the first control, two sizes, one seed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.resume.parent.mkdir(parents=True, exist_ok=True)
    checks = CONTROLS[:1] if args.smallest else (*RULES, *CONTROLS)
    rows = []
    for check in track(checks, description="checks"):
        factors = (1, 4) if args.smallest else FACTORS[check.axis]
        rows.append(Row.of(check, check.run(factors, 1 if args.smallest else args.seeds, args.resume)))
    command = "python -m recipes.evidence.coord_check.muon"
    record = {"command": command, "seeds": args.seeds, "versions": versions(), "rows": [vars(row) for row in rows]}
    if not args.smallest:
        record["expert_hidden_by_weight along expert_size"] = agreement()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "muon.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    page = ["# Coordinate checks of Muon", "", f"`{command}`, {args.seeds} seeds, matrix_lr_ratio 4.", "", table(rows)]
    (args.out / "muon.md").write_text("\n".join(page) + "\n", "utf-8")


if __name__ == "__main__":
    main()
