"""Optimizer groups: what is in them, what they hold under wrappers and schedules, and in a real Trainer."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType

import moe_param
from moe_param import OptimizerError, Parameterization, check_schedule, scale_config
from moe_param.scaling.spec import presets
from tests.models import CORE, build, classes, tiny_config, tokens

LR, EPS, DECAY = 3e-3, 1e-9, 0.2


@functools.cache
def scaled(family: str, spec: str = "moe-completep") -> tuple[Any, Parameterization]:
    """Every axis at a ratio of its own, so that groups do not merge by accident: ×4, ×2, ×3, ×5."""
    base = tiny_config(family)
    shape = moe_param.Shape.from_config(base)
    depth = shape.depth if spec == "kakao" else 2 * shape.depth
    config = scale_config(base, width=256, depth=depth, num_experts=24, expert_size=5 * shape.expert_size)
    with torch.device("meta"):
        model = classes(family)[0](config)
    return model, moe_param.plan(type(model), config, base, spec=spec)


def small() -> tuple[Any, Parameterization]:
    model = build("mixtral", hidden_size=128, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=2)
    base = tiny_config("mixtral", num_hidden_layers=2)
    return model, moe_param.apply(model, base, seed=1, experts=None)


# -- groups ----------------------------------------------------------------------------------------------------------
# The issue asks for a dozen. Two families have one more where every axis has a ratio of its own: gpt_oss has biases of
# four scales (router, experts up, experts down, projections), jamba has norms of two sizes inside its mixer.
MOST = {"gpt_oss": 13, "jamba": 13}


@pytest.mark.parametrize("family", CORE)
def test_groups_are_few_complete_and_in_order(family: str) -> None:
    for spec in presets() if family == "mixtral" else ("moe-completep", "standard"):
        model, parameterization = scaled(family, spec)
        groups = parameterization.param_groups(model, lr=LR, eps=EPS, weight_decay=DECAY)
        assert len(groups) <= MOST.get(family, 12)
        assert groups[0]["lr"] == LR
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names = [name for group in groups for name in group["names"]]
        assert len(names) == len(set(names))
        assert set(names) == set(trainable)
        for group in groups:
            assert all(trainable[n] is p for n, p in zip(group["names"], group["params"], strict=True))
            for name in group["names"]:
                rule = parameterization.rules[name]
                expected = (LR * rule.lr, EPS * rule.eps, DECAY * rule.weight_decay)
                assert (group["lr"], group["eps"], group["weight_decay"]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("family", CORE)
def test_matrices_are_decayed_alike_and_nothing_else_is(family: str) -> None:
    model, parameterization = scaled(family)
    parameters = dict(model.named_parameters())
    biases_of_experts = {n for n in parameters if n.endswith("_proj_bias")}
    for group in parameterization.param_groups(model, lr=LR, eps=EPS, weight_decay=DECAY):
        for name in group["names"]:
            vector = parameters[name].dim() < 2 or name in biases_of_experts or name.endswith("A_log")
            assert group["lr"] * group["weight_decay"] == pytest.approx(0.0 if vector else LR * DECAY, rel=1e-9), name
    without = parameterization.param_groups(model, lr=LR, eps=EPS)
    assert {group["weight_decay"] for group in without} == {0.0}


@pytest.mark.parametrize("family", CORE)
def test_at_the_base_there_is_one_learning_rate(family: str) -> None:
    config = tiny_config(family)
    with torch.device("meta"):
        model = classes(family)[0](config)
    parameterization = moe_param.plan(type(model), config, config)
    assert {(r.lr, r.eps, r.multiplier) for r in parameterization.rules.values() if r.lr} == {(1.0, 1.0, 1.0)}
    groups = parameterization.param_groups(model, lr=LR, eps=EPS, weight_decay=DECAY)
    assert {(g["lr"], g["eps"]) for g in groups} == {(LR, EPS)}
    assert [g["weight_decay"] for g in groups] in ([DECAY, 0.0], [0.0, DECAY])
    assert len(parameterization.param_groups(model, lr=LR, eps=EPS)) == 1
    if family == "mixtral":  # and away from it there are several
        away = moe_param.plan(type(model), config, scale_config(config, width=32))
        assert len({g["lr"] for g in away.param_groups(model, lr=LR)}) > 1


def test_wrapped_models_give_the_same_groups() -> None:
    model, parameterization = small()

    def signature(wrapped: nn.Module) -> list[Any]:
        groups = parameterization.param_groups(wrapped, lr=LR, eps=EPS, weight_decay=DECAY)
        return [(g["names"], [p.data_ptr() for p in g["params"]], g["lr"], g["eps"], g["weight_decay"]) for g in groups]

    plain = signature(model)
    compiled = torch.compile(model, backend="eager")
    assert signature(compiled) == plain
    assert signature(nn.DataParallel(compiled)) == plain
    layer = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, layer))
    assert any("_checkpoint_wrapped_module" in name for name, _ in model.named_parameters())
    assert signature(model) == plain
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    assert signature(model) == plain


def test_names_that_only_look_wrapped_stay() -> None:
    from moe_param.optim.groups import plain_name

    assert plain_name("module._orig_mod.model.layers.0.w") == "model.layers.0.w"
    assert plain_name("model.H_module.layers.0.w") == "model.H_module.layers.0.w"


def test_frozen_parameters_are_left_out() -> None:
    model, parameterization = small()
    model.lm_head.weight.requires_grad_(False)
    groups = parameterization.param_groups(model, lr=LR)
    assert "lm_head.weight" not in {name for g in groups for name in g["names"]}
    assert all(len(g["params"]) == len(g["names"]) > 0 for g in groups)


def test_another_model_is_refused() -> None:
    model, parameterization = small()
    model.probe = nn.Parameter(torch.zeros(3))
    with pytest.raises(OptimizerError, match=r"no rule for \['probe'\]"):
        parameterization.param_groups(model, lr=LR)
    del model.probe
    del model.lm_head
    with pytest.raises(OptimizerError, match=r"no parameter for \['lm_head\.weight'\]"):
        parameterization.param_groups(model, lr=LR)


@pytest.mark.parametrize(
    "numbers",
    [{"lr": 0.0}, {"lr": -1.0}, {"lr": math.nan}, {"lr": 1.0, "eps": -1.0}, {"lr": 1.0, "weight_decay": math.nan}],
)
def test_numbers_out_of_range(numbers: dict[str, float]) -> None:
    model, parameterization = small()
    with pytest.raises(OptimizerError, match="lr must be > 0"):
        parameterization.param_groups(model, **numbers)


# -- decay -----------------------------------------------------------------------------------------------------------
def shrinkage(model: Any, groups: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """What is left of each parameter after so many steps of AdamW whose gradients are zero."""
    before = {name: p.detach().double().norm() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(groups)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    return {name: (p.detach().double().norm() / before[name]).item() for name, p in model.named_parameters()}


SCALES: dict[str, dict[str, int]] = {
    "base": {},
    "width": {"hidden_size": 128},
    "depth": {"num_hidden_layers": 4},
    "experts": {"num_local_experts": 8, "intermediate_size": 96},
}


@pytest.mark.parametrize("scale", SCALES)
def test_decay_shrinks_alike_at_every_scale(scale: str) -> None:
    model = build("mixtral", **{"num_hidden_layers": 2, **SCALES[scale]})
    parameterization = moe_param.apply(model, tiny_config("mixtral", num_hidden_layers=2), seed=1, experts=None)
    step = 0.05 * DECAY
    for settings, steps, expected in (
        ({"decay": "independent"}, 10, (1 - step) ** 10),
        ({"decay": "independent"}, 40, (1 - step) ** 40),  # a longer run forgets more of its start
        ({"decay": "ema", "steps": 10, "base_steps": 10}, 10, (1 - step) ** 10),
        ({"decay": "ema", "steps": 40, "base_steps": 10}, 40, (1 - step / 4) ** 40),  # here it forgets as much
    ):
        groups = parameterization.param_groups(model, lr=0.05, weight_decay=DECAY, **settings)
        for name, left in shrinkage(model, groups, steps).items():
            assert left == pytest.approx(1.0 if "norm" in name else expected, rel=1e-4), (name, settings)
    assert (1 - step / 4) ** 40 == pytest.approx((1 - step) ** 10, rel=0.01)
    assert (1 - step) ** 40 < 0.75 * (1 - step) ** 10


def test_one_decay_for_all_groups_does_not() -> None:
    model, parameterization = small()
    groups = parameterization.param_groups(model, lr=0.05, weight_decay=DECAY)
    for group in groups:
        group["weight_decay"] = DECAY
    left = shrinkage(model, groups, 10)
    assert left["model.layers.0.self_attn.q_proj.weight"] > 1.04 * left["model.embed_tokens.weight"]


def test_no_decay() -> None:
    model, parameterization = small()
    groups = parameterization.param_groups(model, lr=LR, decay="none")
    assert {group["weight_decay"] for group in groups} == {0.0}


@pytest.mark.parametrize(
    "numbers, message",
    [
        ({"decay": "none"}, r"decay 'none' with weight_decay 0.2"),
        ({"decay": "cosine"}, r"choose one of independent, ema, none"),
        ({"decay": "ema"}, r"needs steps .* got steps None, base_steps None"),
        ({"decay": "ema", "steps": 10}, r"got steps 10, base_steps None"),
        ({"decay": "ema", "steps": 10, "base_steps": -1}, r"both positive"),
        ({"steps": 10, "base_steps": 10}, r"belong to decay 'ema'"),
    ],
)
def test_decays_that_cannot_be_meant(numbers: dict[str, Any], message: str) -> None:
    model, parameterization = small()
    with pytest.raises(OptimizerError, match=message):
        parameterization.optimizer_factory(torch.optim.AdamW)()(model, lr=LR, weight_decay=DECAY, **numbers)


# -- the Trainer -----------------------------------------------------------------------------------------------------
class Rates(TrainerCallback):
    def __init__(self) -> None:
        self.lr: list[list[float]] = []
        self.logged: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.optimizer = optimizer
        self.lr.append([group["lr"] for group in optimizer.param_groups])

    def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
        if "learning_rate" in logs:
            self.logged.append(logs["learning_rate"])


def train(
    model: Any, parameterization: Parameterization, folder: Path, schedule: str, steps: int, **kwargs: Any
) -> Rates:
    rates = Rates()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        lr_scheduler_type=schedule,
        max_grad_norm=0.0,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **kwargs,
    )
    rows = tokens(batch=2 * steps)
    data = [{"input_ids": row, "labels": row} for row in rows]
    factory = parameterization.optimizer_factory(torch.optim.AdamW)
    settings = {"lr": LR, "eps": EPS, "weight_decay": DECAY, "betas": (0.9, 0.95)}
    trainer = Trainer(
        model, arguments, train_dataset=data, callbacks=[rates], optimizer_cls_and_kwargs=(factory, settings)
    )
    trainer.train()
    return rates


def test_trainer_takes_the_factory(tmp_path: Path) -> None:
    model, parameterization = small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = train(model, parameterization, tmp_path, "constant", steps=3)
    optimizer = getattr(rates.optimizer, "optimizer", rates.optimizer)
    assert type(optimizer) is torch.optim.AdamW
    expected = parameterization.param_groups(model, lr=LR, eps=EPS, weight_decay=DECAY)
    for found, group in zip(optimizer.param_groups, expected, strict=True):
        assert [id(p) for p in found["params"]] == [id(p) for p in group["params"]]
        for key in ("names", "lr", "eps", "weight_decay"):
            assert found[key] == group[key]
        assert found["betas"] == (0.9, 0.95)
    assert rates.lr == [[group["lr"] for group in expected]] * 3
    assert rates.logged == [LR] * 3
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "schedule, options",
    [
        ("cosine", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("polynomial", {"lr_end": 1e-4}),
    ],
)
def test_multiplicative_schedules_keep_the_ratios(schedule: str, options: dict[str, float], tmp_path: Path) -> None:
    model, parameterization = small()
    rates = train(model, parameterization, tmp_path, schedule, 6, warmup_steps=2, lr_scheduler_kwargs=options)
    check_schedule(schedule)
    expected = [g["lr"] / LR for g in parameterization.param_groups(model, lr=LR, eps=EPS, weight_decay=DECAY)]
    assert len(set(expected)) > 1
    moving = [row for row in rates.lr if row[0]]
    assert len({row[0] for row in moving}) >= 4
    for row in moving:
        assert [lr / row[0] for lr in row] == pytest.approx(expected, rel=1e-12)


# -- schedules that break ratios -------------------------------------------------------------------------------------
def test_a_floor_per_group_breaks_the_ratios_and_is_refused() -> None:
    model, parameterization = small()

    def ratios(optimizer: torch.optim.Optimizer) -> list[float]:
        return [g["lr"] / optimizer.param_groups[0]["lr"] for g in optimizer.param_groups]

    factory = parameterization.optimizer_factory(torch.optim.AdamW)
    optimizer = factory()(model, lr=LR)
    start = ratios(optimizer)
    cosine = CosineAnnealingLR(optimizer, T_max=20)
    for _ in range(10):
        optimizer.step()
        cosine.step()
    assert ratios(optimizer) == pytest.approx(start, rel=1e-9)
    optimizer = factory()(model, lr=LR)
    plateau = ReduceLROnPlateau(optimizer, patience=0, factor=0.5, min_lr=LR / 8)
    for _ in range(10):
        plateau.step(1.0)
    assert ratios(optimizer) != pytest.approx(start, rel=0.1)
    for name in ("reduce_lr_on_plateau", SchedulerType.REDUCE_ON_PLATEAU, "greedy", SchedulerType.GREEDY):
        with pytest.raises(OptimizerError, match=r"schedule (reduce_lr_on_plateau|greedy) sets each group's"):
            check_schedule(name)


@pytest.mark.parametrize("name", sorted(s for s in SchedulerType if s not in ("reduce_lr_on_plateau", "greedy")))
def test_the_other_schedules_of_transformers_pass(name: SchedulerType) -> None:
    check_schedule(name)
    check_schedule(name.value)
