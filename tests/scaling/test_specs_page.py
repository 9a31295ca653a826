"""docs/specs.md: its example loads and does what the page says, and no key of the format is missing from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import moe_param
from moe_param import ScalingSpec
from moe_param.scaling import spec
from tests.models import classes, tiny_config

PAGE = (Path(__file__).parents[2] / "docs" / "specs.md").read_text("utf-8")


def test_the_example_of_five_lines(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(example.splitlines()) == 5
    path = tmp_path / "half-router.yaml"
    path.write_text(example, encoding="utf-8")
    (call,) = re.findall(r'spec="(.*?)"', PAGE)
    assert call == path.name == f"{ScalingSpec.load(path).name}.yaml"
    base, target = (tiny_config("mixtral", hidden_size=size) for size in (64, 256))
    plans = [moe_param.plan(classes("mixtral")[0], target, base, spec=s).rules for s in ("moe-completep", path)]
    router = "model.layers.0.mlp.gate.weight"
    assert plans[1][router].init_std == pytest.approx(2 * plans[0][router].init_std)  # 4^-0.5, not 4^-1
    assert {name for name in plans[0] if plans[0][name] != plans[1][name]} == {
        router.replace("0", str(layer)) for layer in range(target.num_hidden_layers)
    }


def test_the_page_names_everything_the_format_has() -> None:
    named = set(re.findall(r"`([\w-]+)`", PAGE))
    everything = {*spec._KEYS, *spec._ROW_KEYS, *spec.DIMENSIONS, *spec.SITES, *spec.ROLES, *spec.presets()}
    assert everything <= named, everything - named
