"""The coordinate check itself: exact, resumable, and clear about bad input. Its verdicts are tested in test_scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from moe_param import Shape, ShapeError, StructureError
from moe_param.checks.coordinates import CoordCheck, CoordCheckError, coord_check, expert_activations
from moe_param.structure.trace import is_experts
from tests.models import build, tiny_config, tokens

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
CONFIG = tiny_config("mixtral", **SIZES, intermediate_size=16)
BASE = Shape(width=32, depth=1, num_experts=8, top_k=2, expert_size=16)


def small(**changes: object) -> CoordCheck:
    return coord_check(CONFIG, BASE, **{"axis": "width", "factors": (1, 2), "steps": 2, "seeds": 2, **changes})  # type: ignore[arg-type]


def test_two_checks_agree_exactly_and_processes_do_not_matter() -> None:
    first, second = small(), small(processes=2)
    assert first.records == second.records
    assert first.slopes == second.slopes


def test_an_interrupted_check_resumes(tmp_path: Path) -> None:
    log = tmp_path / "runs.jsonl"
    whole = small(resume=log)
    lines = log.read_text().splitlines()
    assert len(lines) == 4
    log.write_text("\n".join(lines[:3]) + "\n")
    marked = json.loads(lines[0])
    marked["loss"][0] = 123.0  # a finished run is taken from the file, not repeated
    log.write_text("\n".join([json.dumps(marked), *lines[1:3]]) + "\n")
    again = small(resume=log)
    assert again.records[0]["loss"][0] == 123.0
    assert again.records[1:] == whole.records[1:]
    assert len(log.read_text().splitlines()) == 4
    other = small(resume=log, lr=2**-5)  # other numbers are other runs
    assert other.records[0]["loss"][0] != 123.0


def test_seeds_give_confidence_intervals() -> None:
    slope = small(seeds=3).slopes["change"]["residual"]
    assert slope.low < slope.value < slope.high
    single = small(seeds=1).slopes["change"]["residual"]
    assert single.value == single.value and single.low != single.low  # nan: one seed has no spread


def test_the_users_batch_is_used() -> None:
    batch = tokens(128, 2, 8, seed=5)
    assert small(batch=batch).records != small().records


def test_picture_and_json(tmp_path: Path) -> None:
    result = small()
    result.plot(tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads(result.to_json(tmp_path / "check.json"))
    assert data == json.loads((tmp_path / "check.json").read_text())
    assert set(data["verdicts"]) == set(result.quantities)
    assert data["records"][0]["weights"]["router"] > 0


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "aria", "muse_spark"])
def test_single_experts_add_up_to_the_experts_module(family: str) -> None:
    """The recorded hidden units and outputs are the module's own: weighted and summed they are its output."""
    model = build(family)
    experts = next(m for m in model.modules() if is_experts(m))
    width = experts.down_proj.shape[2 if experts.is_transposed else 1]
    hidden_states = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [1, 0], [3, 3]])
    weights = torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
    model.set_experts_implementation("eager")
    with torch.no_grad():
        _, outputs = expert_activations(experts, hidden_states, index)
        if experts.has_post_expert_norm:
            outputs = experts.post_expert_norm(outputs)
        summed = (outputs.view(6, 2, -1) * weights[..., None]).sum(1)
        assert torch.allclose(summed, experts(hidden_states, index, weights), atol=1e-5)


def test_bad_input() -> None:
    with pytest.raises(CoordCheckError, match="unknown axis 'heads'"):
        small(axis="heads")
    with pytest.raises(CoordCheckError, match="at least two factors"):
        small(factors=(2, 2))
    with pytest.raises(CoordCheckError, match=r"width × 1\.25"):
        small(factors=(1, 1.25))
    with pytest.raises(CoordCheckError, match="not whole"):
        small(factors=(1, 1.01))
    with pytest.raises(StructureError, match="no experts"):
        coord_check(BertConfig(), BASE, axis="width")
    with pytest.raises((ShapeError, CoordCheckError), match="sparsemixer"):
        coord_check(tiny_config("phimoe"), Shape.from_config(tiny_config("phimoe")), axis="num_experts")
