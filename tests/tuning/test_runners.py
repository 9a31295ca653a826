"""`LoopRunner`: what it makes of a base, on which device, and what becomes of a run that fails."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moe_param
from moe_param.cli.tune import read
from moe_param.errors import InputError
from moe_param.tuning import runners
from moe_param.tuning.base import Base, read_base
from moe_param.tuning.ledger import cores
from moe_param.tuning.runners import LoopRunner, Runner
from moe_param.tuning.short_run import Outcome, train
from moe_param.tuning.workers import Answer, Spent
from tests.tuning.test_tune import CONFIG

POINT = {"learning_rate": 2.0**-6, "init_std": 0.04, "router.lr": 4.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    path = tmp_path_factory.mktemp("base") / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return read_base(*read([str(path), "--seeds", "0", "1"]))


def always(share: float, loss: float) -> bool:
    return True


def test_a_run_is_the_bases_with_the_points_numbers(base: Base) -> None:
    evaluate = pickle.loads(pickle.dumps(LoopRunner(device="cpu").bind(base)))
    there = replace(base.run, lr=2.0**-6, init_std=0.04, constants={"router": {"lr": 4.0}}, seed=5)
    assert evaluate(POINT, 5, always) == Answer(train(there).validation_loss)
    seen: list[float] = []
    stopped = evaluate(POINT, 5, lambda share, loss: seen.append(loss) or share < 0.5)
    assert stopped == Answer(seen[-1], 0.5, stopped=True)
    assert evaluate({"learning_rate": 1e30}, 5, always).loss == math.inf


def test_a_run_that_raises_is_a_result(base: Base) -> None:
    found = LoopRunner(device="cpu").bind(base)({**POINT, "no_role.lr": 2.0}, 0, always)
    assert found.loss == math.inf and (found.failure or "").startswith("ParameterizationError: ")


def test_what_is_wrong_with_every_run_is_said_before_the_first(base: Base) -> None:
    with pytest.raises(InputError, match=r"a batch is 1000000 blocks"):
        LoopRunner(device="cpu").bind(replace(base, run=replace(base.run, batch_size=10**6)))
    for runner, said in (
        (LoopRunner(device="cuda:77"), "device is 'cuda:77': there is no such device here"),
        (LoopRunner(device="cpu", dtype="int8"), "dtype is 'int8': expected float32"),
    ):
        with pytest.raises(InputError, match=said):
            runner.bind(base)


# -- GPUs, where there are none -----------------------------------------------------------------------------------
@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def there(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        monkeypatch.setattr(runners, "check_run", lambda run: None)

    return there


def test_a_worker_for_every_gpu(base: Base, gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    assert LoopRunner().workers() == cores()
    with pytest.raises(InputError, match="device is 'cuda': there is no GPU here"):
        LoopRunner(device="cuda").workers()
    gpus(3)
    assert LoopRunner().workers() == LoopRunner(device="cuda").workers() == 3
    assert LoopRunner(device="cuda:1").workers() == 1 and LoopRunner(device="cpu").workers() == cores()
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(
        runners, "train", lambda run, watch: seen.append((run.device, run.dtype)) or Outcome(2.0, 2.0, 0.0)
    )
    for worker in range(4):
        monkeypatch.setenv("MOE_PARAM_WORKER", str(worker))
        LoopRunner().bind(base)(POINT, 0, always)
    assert seen == [(f"cuda:{index}", "bfloat16") for index in (0, 1, 2, 0)]
    LoopRunner(dtype="float32").bind(base)(POINT, 0, always)
    LoopRunner(device="cpu").bind(base)(POINT, 0, always)
    assert seen[-2:] == [("cuda:0", "float32"), ("cpu", "float32")]


def test_a_gpus_process_is_replaced_after_a_failure(
    base: Base, gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(run: Any, watch: Any) -> Outcome:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    gpus(1)
    monkeypatch.setattr(runners, "train", out_of_memory)
    with pytest.raises(Spent) as spent:
        LoopRunner().bind(base)(POINT, 0, always)
    assert spent.value.answer == Answer(math.inf, failure="OutOfMemoryError: CUDA out of memory. Tried to allocate")


# -- the package ----------------------------------------------------------------------------------------------------
def test_a_worker_that_waits_for_a_command_does_not_load_torch() -> None:
    code = "import sys, moe_param; moe_param.CommandRunner; moe_param.report; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    loaded = set(json.loads(done.stdout))
    assert "moe_param.tuning.commands" in loaded and not loaded & {"torch", "transformers", "optuna", "scipy", "rich"}


def test_both_are_runners(base: Base) -> None:
    both: list[Runner] = [moe_param.LoopRunner(device="cpu"), moe_param.CommandRunner("true {trial} {seed}")]
    for runner in both:
        assert runner.workers() >= 1 and callable(pickle.loads(pickle.dumps(runner.bind(base))))
