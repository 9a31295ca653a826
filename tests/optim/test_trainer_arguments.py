"""`Parameterization.trainer_arguments` in real Trainers: what is taken from their arguments, refused, and loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import moe_param
from moe_param import BalanceError, OptimizerError, Parameterization, ReloadError
from moe_param.tuned import TunedNumbers
from tests.models import build, tiny_config, tokens

TUNED = TunedNumbers(learning_rate=2e-3, adam_beta2=0.9, weight_decay=0.2)


def arguments(folder: Path | str, cls: type[TrainingArguments] = TrainingArguments, **changes: Any) -> Any:
    given = {"max_steps": 4, "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    quiet = {"save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 2, "seed": 3}
    return cls(str(folder), **{**given, **quiet, **changes})


def small(tuned: TunedNumbers | None = None, seed: int = 1) -> tuple[Any, Parameterization]:
    model = build("mixtral", hidden_size=128, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=1)
    p = moe_param.apply(model, tiny_config("mixtral", num_hidden_layers=1), seed=seed)
    return model, replace(p, tuned=tuned)


def trainer(model: Any, args: Any, given: dict[str, Any]) -> Trainer:
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=32)]
    return Trainer(model, args, train_dataset=data, eval_dataset=data[:4], **given)


def numbers(given: dict[str, Any]) -> dict[str, Any]:
    found = given["optimizer_cls_and_kwargs"][1]
    return {name: found[name] for name in ("lr", "eps", "betas", "weight_decay")}


# -- numbers ---------------------------------------------------------------------------------------------------------
def test_what_the_arguments_ask_is_what_trains(tmp_path: Path) -> None:
    """Given to the factory alone, they are not seen; that is transformers' doing, and said in the docs."""
    model, p = small()
    asked = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-10}
    args = arguments(tmp_path, **asked)
    run = trainer(model, args, p.trainer_arguments(args))
    run.train()
    wanted = p.param_groups(model, lr=1e-3, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-10)
    found = run.optimizer.param_groups
    for key in ("names", "eps", "weight_decay", "betas"):
        assert [g[key] for g in found] == [g[key] for g in wanted]
    assert [g["initial_lr"] for g in found] == [g["lr"] for g in wanted]
    assert found[0]["fused"]  # as Trainer's own
    blind = trainer(model, args, {"optimizer_cls_and_kwargs": (p.optimizer_factory(), {"lr": 5e-3})})
    assert blind.create_optimizer().param_groups[0]["lr"] == 5e-3


def test_defaults_give_way_to_tuned_numbers_and_the_arguments_say_so(tmp_path: Path) -> None:
    _, p = small(TUNED)
    args = arguments(tmp_path)
    taken = {"lr": 2e-3, "eps": 1e-12, "betas": (0.9, 0.9), "weight_decay": 0.2}
    assert numbers(p.trainer_arguments(args)) == taken
    said = (args.learning_rate, args.adam_epsilon, args.adam_beta1, args.adam_beta2, args.weight_decay)
    assert said == (2e-3, 1e-12, 0.9, 0.9, 0.2)
    assert numbers(p.trainer_arguments(args)) == taken  # a second time too
    given = p.trainer_arguments(arguments(tmp_path), lr=5e-5, betas=(0.5, 0.6), weight_decay=0.0)
    assert numbers(given) == {"lr": 5e-5, "eps": 1e-12, "betas": (0.5, 0.6), "weight_decay": 0.0}


@dataclass
class Own(TrainingArguments):
    learning_rate: float = 7e-3


def test_arguments_of_a_class_of_ones_own_have_their_own_defaults(tmp_path: Path) -> None:
    _, p = small(TUNED)
    assert numbers(p.trainer_arguments(arguments(tmp_path, Own)))["lr"] == 2e-3
    with pytest.raises(OptimizerError, match=r"args.learning_rate is 5e-05, and 0.002 was tuned"):
        p.trainer_arguments(arguments(tmp_path, Own, learning_rate=5e-5))


def test_contradictions(tmp_path: Path) -> None:
    _, p = small(TUNED)
    args = arguments(tmp_path, learning_rate=1e-3)
    with pytest.raises(OptimizerError, match=r"args.learning_rate is 0.001, and 0.002 was tuned at the base"):
        p.trainer_arguments(args)
    with pytest.raises(OptimizerError, match=r"learning_rate is 0.004 in trainer_arguments and 0.001 in args"):
        p.trainer_arguments(args, lr=4e-3)
    assert (args.learning_rate, args.weight_decay) == (1e-3, 0.0)  # nothing was written
    assert numbers(p.trainer_arguments(args, lr=1e-3))["lr"] == 1e-3
    with pytest.raises(OptimizerError, match=r"no learning rate: none was tuned, and args.learning_rate is 5e-05"):
        small()[1].trainer_arguments(arguments(tmp_path))


@pytest.mark.parametrize(
    "changes, given, message",
    [
        ({"max_grad_norm": 1.0}, {}, r"max_grad_norm 1 .* set max_grad_norm=0, .* clip=1"),
        ({"optim": "adafactor"}, {}, r"optim 'adafactor' would be ignored"),
        ({"optim_args": "a=1"}, {}, r"optim_args 'a=1' would be ignored"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, {}, r"schedule reduce_lr_on_plateau"),
        ({"weight_decay": 0.1}, {"decay": "none"}, r"decay 'none' with weight_decay 0\.1"),
        ({}, {"decay": "ema"}, r"got steps 4, base_steps None"),
        ({}, {"optimizer": torch.optim.SGD}, r"SGD is not Adam"),
        ({}, {"clip": -1.0}, r"max_norm must be > 0"),
        ({"weight_decay": 0.1}, {"optimizer": "adam"}, r"Adam adds weight_decay"),
        ({}, {"clip": True}, r"max_norm must be > 0 .* got True"),
        ({}, {"betas": (0.9, 1.5)}, r"betas two numbers from 0 to below 1: .*1\.5"),
        ({"learning_rate": 5e-5}, {"lr": "1e-3"}, r"lr must be > 0, .* got lr '1e-3'"),
        ({"learning_rate": 5e-5}, {"lr": float("inf")}, r"lr must be > 0, .* got lr inf"),
    ],
)
def test_what_would_not_be_done_is_refused(changes: Any, given: Any, message: str, tmp_path: Path) -> None:
    if changes.get("lr_scheduler_type"):
        changes = {**changes, "eval_strategy": "steps", "eval_steps": 2}
    args = arguments(tmp_path, **{"learning_rate": 1e-3, **changes})
    with pytest.raises(OptimizerError, match=message):
        small()[1].trainer_arguments(args, **given)
    assert args.adam_epsilon == 1e-8  # nothing was written


def test_arguments_changed_behind_our_back(tmp_path: Path) -> None:
    model, p = small()
    for name, value, message in (
        ("learning_rate", 1.0, r"args.learning_rate was 0.001 in trainer_arguments and is 1 now"),
        ("max_grad_norm", 1.0, r"max_grad_norm 1 "),
    ):
        args = arguments(tmp_path, learning_rate=1e-3)
        run = trainer(model, args, p.trainer_arguments(args))
        setattr(args, name, value)
        with pytest.raises(OptimizerError, match=message):
            run.train()
    args = arguments(tmp_path, learning_rate=1e-3)
    given = p.trainer_arguments(args)
    del given["optimizer_cls_and_kwargs"]
    with pytest.raises(OptimizerError, match="the optimizer does not train the parameters of this parameterization"):
        trainer(model, args, given).train()


def test_clipping_and_balancing_ride_along(tmp_path: Path) -> None:
    model, p = small()
    args = arguments(tmp_path, learning_rate=1e-3)
    run = trainer(model, args, p.trainer_arguments(args, clip=1.0, balance={"rate": 0.1, "inject": True}))
    run.train()
    logged = run.state.log_history[0]
    assert "scale_free_grad_norm" in logged and any(key.startswith("moe/") for key in logged)
    mine = moe_param.LoadBalancingCallback(0.1)
    assert mine in p.trainer_arguments(args, balance=mine)["callbacks"]
    assert any(
        isinstance(c, moe_param.LoadBalancingCallback) and c.settings["rate"] == 0.0
        for c in p.trainer_arguments(args, balance=0.0)["callbacks"]
    )


def test_what_balances_is_a_rate_or_a_callback(tmp_path: Path) -> None:
    """True would be a rate of 1, and a schedule no callback."""
    _, p = small()
    decay = moe_param.linear_decay(0.1, 4)
    given = p.trainer_arguments(arguments(tmp_path, learning_rate=1e-3), balance=decay)
    assert given["callbacks"][-1].settings["rate"] is decay
    for wrong in (True, "0.1", -1.0, {"rate": 0.1, "rule": "signs"}):
        args = arguments(tmp_path, learning_rate=1e-3)
        with pytest.raises(BalanceError, match=r"rate is|rule is"):
            p.trainer_arguments(args, balance=wrong)  # type: ignore[arg-type]
        assert args.adam_epsilon == 1e-8  # nothing was written


def test_foreach_in_place_of_trainers_fused(tmp_path: Path) -> None:
    model, p = small()
    factory, numbers = p.trainer_arguments(arguments(tmp_path, learning_rate=1e-3), foreach=True)[
        "optimizer_cls_and_kwargs"
    ]
    assert factory()(model, **numbers).defaults["foreach"]


# -- checkpoints -----------------------------------------------------------------------------------------------------
def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def without_reloading(given: dict[str, Any]) -> dict[str, Any]:
    kept = [c for c in given["callbacks"] if not isinstance(c, moe_param.ReloadExpertsCallback)]
    return {**given, "callbacks": kept}


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("balance", [None, {"rate": 0.1, "inject": True}])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(balance: Any, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}

    def run(seed: int) -> tuple[Trainer, dict[str, Any]]:
        model, p = small(seed=seed)
        args = arguments(tmp_path, **changes)
        given = p.trainer_arguments(args, balance=balance)
        return trainer(model, args, given), given

    straight, _ = run(seed=1)
    straight.train()
    resumed, _ = run(seed=2)  # other weights: all that counts has to come from the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(straight)
    assert same(weights(resumed.model), weights(straight.model))
    plain, given = run(seed=2)
    plain = trainer(plain.model, plain.args, without_reloading(given))
    plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(plain)[2:] != losses(straight)[2:]  # transformers#48805; when this fails, it has been mended


def test_the_checkpoint_must_be_the_one_that_is_resumed(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    for folder, seed in (("a", 1), ("b", 2)):
        model, p = small(seed=seed)
        args = arguments(tmp_path / folder, **changes)
        trainer(model, args, p.trainer_arguments(args)).train()
    elsewhere = tmp_path / "a" / "checkpoint-2"
    for folder, message in (("b", "is not the checkpoint that Trainer has loaded"), ("c", "is not there")):
        model, p = small()
        args = arguments(tmp_path / folder, **{**changes, "max_steps": 3})
        with pytest.raises(ReloadError, match=message):
            trainer(model, args, p.trainer_arguments(args)).train(resume_from_checkpoint=str(elsewhere))
        given = p.trainer_arguments(args, resume_from=elsewhere)
        trainer(model, args, given).train(resume_from_checkpoint=str(elsewhere))


def test_a_resumed_optimizer_keeps_its_numbers_and_says_so(tmp_path: Path) -> None:
    for rate, steps in ((1e-2, 2), (2e-2, 4)):
        model, p = small()
        args = arguments(tmp_path, learning_rate=rate, save_strategy="steps", save_steps=2, max_steps=steps)
        run = trainer(model, args, p.trainer_arguments(args))
        if steps == 2:
            run.train()
        else:
            with pytest.raises(OptimizerError, match=r"lr of .* is 0.01 .* a resumed run has its checkpoint's"):
                run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_best_model_comes_back_whole(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"learning_rate": 0.5, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    changes |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    found = {}
    for reloads in (True, False):
        model, p = small()
        args = arguments(tmp_path / str(reloads), **changes)
        given = p.trainer_arguments(args)
        run = trainer(model, args, given if reloads else without_reloading(given))
        run.train()
        best = Path(str(run.state.best_model_checkpoint))
        assert best.name != "checkpoint-3"  # the rate is far too large: the last step is not the best
        found[reloads] = same(weights(model), weights(AutoModelForCausalLM.from_pretrained(best)))
    assert found == {True: True, False: False}
