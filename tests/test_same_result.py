"""The same training whatever the machinery around it. Two processes: tests/distributed."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import moe_param
from moe_param import Parameterization, Shape
from tests.models import KeepDouble, build, tiny_config, tokens

LR, EPS, DECAY = 1e-2, 1e-8, 0.1
BASE = Shape(width=32, depth=2, num_experts=16, top_k=4, expert_size=16)
SIZES = {"num_hidden_layers": 2, "intermediate_size": 64}


def parameterized(seed: int = 1, **changes: Any) -> tuple[Any, Parameterization]:
    base = Shape(width=32, depth=1, num_experts=16, top_k=4, expert_size=16)
    model = build("mixtral", **{**SIZES, **changes})
    return model, moe_param.apply(model, base, seed=seed, experts=None)


def groups(model: Any, parameterization: Parameterization) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameterization.param_groups(model, lr=LR, eps=EPS, weight_decay=DECAY))


def train(
    model: Any, parameterization: Parameterization, steps: int = 5, micro: int = 1, amp: bool = False
) -> list[float]:
    optimizer = groups(model, parameterization)
    losses = []
    for step in range(steps):
        batch = tokens(batch=8, seed=step)
        total = 0.0
        for part in batch.chunk(micro):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = model(input_ids=part, labels=part).loss / micro
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative distance over parameters."""
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


# -- gradient accumulation -------------------------------------------------------------------------------------------
def test_four_micro_batches_are_one_batch() -> None:
    runs = {}
    for micro in (1, 4):
        model, parameterization = parameterized()
        model = model.double()
        model.set_experts_implementation("eager")
        with KeepDouble():
            runs[micro] = (train(model, parameterization, micro=micro), weights(model))
    assert runs[4][0] == pytest.approx(runs[1][0], rel=1e-12)
    assert apart(runs[4][1], runs[1][1]) < 1e-10
    assert train(*parameterized(seed=2)) != pytest.approx(runs[1][0], rel=1e-4)


# -- bf16 autocast ---------------------------------------------------------------------------------------------------
def test_bf16_autocast_stays_close() -> None:
    exact, rounded = (train(*parameterized(), steps=20, amp=amp) for amp in (False, True))
    other = train(*parameterized(seed=2), steps=20)
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=3e-3)
    assert other != pytest.approx(exact, rel=1e-2)
    assert exact[0] - exact[-1] > 0.05


# -- torch.compile ---------------------------------------------------------------------------------------------------
def test_compiled_training_equals_eager_training() -> None:
    """Groups are found under the compiled model's names; the graph is whole where the experts allow it."""
    eager_model, parameterization = parameterized()
    eager_model.set_experts_implementation("batched_mm")
    eager = train(eager_model, parameterization)
    model, parameterization = parameterized()
    model.set_experts_implementation("batched_mm")
    graphs: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return aot_eager(graph, inputs)

    from torch._dynamo.backends.debugging import aot_eager

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    assert all(name.startswith("_orig_mod.") for name, _ in compiled.named_parameters())
    assert train(compiled, parameterization) == pytest.approx(eager, rel=1e-5)
    assert len(graphs) == 1
    assert apart(weights(model), weights(eager_model)) < 1e-3


# -- save, load, resume ----------------------------------------------------------------------------------------------
def trainer_for(model: Any, parameterization: Parameterization, folder: Path, **changes: Any) -> Trainer:
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "max_grad_norm": 0.0,
            "save_steps": 4,
            "logging_steps": 1,
            "use_cpu": True,
            "seed": 3,
            "report_to": "none",
            "disable_tqdm": True,
            **changes,
        }
    )
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=64)]
    factory = parameterization.optimizer_factory(torch.optim.AdamW)
    settings = {"lr": LR, "eps": EPS, "weight_decay": DECAY}
    return Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(factory, settings))


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_resuming_from_a_checkpoint_is_bit_exact(tmp_path: Path) -> None:
    straight_model, parameterization = parameterized()
    straight = trainer_for(straight_model, parameterization, tmp_path)
    straight.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert checkpoint.is_dir()

    # a new process would have nothing but the folder: model, rules and optimizer state all come from it
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    resumed = trainer_for(model, Parameterization.from_model(model), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(straight)
    ours, theirs = weights(model), weights(straight_model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    states = (resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert {g["lr"] for g in states[0]["param_groups"]} == {0.0}  # the cosine has ended, in every group

    # without the optimizer's state it is another run
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    fresh = trainer_for(model, Parameterization.from_model(model), tmp_path / "fresh", max_steps=4)
    fresh.train()
    assert not all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())


# -- reordering ------------------------------------------------------------------------------------------------------
def test_reordered_modules_train_alike() -> None:
    """A class that registers its modules in another order: the same rules, weights and losses, name by name."""
    plain, parameterization = parameterized()
    turned = build("mixtral", **SIZES, seed=8)
    for module in turned.modules():
        if not isinstance(module, nn.ModuleList):
            module._modules = OrderedDict(reversed(module._modules.items()))  # type: ignore[assignment]
            module._parameters = dict(reversed(module._parameters.items()))
    assert list(dict(turned.named_parameters())) != list(dict(plain.named_parameters()))
    base = Shape(width=32, depth=1, num_experts=16, top_k=4, expert_size=16)
    rules = moe_param.apply(turned, base, seed=1, experts=None)
    assert rules == parameterization
    assert apart(weights(turned), weights(plain)) == 0.0

    def by_name(model: Any) -> dict[str, tuple[float, float, float]]:
        found = rules.param_groups(model, lr=LR, eps=EPS, weight_decay=DECAY)
        return {name: (g["lr"], g["eps"], g["weight_decay"]) for g in found for name in g["names"]}

    assert by_name(turned) == by_name(plain)
    assert train(turned, rules) == train(plain, parameterization)
    assert apart(weights(turned), weights(plain)) == 0.0


# -- the record and the run ------------------------------------------------------------------------------------------
def test_a_reloaded_parameterization_trains_alike(tmp_path: Path) -> None:
    model, parameterization = parameterized()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert train(loaded, Parameterization.from_model(loaded)) == train(model, parameterization)
    standard = build("mixtral", tiny_config("mixtral", **SIZES))
    rates = moe_param.apply(standard, BASE, spec="standard", seed=1, experts=None)
    assert train(standard, rates) != train(*parameterized())
