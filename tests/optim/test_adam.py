"""Which optimizer `Parameterization.optimizer` makes, with which numbers, and what it refuses."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_param
from moe_param import OptimizerError, Parameterization
from moe_param.tuned import TunedNumbers
from tests.models import build, initialized, tiny_config, tokens
from tests.structure.test_roles import WithFrozenProbe

TUNED = TunedNumbers(learning_rate=2e-3, adam_epsilon=1e-11, adam_beta1=0.8, adam_beta2=0.9, weight_decay=0.2)


@functools.cache
def small() -> tuple[Any, Parameterization]:
    """At its base, where every group has the base's numbers."""
    model = build("mixtral")
    return model, moe_param.apply(model, tiny_config("mixtral"), seed=1)


def numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """At the base; decay as lr·λ, which is one number for all matrices."""
    group = optimizer.param_groups[0]
    decays = {f"{g['lr'] * g['weight_decay']:.6g}" for g in optimizer.param_groups if g["weight_decay"]}
    return {"lr": group["lr"], "eps": group["eps"], "betas": group["betas"], "decay": decays}


def test_numbers_are_the_given_then_the_tuned_then_the_papers() -> None:
    model, untuned = small()
    tuned = replace(untuned, tuned=TUNED)
    assert numbers(tuned.optimizer(model)) == {"lr": 2e-3, "eps": 1e-11, "betas": (0.8, 0.9), "decay": {"0.0004"}}
    given = tuned.optimizer(model, lr=1e-3, eps=0.0, betas=(0.5, 0.6), weight_decay=0.0)
    assert numbers(given) == {"lr": 1e-3, "eps": 0.0, "betas": (0.5, 0.6), "decay": set()}
    paper = {"lr": 1e-3, "eps": 1e-12, "betas": (0.9, 0.95), "decay": set()}
    assert numbers(untuned.optimizer(model, lr=1e-3)) == paper
    assert numbers(untuned.optimizer_factory(torch.optim.AdamW)()(model, lr=1e-3)) == paper
    assert numbers(tuned.optimizer_factory()()(model)) == numbers(tuned.optimizer(model))
    half = replace(untuned, tuned=TunedNumbers(adam_beta2=0.9))
    assert numbers(half.optimizer(model, lr=1e-3)) == {**paper, "betas": (0.9, 0.9)}


def test_groups_have_the_same_numbers() -> None:
    model, untuned = small()
    for parameterization, given in ((untuned, {"lr": 1e-3}), (replace(untuned, tuned=TUNED), {})):
        groups = parameterization.param_groups(model, **given)  # type: ignore[arg-type]
        theirs = parameterization.optimizer(model, **given).param_groups  # type: ignore[arg-type]
        assert [(g["lr"], g["eps"], g["weight_decay"]) for g in groups] == [
            (g["lr"], g["eps"], g["weight_decay"]) for g in theirs
        ]
        assert ("betas" in groups[0]) == (parameterization.tuned is not None)  # else they are the constructor's


def test_a_learning_rate_has_no_default() -> None:
    model, untuned = small()
    for tuned in (None, TunedNumbers(weight_decay=0.1)):
        parameterization = replace(untuned, tuned=tuned)
        for make in (parameterization.optimizer, parameterization.param_groups, parameterization.optimizer_factory()()):
            with pytest.raises(OptimizerError, match=r"no learning rate: none was given and none was tuned. Give lr="):
                make(model)


def test_the_tuned_decay_is_taken() -> None:
    model, untuned = small()
    tuned = replace(untuned, tuned=replace(TUNED, decay="ema"))
    with pytest.raises(OptimizerError, match="needs steps"):
        tuned.optimizer(model)
    longer = numbers(tuned.optimizer(model, steps=400, base_steps=100))
    assert longer["decay"] == {"0.0001"}
    with pytest.raises(OptimizerError, match=r"decay 'none' with weight_decay 0\.2"):
        tuned.optimizer(model, decay="none")


class Mine(torch.optim.AdamW):
    pass


class Foreign(torch.optim.Optimizer):
    """An AdamW that does not derive from torch's, as those of other packages."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float, bits: int = 32) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": bits})


class Sign(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float, betas: Any, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})


def test_what_is_adam() -> None:
    model, p = small()
    for name, made in (("adamw", torch.optim.AdamW), ("AdamW", torch.optim.AdamW), ("adam", torch.optim.Adam)):
        assert type(p.optimizer(model, optimizer=name, lr=1e-3)) is made
    assert type(p.optimizer(model, optimizer=Mine, lr=1e-3, amsgrad=True)) is Mine
    foreign = p.optimizer(model, optimizer=Foreign, adam_like=True, lr=1e-3, bits=8)
    assert type(foreign) is Foreign and foreign.param_groups[-1]["bits"] == 8
    assert numbers(foreign) == numbers(p.optimizer(model, lr=1e-3))


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "Adagrad", "RAdam", "Adafactor"])
def test_what_is_not(optimizer: str) -> None:
    model, p = small()
    made = getattr(torch.optim, optimizer)
    for attempt in (lambda: p.optimizer_factory(made), lambda: p.optimizer(model, optimizer=made, lr=1e-3)):
        with pytest.raises(OptimizerError, match=rf"{optimizer} is not Adam: .* say adam_like=True"):
            attempt()
    with pytest.raises(OptimizerError, match=r"'lion' is not one that the rules hold for: 'adamw', 'adam', 'muon'"):
        p.optimizer(model, optimizer="lion", lr=1e-3)


def test_adam_like_is_believed_where_it_can_be() -> None:
    model, p = small()
    with pytest.raises(OptimizerError, match="Foreign is not Adam"):
        p.optimizer(model, optimizer=Foreign, lr=1e-3)
    with pytest.raises(OptimizerError, match="Sign makes Adam's update, but it takes no eps"):
        p.optimizer(model, optimizer=Sign, adam_like=True, lr=1e-3)


def test_decay_inside_the_gradient_is_refused() -> None:
    model, p = small()
    with pytest.raises(OptimizerError, match=r"Adam adds weight_decay 0\.1 to the gradient"):
        p.optimizer(model, optimizer="adam", lr=1e-3, weight_decay=0.1)
    decoupled = p.optimizer(model, optimizer="adam", lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True)
    assert numbers(decoupled) == numbers(p.optimizer(model, lr=1e-3, weight_decay=0.1))


# -- what is trained -------------------------------------------------------------------------------------------------
def test_unfrozen_after_construction_is_refused() -> None:
    model = WithFrozenProbe(tiny_config("mixtral"))
    p = moe_param.apply(model, tiny_config("mixtral"), seed=1)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen and not any(p.rules[name].lr for name in frozen)
    p.optimizer(model, lr=1e-3)
    model.requires_grad_(True)  # what was meant was perhaps the body
    with pytest.raises(OptimizerError, match=rf"no rate for \['{frozen[0]}'.*Freeze them again"):
        p.optimizer(model, lr=1e-3)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    with pytest.raises(OptimizerError, match="no rate for"):
        moe_param.clip_grad_norm_(p, model, 1.0)


def test_a_selection_bias_that_loading_made_trainable_is_left_to_balancing(tmp_path: Path) -> None:
    """transformers builds ernie's frozen, and loads it as any other parameter; no gradient reaches it."""
    moe_param.apply(model := build(initialized("ernie4_5_moe")), tiny_config("ernie4_5_moe"), seed=1)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    biases = {name for name, _ in loaded.named_parameters() if name.endswith("e_score_correction_bias")}
    assert biases and all(loaded.get_parameter(name).requires_grad for name in biases)
    groups = moe_param.Parameterization.from_model(loaded).optimizer(loaded, lr=1e-3).param_groups
    assert not biases & {name for group in groups for name in group["names"]}


def test_a_part_of_a_model_may_be_trained() -> None:
    model, p = small()
    head = build("mixtral", model.config)
    head.requires_grad_(False)
    head.lm_head.requires_grad_(True)
    (group,) = p.optimizer(head, lr=1e-3).param_groups
    assert group["names"] == ["lm_head.weight"]
