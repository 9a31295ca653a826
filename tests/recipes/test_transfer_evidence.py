"""The studies of transfer: one runs at its smallest, and the page shows what all of them wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import moe_param
from moe_param.structure.trace import model_class_for
from recipes.evidence.transfer import base_size, tables
from recipes.evidence.transfer.bases import BASES, config_of
from recipes.evidence.transfer.horizon import exponents
from recipes.evidence.transfer.run import HERE, JOINT, STUDIES
from tests.models import tiny_config

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


def test_a_base_of_another_size_gives_the_same_rules() -> None:
    """What `base_size` reads its ladders by: from half the base by way of the base is straight from half the base."""
    sizes = [{"hidden_size": 32 * f, "intermediate_size": 16 * f * f, "num_local_experts": 4 * f} for f in (1, 2, 4)]
    half, base, target = (
        tiny_config("mixtral", **size, num_experts_per_tok=2 * f) for f, size in zip((1, 2, 4), sizes)
    )
    cls = model_class_for(base)
    straight = moe_param.plan(cls, target, half).rules
    first, second = moe_param.plan(cls, base, half).rules, moe_param.plan(cls, target, base).rules
    for name, rule in straight.items():
        assert rule.lr == pytest.approx(first[name].lr * second[name].lr), name
        assert rule.eps == pytest.approx(first[name].eps * second[name].eps), name
        if rule.init_std is not None:
            scales = [found[name].init_std / 0.02 for found in (first, second)]
            assert rule.init_std == pytest.approx(0.02 * scales[0] * scales[1]), name


def test_a_base_is_judged_by_its_rung_and_its_optimum() -> None:
    """Parabolas with known optima: half the width a whole octave lower, the target half an octave higher."""

    def record(**optima: float) -> dict[str, Any]:
        runs = {
            f"moe-completep/{name}/{octave:g}/{seed}": 2.0 + 0.01 * (octave - best) ** 2
            for name, best in optima.items()
            for octave in (-2.0, -1.0, 0.0, 1.0)
            for seed in (0, 1)
        }
        return {"runs": runs, "active_parameters": {name: 100 + i for i, name in enumerate(optima)}}

    found = {
        "base_size": record(**{"base": 0.0, "width=0.5": -1.0, JOINT: 0.5}),
        "axes": record(**{"base": 0.0, "width=4": 0.0, JOINT: 0.5}),
    }
    by_name = {size.name: size for size in base_size.sizes(found)}
    assert set(by_name) == {"base", "width=0.5", "width=4"}
    assert by_name["width=0.5"].best == -1 and by_name["width=0.5"].drift == pytest.approx(1.5)
    assert by_name["width=0.5"].regret == pytest.approx((2 + 0.01 * 1.5**2) / (2 + 0.01 * 0.5**2) - 1)
    assert by_name["base"].drift == pytest.approx(0.5) and by_name["base"].regret == pytest.approx(0)


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
    shown = [tables.bases(results), tables.horizons(results), base_size.base_sizes(results)]
    shown += [tables.searches(name, results) for name in ("search", "joint")]
    shown += [tables.ladders(name, results) for name in ("axes", "specs", "specs_depth", "expert_size", "router")]
    assert all(len(table.splitlines()) > 2 and table in page for table in shown)
