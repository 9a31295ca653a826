"""The studies of transfer: one runs at its smallest, and the page shows what all of them wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

import moe_param
from moe_param.structure.trace import model_class_for
from recipes.evidence.transfer import tables
from recipes.evidence.transfer.bases import BASES, config_of
from recipes.evidence.transfer.horizon import exponents
from recipes.evidence.transfer.run import HERE, JOINT, STUDIES

ROOT = Path(__file__).parents[2]


def test_the_bases_are_alike() -> None:
    """Three families of one shape, and what a study scales stays the family's own business."""
    for base in BASES:
        values = config_of(base)
        config = AutoConfig.for_model(values["model_type"], **values["overrides"])
        shape = moe_param.plan(model_class_for(config), config, config).shape
        assert (shape.width, shape.depth, shape.num_experts, shape.top_k, shape.expert_size) == (32, 2, 8, 2, 32), base
    assert JOINT in STUDIES["axes"].axes and set(STUDIES["axes"].bases) == set(BASES)


@pytest.mark.slow
def test_a_study_at_its_smallest(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.evidence.transfer.run", "tune", "axes", "--smallest"]
    command += ["--bases", "mixtral-stdlib", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "tune" / "mixtral-stdlib.json").read_text())["full_runs"] <= 20
    record = json.loads((tmp_path / "out" / "axes" / "mixtral-stdlib.json").read_text())
    assert [row["target"] for row in record["summary"]] == ["width=4"]


def test_the_exponent_is_that_of_the_optima() -> None:
    """Parabolas whose lowest points move by a third of an octave for each doubling."""
    losses = {
        f"{longer}/{octave:g}/{seed}": 2.0 + 0.01 * seed + 0.004 * (octave + moved) ** 2
        for longer, moved in ((1, 0.0), (2, 1 / 3), (4, 2 / 3), (8, 1.0))
        for octave in (-2.0, -1.0, 0.0, 1.0)
        for seed in (0, 1)
    }
    curves, found = exponents(losses)
    assert found == pytest.approx([1 / 3, 1 / 3])
    assert curves[8].optima() == pytest.approx([-1.0, -1.0])


def test_the_page_shows_what_the_studies_wrote() -> None:
    """Every table of the page is the one that the records give today."""
    page, results = (HERE / "README.md").read_text("utf-8"), HERE / "results"
    shown = [tables.bases(results), tables.ladders("axes", results), *map(of_study, ("search", "joint"))]
    assert all(len(table.splitlines()) > 3 and table in page for table in shown)


def of_study(name: str) -> str:
    return tables.searches(name, HERE / "results")
