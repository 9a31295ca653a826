"""Weights that were just built are told from loaded and trained ones: what `reinit=None` and `from_model` do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moe_param
from moe_param import Parameterization, ParameterizationError, Shape
from moe_param.fresh import departure, loaded, trained
from moe_param.structure.laws import InitLaw
from moe_param.structure.trace import trace_model
from tests.models import FAMILIES, build, families, tiny_config, tokens
from tests.test_apply import BASE, assert_untouched, snapshot


def train(model: Any, steps: int = 3) -> Any:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        batch = tokens(seed=step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained_checkpoint(folder: Path) -> Any:
    train(build("mixtral")).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def untrained_checkpoint(folder: Path) -> Any:
    build("mixtral").save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def loaded_by_hand(folder: Path) -> Any:
    model = build("mixtral", seed=9)
    model.load_state_dict(train(build("mixtral")).state_dict())
    return model


def in_another_precision(folder: Path) -> Any:
    return trained_checkpoint(folder).to(torch.bfloat16)


def initialized_otherwise(folder: Path) -> Any:
    model = build("mixtral")
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (trained_checkpoint, "holds loaded weights .* is from a checkpoint"),
        (untrained_checkpoint, "holds loaded weights .* is from a checkpoint"),
        (in_another_precision, "holds loaded weights"),
        (loaded_by_hand, r"not as transformers builds them \(.*norm\.weight is not 1 everywhere"),
        (initialized_otherwise, r"lm_head\.weight has root mean square 0\.1, not 0\.02"),
    ],
)
def test_weights_are_overwritten_only_when_it_is_said(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    model = make(tmp_path)
    before = snapshot(model)
    with pytest.raises(ParameterizationError, match=rf"{message}.*reinit=False to keep .* reinit=True to write"):
        moe_param.apply(model, BASE, seed=1)
    assert_untouched(model, before)
    moe_param.apply(model, BASE, seed=1, reinit=True)
    fresh: Any = build("mixtral")
    fresh.to(model.dtype)
    moe_param.apply(fresh, BASE, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_parameterized_checkpoint_is_overwritten_only_when_it_is_said(tmp_path: Path) -> None:
    model = build("mixtral")
    ours = moe_param.apply(model, BASE, seed=1)
    model.save_pretrained(tmp_path)
    there = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ParameterizationError, match=r"already parameterized .*reinit=True"):
        moe_param.apply(there, BASE, seed=2)
    assert moe_param.apply(there, BASE, seed=1, reinit=True) == ours
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), there.parameters(), strict=True))


def test_a_config_from_a_checkpoint_is_no_loaded_weight(tmp_path: Path) -> None:
    """The path of README: the config of a model on the Hub, weights from scratch."""
    build("mixtral").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert model.config.name_or_path == str(tmp_path)
    moe_param.apply(model, BASE, seed=1)
    assert model.config.moe_param["seed"] == 1


@pytest.mark.parametrize("family", families(FAMILIES))
def test_no_false_alarm_on_new_weights_and_none_missed_on_moved_ones(family: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model: Any = build(family, seed=3)
        model.to(dtype)
        laws = trace_model(type(model), model.config)[1].laws
        assert loaded(model) is None
        assert departure(model, laws) is None
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    assert departure(model, laws) is not None


def test_the_tail_of_a_truncated_normal_is_reckoned_with() -> None:
    from moe_param.structure.laws import InitLaw

    model = build("mixtral")
    torch.nn.init.trunc_normal_(model.lm_head.weight, std=0.02, a=-0.02, b=0.02)
    laws = dict(trace_model(type(model), model.config)[1].laws)
    assert departure(model, laws) is not None
    laws["lm_head.weight"] = InitLaw("trunc_normal", std=0.02, bound=0.02)
    assert departure(model, laws) is None


# -- from_model ------------------------------------------------------------------------------------------------------
def recorded_config(folder: Path, family: str = "mixtral", **changes: Any) -> Any:
    model = build(family, **changes)
    base = moe_param.scale_config(model.config, width=32, depth=2)
    moe_param.apply(model, base, seed=1)
    model.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_new_weights_under_a_recorded_config_are_not_taken_for_parameterized_ones(tied: bool, tmp_path: Path) -> None:
    config = recorded_config(tmp_path, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ParameterizationError, match=r"just built .*call moe_param.apply"):
        Parameterization.from_model(model)
    recorded = Parameterization.from_dict(config.moe_param)
    assert moe_param.apply(model, recorded.base_shape, seed=1) == recorded  # the way out that the error names
    right = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), right.parameters(), strict=True))
    assert Parameterization.from_model(model) == Parameterization.from_model(right) == recorded


def test_parameterized_weights_are_taken_for_what_they_are(tmp_path: Path) -> None:
    recorded_config(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = Parameterization.from_model(model)
    for step in range(2):
        assert Parameterization.from_model(train(model, step)) == expected
    assert Parameterization.from_model(model.to(torch.bfloat16)) == expected
    kept = build("mixtral")  # rates for weights as they were: nothing is claimed of their initialization
    rates = moe_param.apply(
        kept, Shape(width=32, depth=2, num_experts=8, top_k=2, expert_size=96), reinit=False, folds=True
    )
    assert Parameterization.from_model(kept) == rates
    twin = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
    moe_param.apply(twin, twin.config, seed=1)  # at the base the rules are transformers' own
    twin.save_pretrained(tmp_path / "base")
    Parameterization.from_model(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "base")))


def test_a_scalar_parameter_is_no_sign_of_training() -> None:
    module = torch.nn.Module()
    module.scale = torch.nn.Parameter(torch.tensor(1.0))
    assert not trained(module, {"scale": InitLaw("constant", value=1.0)})  # type: ignore[arg-type]
