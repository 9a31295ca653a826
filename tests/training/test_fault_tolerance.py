"""What breaks a long run: kills, damaged checkpoints, a full disk, numbers that are not finite. All of it for real."""

from __future__ import annotations

import json
import logging
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_param.errors import MoeParamError
from moe_param.training import pretrain
from moe_param.training.checkpoints import MANIFEST, STAGING, CheckpointError, last_good, problem, publish
from moe_param.training.data.batches import Batches
from moe_param.training.nonfinite import NonFiniteError, first_nonfinite
from moe_param.training.report import MetricsFile, read_lines
from tests.training.kills import arguments, compare, texts

STEPS = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, files: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    pretrain.main(arguments(folder, files, STEPS))  # checkpoints at 6 and 8
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


# -- kills -----------------------------------------------------------------------------------------------------------
def test_killed_again_and_again_it_ends_like_a_run_that_was_not(tmp_path: Path) -> None:
    """`python -m tests.training.kills FOLDER` does the same with 20 kills."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.kills", str(tmp_path), "--kills", "4", "--steps", "24"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:] + (tmp_path / "log.txt").read_text()[-3000:]
    found = json.loads(done.stdout)
    assert found["kills"] == 4 and found["same losses"] and found["same weights"]


def test_the_comparison_sees_samples_that_are_seen_again(
    copy: Path, whole: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / "checkpoint-8")
    original = Batches.__iter__
    monkeypatch.setattr(
        Batches, "__iter__", lambda self: original(Batches(self.data, self.horizon, self.seed))
    )  # from the first sample, wherever the checkpoint is
    pretrain.main(arguments(copy, files, STEPS, "--resume"))
    found = compare(whole, copy)
    assert not found["same losses"] and not found["same weights"]


# -- damaged checkpoints ---------------------------------------------------------------------------------------------
def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def flip_a_bit(folder: Path) -> None:
    path = next((folder / "optimizer").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, r"model.safetensors has 1000 bytes, not \d+"),
        (flip_a_bit, r"optimizer/__0_0.distcp is not what was written"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "no readable manifest.json"),
        (lambda folder: (folder / MANIFEST).write_text('{"a'), "no readable manifest.json"),
    ],
)
def test_damage_is_seen_said_once_and_put_aside(
    copy: Path, caplog: pytest.LogCaptureFixture, damage: Any, said: str
) -> None:
    assert last_good(copy) == copy / "checkpoint-8" and not caplog.records
    damage(copy / "checkpoint-8")
    with caplog.at_level(logging.WARNING):
        assert last_good(copy) == copy / "checkpoint-6"
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("checkpoint-8 is damaged (")
    assert "going on from checkpoint-6" in caplog.text
    assert (copy / "damaged-checkpoint-8").is_dir() and not (copy / "checkpoint-8").exists()
    assert re.search(said, caplog.text)
    caplog.clear()
    assert last_good(copy) == copy / "checkpoint-6" and not caplog.records  # said once


def test_no_whole_checkpoint_is_an_error_and_none_at_all_is_not(copy: Path, tmp_path: Path) -> None:
    truncate(copy / "checkpoint-6")
    truncate(copy / "checkpoint-8")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: checkpoint-8 is damaged .* checkpoint-6 is"):
        last_good(copy)
    assert last_good(tmp_path / "nothing") is None


def test_a_run_with_a_truncated_checkpoint_goes_on_from_the_one_before(
    copy: Path, whole: Path, files: list[str]
) -> None:
    truncate(copy / "checkpoint-8")
    (copy / STAGING / "checkpoint-9").mkdir(parents=True)  # and something that a crash left half written
    summary = pretrain.main(arguments(copy, files, STEPS, "--resume"))
    assert summary["resumed_from"].endswith("checkpoint-6")
    assert all(compare(whole, copy)[what] for what in ("same losses", "same weights"))
    assert problem(copy / "checkpoint-8") is None and not (copy / STAGING).exists()


def test_a_published_folder_appears_whole_and_replaces_an_older_one(tmp_path: Path) -> None:
    staged, final = tmp_path / "staged", tmp_path / "checkpoint-1"
    for text in ("old", "new"):
        (staged / "inner").mkdir(parents=True)
        (staged / "inner" / "a").write_text(text)
        publish(staged, final)
        assert (final / "inner" / "a").read_text() == text and problem(final) is None and not staged.exists()


def test_another_batch_or_length_of_blocks_does_not_go_on(copy: Path, files: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"written with batch 4, not 8.*--batch_tokens"):
        pretrain.main(arguments(copy, files, STEPS, "--resume", "--gradient_accumulation_steps", "2"))


# -- a full disk -----------------------------------------------------------------------------------------------------
@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system's own limit, which fails as a full disk does: in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(
    copy: Path, whole: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / "checkpoint-8")
    with files_no_larger_than(60_000), pytest.raises(CheckpointError) as raised:
        pretrain.main(arguments(copy, files, STEPS, "--resume"))
    message = str(raised.value)
    assert "\n" not in message and isinstance(raised.value, MoeParamError)
    assert "checkpoint-8 could not be written" in message and "the last good one is checkpoint-6" in message
    assert problem(copy / "checkpoint-6") is None
    assert not (copy / "checkpoint-8").exists() and not (copy / STAGING).exists()
    pretrain.main(arguments(copy, files, STEPS, "--resume"))  # space again
    assert all(compare(whole, copy)[what] for what in ("same losses", "same weights"))


# -- numbers that are not finite -------------------------------------------------------------------------------------
def planted(monkeypatch: pytest.MonkeyPatch, at: int, plant: Any) -> list[dict[str, torch.Tensor]]:
    """Calls `plant(model, trainer state)` once, before training; returns the weights before and after step `at`."""
    seen: list[dict[str, torch.Tensor]] = []

    class Planting(MetricsFile):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            plant(kwargs["model"], state)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (at - 1, at):
                seen.append({name: p.detach().clone() for name, p in kwargs["model"].named_parameters()})

    monkeypatch.setattr(pretrain, "MetricsFile", Planting)
    return seen


def spoil(module_name: str, step: int) -> Any:
    """The output of one module becomes infinite in one step."""

    def plant(model: torch.nn.Module, state: Any) -> None:
        def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output * float("inf") if state.global_step == step - 1 and module.training else output

        model.get_submodule(module_name).register_forward_hook(hook)

    return plant


CULPRIT = "model.layers.0.self_attn.v_proj"


def test_a_nan_stops_and_names_the_layer(tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, 5, spoil(CULPRIT, 5))
    with pytest.raises(NonFiniteError, match=rf"step 5 has non-finite gradients: the output of {CULPRIT} \(Linear\)"):
        pretrain.main(arguments(tmp_path / "run", files, STEPS))
    assert isinstance(NonFiniteError(), MoeParamError)
    assert last_good(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"  # from before


def test_a_nan_is_skipped_and_counted_if_asked(
    tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = planted(monkeypatch, 5, spoil(CULPRIT, 5))
    flags = ["--nan", "skip", "--logging_steps", "2", "--clip", "1.0", "--save_steps", "6"]
    summary = pretrain.main(arguments(tmp_path / "run", files, STEPS, *flags))
    assert summary["skipped_steps"] == 1 and summary["steps"] == STEPS
    before, after = seen
    assert all(torch.equal(before[name], after[name]) for name in before)  # nothing moved, momentum or not
    lines = {line["step"]: line for line in read_lines(tmp_path / "run" / MetricsFile.name) if "loss" in line}
    assert [line.get("skipped_steps") for line in lines.values()] == [None, None, 1, 1]
    assert all(3 < line["loss"] < 6 for line in lines.values())  # the mean of the steps that were taken
    assert lines[8]["moe/bias_range"] > 0 and lines[8]["scale_free_grad_norm"] > 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    again = pretrain.main(arguments(tmp_path / "run", files, STEPS, "--resume", *flags))
    assert again["skipped_steps"] == 1  # the counter is in the checkpoint


def test_nothing_is_skipped_forever(tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def plant(model: torch.nn.Module, state: Any) -> None:
        with torch.no_grad():
            model.get_submodule(CULPRIT).weight[0, 0] = float("nan")

    monkeypatch.setattr("moe_param.training.trainer.PATIENCE", 2)
    planted(monkeypatch, 1, plant)
    with pytest.raises(NonFiniteError, match=rf"2 steps in a row were skipped.*the parameter {CULPRIT}.weight holds"):
        pretrain.main(arguments(tmp_path / "run", files, STEPS, "--nan", "skip"))


class Explodes(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * float("nan")


class Backward(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Explodes.apply(x)


def test_a_gradient_is_traced_to_the_module_it_comes_from() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Backward(), torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    found = first_nonfinite(model, [lambda: model(torch.ones(1, 2)).sum()])
    # Module 1 makes it: the gradient that reaches the output of 0 is the first bad one; those of 2 and 3 are fine.
    assert found == (2, "the gradient that reaches the output of 0 is the first non-finite one backward")
    model[1] = torch.nn.Identity()
    assert first_nonfinite(model, [lambda: model(torch.ones(1, 2)).sum()]) is None


def test_weights_are_those_of_the_last_step(whole: Path) -> None:
    """What the comparisons compare is not empty, and moved."""
    first, last = (load_file(whole / f"checkpoint-{step}" / "model.safetensors") for step in (6, 8))
    assert first.keys() == last.keys() and not any(torch.equal(first[name], last[name]) for name in first)
