"""Models without experts from the config to the trained model, by the same calls and commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

import moe_param
from moe_param import BalanceError, LoadBalancer, Parameterization, ParameterizationError, Shape, ShapeError
from moe_param.balancing.gates import RoutingError
from moe_param.scaling.spec import presets
from moe_param.training import pretrain
from moe_param.training.report import active_parameters
from moe_param.tuned import TunedError, read_tuned
from moe_param.tuning.arguments import TuneArguments
from moe_param.tuning.base import read_base
from moe_param.tuning.short_run import train
from moe_param.tuning.transfer_plan import TransferArguments, plan_runs
from tests.cli.program import run
from tests.models import build, classes, tiny_config, tokens

BYTES = {
    **{"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1},
    **{"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "max_position_embeddings": 64},
}
"""The smallest Llama that trains on bytes, as `overrides`."""
MIXTURE = Shape.from_config(tiny_config("mixtral"))


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**BYTES, **changes})


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "llama.yaml"
    settings = {"dataset": "stdlib", "seq_len": 32, "validation_blocks": 8, "max_steps": 4, "learning_rate": 2.0**-7}
    model = {"model_type": "llama", "overrides": BYTES, "per_device_train_batch_size": 2}
    path.write_text(yaml.safe_dump({**model, **settings}))
    return str(path)


@pytest.mark.parametrize("spec", presets())
def test_every_table_is_for_dense_models_too(spec: str) -> None:
    plan = moe_param.plan(LlamaForCausalLM, llama(), Shape(width=16, depth=1), spec=spec)
    assert {(r.lr, r.eps, r.multiplier) for r in plan.rules.values()} == {(1.0, 1.0, 1.0)}
    wide = moe_param.plan(LlamaForCausalLM, moe_param.scale_config(llama(), width=64), llama(), spec=spec)
    changed = {rule.role for rule in wide.rules.values() if rule.lr != 1.0}
    assert changed == set() if spec == "standard" else {"attention_out", "dense_up"} <= changed


def test_exponents_of_sizes_that_a_dense_model_lacks_are_of_ratios_of_one() -> None:
    row = {"lr": {"num_experts": 3, "top_k": 2, "expert_size": 1}, "source": "a test"}
    table = {"name": "odd", "source": "a test", "extends": "standard", "roles": {"dense_up": row}}
    plan = moe_param.plan(LlamaForCausalLM, llama(num_hidden_layers=2), Shape(width=16, depth=1), spec=table)
    assert {rule.lr for rule in plan.rules.values() if rule.role == "dense_up"} == {1.0}


def test_the_record_is_read_back_from_a_checkpoint(tmp_path: Path) -> None:
    model = LlamaForCausalLM(moe_param.scale_config(llama(), width=64, depth=2))
    applied = moe_param.apply(model, Shape(width=16, depth=1), seed=3, experts="auto")
    assert applied.base_shape.dense and applied.shape == Shape(width=64, depth=2, head_dim=16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert Parameterization.from_model(loaded) == applied
    assert "α" not in applied.table() and "width 16 → 64, depth 1 → 2" in applied.table()
    assert active_parameters(applied) == (sum(p.numel() for p in model.parameters()),) * 2


def test_base_and_target_are_both_dense_or_both_not() -> None:
    with pytest.raises(ParameterizationError, match="the base is dense and the target has experts"):
        moe_param.apply(build("mixtral"), Shape(width=64, depth=2))
    with pytest.raises(ParameterizationError, match="the target is dense and the base has experts"):
        moe_param.apply(LlamaForCausalLM(llama()), MIXTURE)
    sizes = tiny_config("qwen3_moe").to_dict() | {"mlp_only_layers": [0, 1, 2, 3]}  # one family, both ways
    model_class, config_class = classes("qwen3_moe")
    dense = config_class(**sizes)
    assert Shape.from_config(dense).dense
    for base, target in ((dense, tiny_config("qwen3_moe")), (tiny_config("qwen3_moe"), dense)):
        with pytest.raises(ParameterizationError, match=r"is dense and the .* has experts"):
            moe_param.plan(model_class, target, base)


def test_balancing_a_dense_model_is_an_error(tmp_path: Path) -> None:
    model = LlamaForCausalLM(llama())
    plan = moe_param.apply(model, llama(), seed=0)
    with pytest.raises(RoutingError, match="LlamaForCausalLM is dense"):
        LoadBalancer(model, rate=0.01)
    args = TrainingArguments(str(tmp_path), max_grad_norm=0, report_to="none", use_cpu=True)
    with pytest.raises(BalanceError, match="this model is dense"):
        plan.trainer_arguments(args, lr=0.01, balance=0.01)
    assert plan.trainer_arguments(args, lr=0.01)["callbacks"]


def test_bases_of_a_dense_model() -> None:
    config = llama(hidden_size=512, num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=32)
    found = moe_param.suggest_base(config, cost=0.05)
    assert found.best.share <= 0.05 and found.best.regime is None
    assert found.best.sizes == f"width={found.best.shape.width},depth={found.best.shape.depth}"
    assert found.best.shape.width < 512 and found.best.active == found.best.parameters
    assert "num_experts" not in str(found) and "α" not in str(found)
    built = LlamaForCausalLM(moe_param.scale_config(config, **found.best.shape.sizes))
    assert sum(p.numel() for p in built.parameters()) == found.best.parameters


def test_training_from_the_command(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--shape", "width=32,depth=2", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"]
    summary = pretrain.main([config, "--output_dir", str(tmp_path / "out"), *flags])
    assert summary["parameters"] == summary["active_parameters"] > 0
    assert 0 < summary["validation_loss"] < 6
    assert Parameterization.from_model(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).shape.sizes == {
        "width": 32,
        "depth": 2,
    }
    for asked in (["--balance_rate", "0.01"], ["--inject_bias", "true"]):
        with pytest.raises(RoutingError, match="is dense: it has no experts to balance"):
            pretrain.main([config, "--output_dir", str(tmp_path / "other"), *flags, *asked])


def test_tuning_and_transfer_take_a_dense_model(config: str, tmp_path: Path) -> None:
    plan = plan_runs(TransferArguments(config, str(tmp_path), smallest=True, workers=1))
    assert plan.targets == ("width=4", "depth=4")
    assert train(plan.template).validation_loss < 6
    with pytest.raises(ShapeError, match="'num_experts' is of experts"):
        plan_runs(TransferArguments(config, str(tmp_path), ["num_experts=2"], smallest=True, workers=1))

    read = read_base(TuneArguments(), *pretrain.parse([config, "--output_dir", str(tmp_path / "tune")]))
    assert read.yaml["tuned_at"] == {"width": 16, "depth": 1}
    assert "dense_up" in read.roles and not any(role.startswith("expert") for role in read.roles)
    tuned = tmp_path / "tuned.yaml"
    tuned.write_text(yaml.safe_dump({k: v for k, v in read.yaml.items() if v is not None} | {"learning_rate": 0.01}))
    assert Shape.from_config(read_tuned(tuned, {"width": 64}).target) == Shape(width=64, depth=1, head_dim=16)
    tuned.write_text(tuned.read_text().replace("depth: 1", "depth: 1\n  num_experts: 8"))
    with pytest.raises(TunedError, match="num_experts 8, not None"):
        read_tuned(tuned)


def test_explain_and_base_from_the_shell(config: str) -> None:
    said = run("explain", config, "--base", "width=16", "--target", "width=64")
    assert said.exit_code == 0 and "dense_down" in said.stdout and "α" not in said.stdout


def test_a_dense_model_computes_what_it_did(tmp_path: Path) -> None:
    """At the base nothing moves: the same losses as plain AdamW on the weights that were written."""
    model = LlamaForCausalLM(llama())
    plan = moe_param.apply(model, llama(), seed=0)
    twin = LlamaForCausalLM(AutoConfig.for_model(**llama().to_dict()))
    twin.load_state_dict(model.state_dict())
    losses = []
    for m, groups in ((model, plan.param_groups(model, lr=0.01)), (twin, [{"params": list(twin.parameters())}])):
        optimizer = torch.optim.AdamW(groups, lr=0.01, eps=1e-12, weight_decay=0.0)
        for step in range(3):
            ids = tokens(200, 2, 16, seed=step)
            loss = m(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
