"""The recipe under `accelerate launch`, with every CPU configuration that ships: DDP and FSDP2 against one process.

A run starts on one process, goes on under FSDP2, then under DDP, then on one process again. The family has selection
biases of its own (buffers, moved by the balancing), and the text is a stream of four shards.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moe_param.training.report import read_lines
from tests.distributed import pretrain_worker
from tests.models import tiny_config
from tests.training.kills import texts

ROOT = Path(__file__).parents[2]
FAMILY = "glm4_moe"
STEPS, EVERY = 8, 2
pytestmark = pytest.mark.xdist_group("pretrain processes")  # with --dist loadgroup: one set of launches


def launch(name: str, folder: Path, tasks: list[Any]) -> list[dict[str, Any]]:
    """What each process of `accelerate launch` with a shipped configuration found."""
    (folder / f"{name}.json").write_text(json.dumps(tasks))
    out = folder / name
    out.mkdir()
    command = ["accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")]
    done = subprocess.run(
        [sys.executable, "-m", *command, "-m", "tests.distributed.pretrain_worker", str(out), f"{folder / name}.json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]


def arguments(folder: Path, output: str, files: list[str], *extra: str) -> list[str]:
    settings: dict[str, Any] = {
        "model": folder / "config",
        "seq_len": 16,
        "streaming": True,
        "shuffle_buffer": 40,
        "validation_blocks": 6,
        "per_device_train_batch_size": 4,
        "batch_tokens": 8 * 16,
        "tokens": STEPS * 8 * 16,
        "warmup_tokens": 2 * 8 * 16,
        "learning_rate": 2**-6,
        "logging_steps": 1,
        "eval_steps": 4,
        "save_steps": EVERY,
        "save_total_limit": 9,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": folder / output,
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [*flags, "--train_files", *files, *extra]


def numbers(output: Path, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in read_lines(output / "metrics.jsonl") if key in line}


def handed_over(folder: Path, source: str, to: str, step: int) -> None:
    """The run as it was when `step` had been saved."""
    shutil.copytree(folder / source, folder / to)
    for path in (folder / to).glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("processes")
    tiny_config(FAMILY, vocab_size=256).save_pretrained(folder / "config")
    files = texts(folder, shards=4)
    one, few = files, files[:1]
    found: dict[str, list[dict[str, Any]]] = {}
    found["one"] = [pretrain_worker.task(arguments(folder, "one", one))]
    found["cpu"] = launch("cpu", folder, [["fresh", arguments(folder, "cpu-run", one), None]])
    handed_over(folder, "one", "passed-1", 2)
    found["fsdp"] = launch(
        "cpu-2-processes-fsdp2",
        folder,
        [
            ["fresh", arguments(folder, "fsdp", one), None],
            ["resumed", arguments(folder, "passed-1", one, "--resume"), None],
            ["nan", arguments(folder, "nan", one), "model.layers.0.self_attn.v_proj"],
        ],
    )
    handed_over(folder, "passed-1", "passed-2", 4)
    handed_over(folder, "one", "experts", 4)
    found["ddp"] = launch(
        "cpu-2-processes",
        folder,
        [
            ["fresh", arguments(folder, "ddp", one), None],
            ["resumed", arguments(folder, "passed-2", one, "--resume"), None],
            ["experts", arguments(folder, "experts", one, "--resume", "--expert_parallel", "2"), None],
            ["few", arguments(folder, "few", few), None],
            ["odd", arguments(folder, "odd", one, "--batch_tokens", "48"), None],
        ],
    )
    handed_over(folder, "passed-2", "passed-3", 6)
    found["back"] = [pretrain_worker.task(arguments(folder, "passed-3", one, "--resume"))]
    return folder, found


Runs = tuple[Path, dict[str, list[dict[str, Any]]]]


def test_all_start_with_the_same_bits(runs: Runs) -> None:
    _, found = runs
    starts = {rank["fresh"]["start"] for name in ("cpu", "fsdp", "ddp") for rank in found[name]}
    assert starts == {found["one"][0]["start"]}
    assert [len(found[name]) for name in ("cpu", "fsdp", "ddp")] == [1, 2, 2], "processes"
    assert all(rank["fresh"]["sharded"] == (name == "fsdp") for name in ("cpu", "fsdp", "ddp") for rank in found[name])


@pytest.mark.parametrize("output", ["cpu-run", "fsdp", "ddp", "passed-1", "passed-2", "passed-3", "experts"])
def test_all_have_the_losses_of_one_process(runs: Runs, output: str) -> None:
    """passed-1 is 1 → 2 processes (FSDP2), passed-2 goes on under DDP, passed-3 on one process again; experts goes on
    from one process with the experts shared by two."""
    folder, found = runs
    for key in ("loss", "eval_loss", "moe/max_over_mean", "moe/bias_range"):
        expected = numbers(folder / "one", key)
        assert numbers(folder / output, key) == pytest.approx(expected, rel=1e-5), key
    expected = numbers(folder / "one", "grad_norm")  # float32 sums over everything, in another order
    assert numbers(folder / output, "grad_norm") == pytest.approx(expected, rel=1e-4)
    assert all(rank["experts"]["sharded"] for rank in found["ddp"])
    losses = numbers(folder / "one", "loss")
    assert list(losses) == list(range(1, STEPS + 1)) and len(set(losses.values())) == STEPS
    assert numbers(folder / "one", "moe/bias_range")[STEPS] > 0


def test_the_comparison_sees_another_order_of_the_samples(runs: Runs, tmp_path: Path) -> None:
    folder, _ = runs
    files = [str(folder / f"texts{shard}.jsonl") for shard in range(4)]
    other = pretrain_worker.task(arguments(folder, str(tmp_path / "other"), files, "--data_seed", "1"))
    assert other["start"] == runs[1]["one"][0]["start"]
    assert numbers(tmp_path / "other", "loss") != pytest.approx(numbers(folder / "one", "loss"), rel=1e-5)


@pytest.mark.parametrize(("output", "step"), [("one", 4), ("fsdp", 4), ("ddp", 4), ("experts", 6)])
def test_every_checkpoint_is_one_for_from_pretrained(runs: Runs, output: str, step: int) -> None:
    folder, _ = runs
    ids = torch.arange(64).reshape(1, 64)
    logits = []
    for path in (folder / "one" / f"checkpoint-{step}", folder / output / f"checkpoint-{step}"):
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        with torch.no_grad():
            logits.append(model.eval()(input_ids=ids).logits)
    assert torch.allclose(*logits, rtol=1e-4, atol=1e-4)
    first, second = (load_file(folder / name / f"checkpoint-{step}" / "model.safetensors") for name in ("one", output))
    assert first.keys() == second.keys()


def test_a_nan_on_one_process_stops_all_and_is_named_by_all(runs: Runs) -> None:
    errors = [rank["nan"]["error"] for rank in runs[1]["fsdp"]]
    assert errors[0] == errors[1]
    assert "step 2 has non-finite gradients: the output of model.layers.0.self_attn.v_proj (Linear)" in errors[0]


def test_more_processes_than_shards_is_one_line_on_all(runs: Runs) -> None:
    for rank in runs[1]["ddp"]:
        assert "2 processes, but" in rank["few"]["error"] and "has 1 shard (files) to read" in rank["few"]["error"]
        assert "\n" not in rank["few"]["error"]
        assert "batch_tokens is 48: not a multiple of seq_len 16 × 2 processes; 64 would be" in rank["odd"]["error"]
