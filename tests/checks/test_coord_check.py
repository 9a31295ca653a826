"""The coordinate check itself: exact, resumable, and clear about bad input. Its verdicts are tested in test_scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

import moe_param
from moe_param import Shape, ShapeError
from moe_param.checks import measure
from moe_param.checks.coordinates import CoordCheck, CoordCheckError, coord_check
from moe_param.checks.measure import _head
from moe_param.checks.verdicts import GROW, Slope, fit, judge
from moe_param.checks.watch import Watch, expert_hidden, expert_output
from moe_param.errors import InputError
from moe_param.scaling.spec import ScalingSpec
from moe_param.structure.dispatch import is_experts
from tests.models import OWN_EXPERTS, build, tiny_config, tokens

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
    marked = json.loads(lines[0])
    marked["record"]["loss"][0] = 123.0  # a finished run is taken from the file, not repeated
    log.write_text("\n".join([json.dumps(marked), *lines[1:3], lines[3][:100]]))  # a kill cut the last line short
    again = small(resume=log)
    assert again.records[0]["loss"][0] == 123.0
    assert again.records[1:] == whole.records[1:]
    assert [json.loads(line) for line in log.read_text().splitlines()][1:] == [json.loads(line) for line in lines[1:]]


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 2**-5},
        {"spec": "standard"},
        {"batch": tokens(128, 4, 32, seed=9)},
        {"config": tiny_config("mixtral", **SIZES, intermediate_size=16, hidden_act="gelu")},
        {"config": tiny_config("qwen3_moe", **SIZES, moe_intermediate_size=16, mlp_only_layers=[])},
    ],
    ids=["lr", "spec", "batch", "config", "model class"],
)
def test_runs_of_other_settings_are_not_taken_for_these(tmp_path: Path, changes: dict[str, Any]) -> None:
    log = tmp_path / "runs.jsonl"
    quick: dict[str, Any] = {"axis": "width", "factors": (1, 2), "steps": 1, "seeds": 1, "config": CONFIG}
    first = coord_check(base_shape=BASE, resume=log, **quick)
    other = coord_check(base_shape=BASE, resume=log, **(quick | changes))
    assert other.records != first.records
    assert len(log.read_text().splitlines()) == 4


def test_a_file_that_holds_something_else_is_named(tmp_path: Path) -> None:
    log = tmp_path / "runs.jsonl"
    log.write_text("{}\nhello\n")
    with pytest.raises(InputError, match=r"runs\.jsonl, line 2"):
        small(resume=log)


def wrong_router(exponent: float) -> ScalingSpec:
    """The default table, but the router's learning rate follows width with another exponent than -1."""
    table = ScalingSpec.load("moe-completep").to_dict()
    table["roles"]["router"]["lr"] = {"fan_in": exponent} if exponent else {}
    return ScalingSpec.from_dict({**table, "name": "wrong router"})


def test_text_fails_a_wrong_router_rule_that_random_tokens_pass() -> None:
    """On random ids a router learns nothing that stays: its change falls as width^-0.4, and hides half the error."""
    config = tiny_config("mixtral", **SIZES, intermediate_size=32)
    base = Shape(width=32, depth=1, num_experts=8, top_k=2, expert_size=32)
    settings: dict[str, Any] = {"axis": "width", "factors": (1, 4), "seeds": 3}
    half = wrong_router(-0.5)
    on_random = coord_check(config, base, spec=half, batch=tokens(128, 4, 32), **settings)
    assert on_random.verdicts["router_logits"].passed, on_random.verdicts
    on_text = coord_check(config, base, spec=half, **settings)
    assert on_text.slopes["change"]["router_logits"].value > GROW and not on_text.passed, on_text.verdicts
    assert coord_check(config, base, spec=wrong_router(0), **settings).verdicts["router_logits"].status == "failed"
    assert coord_check(config, base, **settings).slopes["change"]["router_logits"].value < 0  # the right rule


def test_verdicts_of_planted_exponents() -> None:
    def verdict(exponents: list[float], quantity: str = "logits", axis: str = "width") -> str:
        points = [(seed, f, 3 * f**e) for seed, e in enumerate(exponents) for f in (1, 2, 4)]
        return judge(quantity, fit(points), axis).status

    assert verdict([0.0, 0.01, -0.01]) == "passed"
    assert verdict([-0.5, -0.51, -0.49]) == "passed"
    assert verdict([0.5, 0.51, 0.49]) == "failed"
    assert verdict([-0.8, -0.81, -0.79]) == "failed"
    assert verdict([0.15, 0.18, 0.12, 0.21]) == "undecided"  # 0.2 is within the interval
    assert verdict([-2.0, 0.1, 2.0]) == "undecided"  # once "it stays"
    assert verdict([-0.4, -0.41, -0.39], "residual") == "failed"
    assert verdict([-0.4, -0.41, -0.39], "residual", "depth") == "passed"
    assert verdict([0.1]) == "passed" and verdict([0.3]) == "failed"  # one seed: by the value
    assert judge("logits", fit([(0, 1, 0.0), (0, 2, 0.0)]), "width").status == "undecided"  # it never moved
    assert verdict([-0.4], "expert_hidden", "num_experts") == "failed"  # nothing but the sum is an average of experts
    assert verdict([-0.4], "moe_output", "num_experts") == verdict([-0.4], "expert_hidden", "width") == "passed"
    assert verdict([-1.5], "router_logits_by_input") == "passed" and verdict([-1.5], "router_logits") == "failed"
    assert verdict([0.4], "router_logits_by_input") == "failed"
    assert "meant to fade" in judge("logits_by_input", fit([(0, 1, 1.0), (0, 2, 0.4)]), "width").reason
    slope = fit([(seed, f, float(f)) for seed in (0, 1) for f in (1, 2)])
    assert slope == Slope(1.0, 1.0, 1.0)


PARTS = {"expert_output": ("expert_output_by_down", "expert_output_by_up")}


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mixtral", {}), ("gpt_oss", {}), ("deepseek_v3", {}), ("dots1", {}), ("mixtral", {"tie_word_embeddings": True})],
)
def test_the_parts_of_a_change_add_up(family: str, changes: dict[str, Any]) -> None:
    """And each is what it says: with the weights before it changed alone there is no part of the weights, with its own
    weights changed alone none of the input."""
    model, config = build(family, **changes), tiny_config(family, **changes)
    watch, batch = Watch(model, moe_param.apply(model, config, seed=0), _head(model, 0)), tokens(100, 2, 12)
    start = {quantity: values[0].clone() for quantity, values in watch.run(batch).items()}
    names = {quantity: PARTS.get(quantity, (f"{quantity}_by_weight", f"{quantity}_by_input")) for quantity in start}
    names = {quantity: parts for quantity, parts in names.items() if parts[0] in start}
    assert {"attention_output", "router_logits", "expert_hidden", "expert_output", "logits"} <= set(names)

    def change(*changed: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        with torch.no_grad():
            before = {name: p.clone() for name, p in model.named_parameters()}
            for name, p in model.named_parameters():
                if not changed or name.endswith(changed):
                    p += 0.1 * p.std() * torch.randn_like(p) if p.std() > 0 else 0.01 * torch.randn_like(p)
            now = watch.run(batch)
            for name, p in model.named_parameters():
                p.copy_(before[name])
        return {quantity: values[0] - start[quantity] for quantity, values in now.items()}

    everything = change()
    for quantity, (weight, given) in names.items():
        assert everything[weight].abs().max() > 0 and everything[given].abs().max() > 0, quantity
        torch.testing.assert_close(everything[weight] + everything[given], everything[quantity], rtol=1e-4, atol=1e-5)
    if not changes:  # tied, the embedding is the weight of the logits too
        before_it = change("embed_tokens.weight")
        assert all(
            before_it[weight].abs().max() == 0 < before_it[given].abs().max() for weight, given in names.values()
        )
    alone = change("layers.0.self_attn.o_proj.weight")
    assert alone["attention_output_by_weight"].abs().max() > 0 == alone["attention_output_by_input"].abs().max()


def test_runs_that_measured_less_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "runs.jsonl"
    monkeypatch.setattr(measure, "QUANTITIES", measure.QUANTITIES[:3])
    small(resume=log, seeds=1)
    monkeypatch.undo()
    assert "logits_by_input" in small(resume=log, seeds=1).quantities
    assert len(log.read_text().splitlines()) == 4


def test_an_undecided_check_has_not_passed() -> None:
    records = [
        {"factor": f, "seed": s, "loss": [1.0], "init": {"logits": 1.0}, "change": [{"logits": value}]}
        for s, grown in enumerate((0.1, 2.0, 30.0))
        for f, value in ((1, 1.0), (2, grown))
    ]
    result = CoordCheck("width", (1, 2), "moe-completep", BASE, records)
    assert result.status == "undecided" and not result.passed
    assert "more seeds" in result.verdicts["logits"].reason
    found = json.loads(result.to_json())
    assert found["status"] == "undecided" and not found["passed"] and not found["verdicts"]["logits"]["passed"]


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
        now = dict(experts.named_parameters())
        outputs = expert_output(experts, now, expert_hidden(experts, now, hidden_states, index), index)
        if getattr(experts, "has_post_expert_norm", False):  # transformers 5.17 does not know it
            outputs = experts.post_expert_norm(outputs)
        summed = (outputs.view(6, 2, -1) * weights[..., None]).sum(1)
        assert torch.allclose(summed, experts(hidden_states, index, weights), atol=1e-5)


@pytest.mark.parametrize("family", OWN_EXPERTS)
def test_experts_of_another_make_are_watched_where_their_block_adds_them_up(family: str) -> None:
    model, config = build(family), tiny_config(family)
    parameterization = moe_param.apply(model, config, seed=0)
    watch, batch = Watch(model, parameterization, _head(model, 0)), tokens(100, 2, 12)
    before = {quantity: values[0].clone() for quantity, values in watch.run(batch).items()}
    downs = [name for name, rule in parameterization.rules.items() if rule.role == "expert_down"]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(2.0 if name in downs else 1.0)
    after = {quantity: values[0] for quantity, values in watch.run(batch).items()}
    assert not torch.equal(before["moe_output"], after["moe_output"])
    assert torch.equal(before["attention_output"], after["attention_output"])
    if family != "own_stacked":  # its block hands out no scores
        assert torch.equal(before["router_logits"], after["router_logits"])
        assert before["router_logits"].shape[-1] >= (parameterization.shape.num_experts or 0)
        assert before["router_logits"].std() < 1.0 and before["router_logits"].min() < 0, "no probabilities"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": "heads"}, "unknown axis 'heads'"),
        ({"axis": "widht"}, "did you mean 'width'"),
        ({"factors": (2, 2)}, "at least two factors"),
        ({"factors": (1, -2)}, "above 0"),
        ({"factors": (1, 1.25)}, r"width × 1\.25"),
        ({"factors": (1, 1.01)}, "width × 1.01"),
        ({"steps": 0}, "steps is 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"lr": 0.0}, "lr is 0"),
        ({"batch": torch.full((2, 8), 128)}, "holds id 128, and the model has ids 0 to 127"),
        ({"batch": torch.full((2, 8), -1)}, "holds id -1"),
        ({"batch": torch.zeros(2, 8)}, "whole numbers"),
        ({"batch": tokens(128, 2, 8)[0]}, "batch, length"),
        ({"batch": tokens(128, 2, 1)}, "at least two ids"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CoordCheckError, match=message):
        small(**changes)


def test_models_that_cannot_be_checked() -> None:
    with pytest.raises(CoordCheckError, match="is of experts, and a dense model has none"):
        coord_check(BertConfig(), BASE, axis="width")
    with pytest.raises((ShapeError, CoordCheckError), match="sparsemixer"):
        coord_check(tiny_config("phimoe"), Shape.from_config(tiny_config("phimoe")), axis="num_experts")
    with pytest.raises(InputError, match="vocabulary of at least 128 ids, the model has 100"):
        coord_check(tiny_config("mixtral", **SIZES, vocab_size=100), BASE, axis="width")
