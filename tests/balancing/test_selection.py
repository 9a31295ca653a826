"""Injected selection biases: in every save, back after loading, and their absence an error."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig, SFTTrainer

from moe_param import BalanceError, LoadBalancer, LoadBalancingCallback, Parameterization, Shape, apply, scale_config
from moe_param import load_selection_biases as load
from moe_param.balancing.saved import FILE
from moe_param.balancing.selection import CONFIG
from moe_param.training.trainer import MoETrainer
from moe_param.tuned import build_config
from tests.balancing.test_routing import INJECTED, NATIVE, REFUSED
from tests.models import CORE, INTERFACE, build, families, routed, tokens

FAMILY = "qwen3_moe"
ALL = sorted(set(INTERFACE) - NATIVE - set(REFUSED))


def injected(family: str = FAMILY) -> tuple[Any, LoadBalancer]:
    model = build(family).eval()
    return model, randomized(model)


def randomized(model: Any) -> LoadBalancer:
    """Biases far from zero, and no two of them alike."""
    balancer = LoadBalancer(model, rate=0.1, inject=True)
    balancer.bias.copy_(torch.randn(balancer.bias.shape, generator=torch.Generator().manual_seed(1)))
    balancer.write()
    return balancer


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    out = model(input_ids=tokens(), use_cache=False)
    return out.logits if "logits" in out else out.last_hidden_state


def biases(model: Any) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("selection.bias")]


@pytest.mark.parametrize("family", families(ALL, set(INJECTED) & set(CORE)))
def test_a_saved_model_comes_back_and_never_without_its_biases(family: str, tmp_path: Path) -> None:
    """Whatever names transformers saves under; in one file and in many."""
    model, balancer = injected(routed(family))
    for folder, size in ((tmp_path / "one", "50GB"), (tmp_path / "many", "100KB")):
        model.save_pretrained(folder, max_shard_size=size)
        loaded = type(model).from_pretrained(folder)
        assert not torch.allclose(run(loaded), run(model), atol=1e-4), "what is lost makes a difference"
        with pytest.raises(BalanceError, match=r"load_selection_biases\(model\)"):
            LoadBalancer(loaded, rate=0.1, inject=True)
        load(loaded)
        torch.testing.assert_close(run(loaded), run(model), rtol=0, atol=1e-6)  # where tensors lie decides last bits
        assert torch.equal(LoadBalancer(loaded, rate=0.1).bias, balancer.bias), "it needs no inject=True any more"
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1


def test_whoever_touches_a_model_without_its_biases_says_so(tmp_path: Path) -> None:
    model = build(FAMILY)
    base = Shape.from_config(model.config)
    apply(model, base, seed=0)
    LoadBalancer(model, rate=0.1, inject=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for touch in (
        lambda: Parameterization.from_model(loaded),
        lambda: apply(loaded, base, reinit=False),
        lambda: LoadBalancer(loaded, rate=0),
    ):
        with pytest.raises(BalanceError, match=r"3 routers \(model\.layers\.1\.mlp\.gate, …\)"):
            touch()
    load(loaded)
    Parameterization.from_model(loaded)
    delattr((plain := AutoModelForCausalLM.from_pretrained(tmp_path)).config, CONFIG)  # the way out it names
    Parameterization.from_model(plain)


def test_what_is_missing_or_of_another_model_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    model, _ = injected()
    model.save_pretrained(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    for case, change in {
        "the selection bias of model.layers.2.mlp.gate": lambda value: None,
        "biases of another model": lambda value: value[:4].clone(),
    }.items():
        shutil.copytree(tmp_path / "whole", tmp_path / case[:4])
        changed = {k: change(v) if "layers.2" in k and "selection" in k else v for k, v in weights.items()}
        kept = {k: v for k, v in changed.items() if v is not None}
        save_file(kept, tmp_path / case[:4] / "model.safetensors", metadata={"format": "pt"})
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / case[:4])
        with pytest.raises(BalanceError, match=case):
            load(loaded)
        assert not biases(loaded)
    build(FAMILY).save_pretrained(tmp_path / "plain")
    with pytest.raises(BalanceError, match=r"the selection bias of model\.layers\.1\.mlp\.gate"):
        load(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))


def test_folders_of_earlier_versions_stay_loadable(tmp_path: Path) -> None:
    """They have the biases in a file of their own, and nothing in the config."""
    model, balancer = injected()
    expected = run(model)
    balancer.save(tmp_path)
    balancer.remove()
    model.save_pretrained(tmp_path)
    assert CONFIG not in (tmp_path / "config.json").read_text()
    for way in (load, lambda model: LoadBalancer(model, rate=0, inject=True).load(tmp_path)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        way(loaded)
        assert torch.equal(run(loaded), expected)
    assert (tmp_path / FILE).is_file()


def test_the_body_without_its_head_has_the_same_biases(tmp_path: Path) -> None:
    model, _ = injected()
    model.save_pretrained(tmp_path)
    body = type(model.model).from_pretrained(tmp_path)
    with pytest.raises(BalanceError, match="3 routers"):
        LoadBalancer(body, rate=0)
    load(body)
    assert torch.equal(run(body), model.model(input_ids=tokens()).last_hidden_state)


@pytest.mark.parametrize("cast_first", [True, False])
def test_biases_stay_float32_in_a_bfloat16_model(cast_first: bool, tmp_path: Path) -> None:
    build(FAMILY).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16 if cast_first else torch.float32)
    balancer = randomized(model)
    if not cast_first:
        model.bfloat16()
    assert not torch.equal(balancer.bias.bfloat16().float(), balancer.bias), "bfloat16 would round them"
    assert [bias.tolist() for bias in biases(model)] == balancer.bias.tolist()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {str(value.dtype) for key, value in saved.items() if "selection" in key} == {"torch.float32"}
    assert saved["lm_head.weight"].dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    load(loaded)
    assert [bias.tolist() for bias in biases(loaded)] == balancer.bias.tolist()
    assert torch.equal(run(loaded), run(model)) or not cast_first  # .to() rounds buffers that are never saved


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_the_biases_and_is_not_counted(copied: Any) -> None:
    model, balancer = injected()
    other = copied(model)
    assert torch.equal(run(other), run(model))
    run(other.train())
    assert not balancer.counts.any()
    run(model.train())
    assert balancer.counts.sum() == len(balancer.routes) * 64 * 2
    balancer.bias.zero_()
    balancer.write()
    assert not torch.equal(run(other.eval()), run(model.eval())), "the copy has biases of its own"
    balancer.remove()
    assert len(biases(other)) == 3 and not biases(model)


# -- Trainer -----------------------------------------------------------------------------------------------------------
def arguments(cls: Any, folder: Path, **changes: Any) -> Any:
    return cls(
        **{
            "output_dir": str(folder),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            **changes,
        }
    )


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in tokens(batch=count)]


def test_every_save_of_a_trainer_has_them_and_training_goes_on_from_them(tmp_path: Path) -> None:
    callback = LoadBalancingCallback(1.0, inject=True)
    config = arguments(TrainingArguments, tmp_path / "run", save_strategy="steps", save_steps=1)
    trainer = MoETrainer(build(FAMILY), config, train_dataset=rows(), callbacks=[callback])
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert callback.balancer is not None
    trained = callback.balancer.bias.clone()
    model: Any = trainer.model
    model.eval()
    for folder in ("saved", "run/checkpoint-2"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert len(getattr(loaded.config, CONFIG)) == 3
        load(loaded)
        assert torch.equal(run(loaded), run(model))
    load(early := AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1"))
    assert torch.stack(biases(early)).any() and not torch.equal(torch.stack(biases(early)), trained)

    run(model.train())
    assert not callback.balancer.counts.any(), "nothing is counted after training"
    trainer.args.max_steps, trainer.args.save_strategy = 3, SaveStrategy.NO
    trainer.train()
    assert callback.balancer.steps == 3
    callback.balancer.remove()
    assert not biases(model)

    # A model that was loaded from the checkpoint it goes on from, and one that was not.
    for start in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1"),
        lambda: build(FAMILY),
    ):
        resumed = LoadBalancingCallback(1.0, inject=True)
        config = arguments(TrainingArguments, tmp_path / "run", save_strategy="no")
        trainer = MoETrainer(start(), config, train_dataset=rows(), callbacks=[resumed])
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
        assert resumed.balancer is not None and torch.equal(resumed.balancer.bias, trained)


@pytest.mark.parametrize("family", ["mixtral", FAMILY])
def test_the_best_model_comes_back_with_its_own_biases(family: str, tmp_path: Path) -> None:
    """Also where the names that transformers saves under are not the model's, as Mixtral's."""
    config = arguments(
        TrainingArguments,
        tmp_path,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # the loss falls, so it is the first checkpoint
        learning_rate=1e-2,
    )
    callback = LoadBalancingCallback(1.0, inject=True)
    trainer = MoETrainer(build(family), config, train_dataset=rows(), eval_dataset=rows(4), callbacks=[callback])
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-1")
    load(saved := AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1"))
    assert torch.equal(torch.stack(biases(trainer.model)), torch.stack(biases(saved)))
    assert callback.balancer is not None
    assert not torch.equal(callback.balancer.bias, torch.stack(biases(saved))), "training went on after it"


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<eos>": 0, "<pad>": 1, **{chr(97 + i): 2 + i for i in range(26)}}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    built.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<eos>", pad_token="<pad>")


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_trl_trained_and_saved_comes_back(tmp_path: Path) -> None:
    texts = [{"text": "abcdefgh"[i % 8 :] * (1 + i % 3)} for i in range(16)]
    callback = LoadBalancingCallback(1.0, inject=True)
    config = arguments(SFTConfig, tmp_path / "run", router_aux_loss_coef=0.0, bf16=False, max_length=32)
    trainer = SFTTrainer(
        build(FAMILY),
        config,
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    model: Any = trainer.model
    model.eval()
    assert not torch.equal(run(loaded), run(model))
    load(loaded)
    assert torch.equal(run(loaded), run(model))
    assert callback.balancer is not None and callback.balancer.bias.any()
    assert [bias.tolist() for bias in biases(loaded)] == callback.balancer.bias.tolist()


def test_a_config_with_biases_is_scaled_and_built_anew(tmp_path: Path) -> None:
    """The names of routers are no layer pattern, and a new model has lost no biases."""
    model, balancer = injected("mixtral")  # experts in every layer: as many names as layers
    shape = Shape.from_config(model.config)
    half = scale_config(model.config, depth=shape.depth // 2)
    assert half.num_hidden_layers == shape.depth // 2
    assert not hasattr(half, CONFIG) and not hasattr(scale_config(model.config, depth=shape.depth), CONFIG)
    apply(model, half, reinit=False, folds=False)
    assert getattr(model.config, CONFIG) == [route.name for route in balancer.routes]  # the model's own stays
    model.save_pretrained(tmp_path)
    config = build_config(str(tmp_path), None, {})
    apply(type(model)(config), Shape.from_config(config))


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])  # with biases of its own (buffers), and injected ones
def test_new_weights_come_without_old_biases(family: str) -> None:
    model, balancer = injected(family)
    shape, moved = Shape.from_config(model.config), [balancer.routes[row] for row in balancer.moved]
    apply(model, shape, reinit=False, folds=False)
    assert all(route.native is not None and route.native.abs().min() > 0 for route in moved)  # control: kept weights
    apply(model, shape, reinit=True, seed=1)
    assert all(route.native is not None and not route.native.any() for route in moved)
