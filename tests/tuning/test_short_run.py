"""A short run: watched, stopped, on another device, balanced as training is, over several epochs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, PreTrainedModel

import moe_param
from moe_param.balancing.selection import BalanceError
from moe_param.errors import InputError
from moe_param.training import pretrain
from moe_param.tuning import loop
from moe_param.tuning import short_run as module
from moe_param.tuning.short_run import ShortRun, check_run, times_seen, train
from moe_param.tuning.text import batches, blocks_of
from recipes.bench import short_run as bench
from tests.models import BYTE_MIXTRAL, FAMILIES, tiny_config


def mixtral(**changes: Any) -> ShortRun:
    base = MixtralConfig(**BYTE_MIXTRAL)
    config = moe_param.scale_config(base, width=32)
    settings: dict[str, Any] = {"steps": 40, "batch_size": 4, "seq_len": 32, "validation_blocks": 8, **changes}
    return ShortRun(config.to_dict(), base.to_dict(), "moe-completep", settings.pop("lr", 2**-7), **settings)


def family(name: str, **changes: Any) -> ShortRun:
    values = tiny_config(name, vocab_size=256).to_dict()
    settings: dict[str, Any] = {"steps": 6, "batch_size": 4, "seq_len": 32, "validation_blocks": 8, **changes}
    return ShortRun(values, values, "moe-completep", settings.pop("lr", 2**-7), **settings)


# -- watching --------------------------------------------------------------------------------------------------------
def test_a_run_is_looked_at_twenty_times() -> None:
    seen: list[tuple[float, float]] = []
    outcome = train(mixtral(), lambda *look: bool(seen.append(look)) or True)
    assert [share for share, _ in seen] == pytest.approx([i / 20 for i in range(1, 21)])
    assert outcome.training_loss == seen[-1][1] and (outcome.share, outcome.stopped) == (1.0, False)
    assert seen[0][1] > seen[-1][1] > 0
    assert outcome == replace(train(mixtral()), seconds=outcome.seconds)  # looking changes nothing
    short: list[float] = []
    train(mixtral(steps=3), lambda share, _: bool(short.append(share)) or True)
    assert short == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_look_is_the_mean_since_the_last() -> None:
    """Against the losses of the same steps, one by one."""
    singles: list[float] = []
    train(mixtral(steps=20), lambda _, loss: bool(singles.append(loss)) or True)
    pairs: list[float] = []
    halves = mixtral(steps=40, schedule="constant", warmup=0.0)  # whose first steps do not depend on how many there are
    train(halves, lambda _, loss: bool(pairs.append(loss)) or True)
    singles.clear()
    train(replace(halves, steps=20), lambda _, loss: bool(singles.append(loss)) or True)
    assert pairs[:10] == pytest.approx([sum(singles[i : i + 2]) / 2 for i in range(0, 20, 2)], rel=1e-6)


def test_watch_stops_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "evaluate", lambda *_: pytest.fail("a stopped run is not validated"))
    outcome = train(mixtral(), lambda share, _: share < 0.5)
    assert outcome.stopped and outcome.share == 0.5
    assert math.isnan(outcome.validation_loss) and not outcome.diverged and math.isfinite(outcome.training_loss)


def test_divergence_ends_at_the_next_look_and_nobody_is_asked() -> None:
    asked: list[float] = []
    outcome = train(mixtral(lr=1e30, warmup=0.0), lambda share, _: bool(asked.append(share)) or True)
    assert outcome.diverged and outcome.validation_loss == math.inf and not outcome.stopped
    assert outcome.share <= 0.1 and outcome.share not in asked


# -- the device ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "cuda:7"}, r"device is 'cuda:7': there is no such device here, only cpu"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"dtype": "float16"}, "dtype is 'float16': expected float32, or bfloat16"),
    ],
)
def test_what_is_not_there_is_named(change: dict[str, str], message: str) -> None:
    for call in (train, check_run):
        with pytest.raises(InputError, match=message):
            call(mixtral(**change))


def test_bfloat16_is_autocast_over_float32_weights() -> None:
    """Near float32, and not it."""
    exact, rounded = train(mixtral()), train(mixtral(dtype="bfloat16"))
    assert 0 < abs(exact.validation_loss - rounded.validation_loss) < 0.05


# -- balancing -------------------------------------------------------------------------------------------------------
def biases(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "bias" in name and "correction" in name}


def kept_model(run: ShortRun, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """The model as a run leaves it."""
    models: list[PreTrainedModel] = []
    monkeypatch.setattr(module, "evaluate", lambda run, model, _: models.append(model) or 0.0)
    train(run)
    return models[0]


@pytest.mark.slow
def test_biases_are_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model, text, batches and steps under `moe-param train`: an implementation of its own, Trainer's."""
    overrides = {**FAMILIES["deepseek_v3"]["tiny_config"], "vocab_size": 256}
    flags = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seq_len": 32}
    flags |= {"learning_rate": 2**-7, "validation_blocks": 8, "lr_scheduler_type": "linear", "seed": 3}
    flags |= {"model_type": "deepseek_v3", "output_dir": str(tmp_path / "out"), "report_to": "none", "use_cpu": True}
    config = tmp_path / "config.yaml"
    config.write_text(pretrain.json.dumps({**flags, "overrides": overrides}))
    summary = pretrain.main([str(config)])
    trained = load_file(tmp_path / "out" / "model.safetensors")

    arguments = pretrain.parse([str(config)])
    base, _ = pretrain.build_configs(arguments[0])
    run = replace(module.short_run(*arguments, base), seed=3)
    assert run.gradient_accumulation == 2 and run.batch_size == 4
    model = kept_model(run, monkeypatch)
    found = biases(model.state_dict())
    assert found and any(value.abs().max() > 0 for value in found.values())
    for name, value in found.items():
        assert torch.equal(value, trained[name]), name
    monkeypatch.undo()
    assert train(run).validation_loss == pytest.approx(summary["validation_loss"], rel=1e-5)
    still = kept_model(replace(run, balance_rate=0.0), monkeypatch)  # negative control
    assert all(value.abs().max() == 0 for value in biases(still.state_dict()).values())


def test_nothing_is_counted_where_nothing_can_be_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LoadBalancer", lambda *_, **__: pytest.fail("a balancer without a use"))
    train(mixtral(steps=1))
    with pytest.raises(pytest.fail.Exception):
        train(mixtral(steps=1, inject_bias=True))
    monkeypatch.undo()
    assert train(mixtral(inject_bias=True)).validation_loss != train(mixtral()).validation_loss


def test_what_cannot_be_balanced_is_refused_before_the_first_run() -> None:
    with pytest.raises(BalanceError, match="no router of this model can be balanced"):
        check_run(mixtral(balance_rate=0.1))


# -- the text --------------------------------------------------------------------------------------------------------
def test_a_text_is_seen_several_times(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} to be or not to be {i * i}\n" for i in range(60)))
    data = {"train_files": [str(text)]}
    run = mixtral(steps=40, data=data, validation_blocks=2)
    blocks = len(blocks_of(run)[0])
    assert 4 <= blocks < 80 and times_seen(run) == f"the text is seen {160 / blocks:.3g} times"
    assert times_seen(mixtral()) == ""
    check_run(run)
    seen = torch.cat(list(batches(run, blocks_of(run)[0])))
    assert len(seen) == 160 and len(torch.unique(seen[:blocks], dim=0)) == len(torch.unique(seen, dim=0))
    assert not torch.equal(seen[:blocks], seen[blocks : 2 * blocks])  # in another order
    assert math.isfinite(train(run).validation_loss)
    with pytest.raises(InputError, match=f"a batch is 1000 blocks of 32 tokens, and the whole text has {blocks}"):
        check_run(replace(run, batch_size=1000, steps=1))
    text.write_text("to be")
    with pytest.raises(InputError, match="less than a block"):
        check_run(replace(run, data={"train_files": [str(text)], "tokenizer": "bytes"}))


def test_accumulated_gradients_are_those_of_the_batch() -> None:
    whole, parts = train(mixtral()), train(mixtral(gradient_accumulation=2))
    assert parts.validation_loss == pytest.approx(whole.validation_loss, rel=1e-5)
    assert parts.training_loss == pytest.approx(whole.training_loss, rel=1e-5)


# -- against the plain loop ------------------------------------------------------------------------------------------
CONSTANTS = {"router": {"init": 2.0, "lr": 0.5}, "expert_down": {"init": 0.5, "lr": 2.0}}


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])  # the latter has shared experts and selection biases
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_losses_are_those_of_the_plain_loop(name: str, schedule: str) -> None:
    """The reference of the benchmark: no looks, transformers' scheduler stepped, `PackedDataset`'s own batches."""
    settings = {"steps": 20, "schedule": schedule, "weight_decay": 0.1, "constants": CONSTANTS, "balance_rate": 0.0}
    run = family(name, **settings)
    new, old = bench.ours(run), bench.plain(run)
    assert len(old.losses) == len(new.losses) == 20 and old.losses[-1] < old.losses[0]
    assert bench.difference(new, old) <= 1e-5
    other = bench.ours(replace(run, warmup=0.3))  # negative control
    assert bench.difference(other, old) > 1e-4


def test_the_benchmark_runs(tmp_path: Path) -> None:
    bench.main(["--smallest", "--out", str(tmp_path / "short_run.json")])
    report = json.loads((tmp_path / "short_run.json").read_text())
    assert [result["name"] for result in report["results"]] == ["base", "target"]
    for result in report["results"]:
        assert result["passed"]["difference"] and result["steps per second, ours / plain"] > 0


def test_looks_are_means_since_the_last() -> None:
    assert bench.looks(range(1, 41)) == [1.5 + 2 * i for i in range(20)]
    assert bench.looks([3.0, 4.0]) == [3.0, 4.0]
