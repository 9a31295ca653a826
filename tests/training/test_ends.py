"""How a run ends that does not come to its end: a folder in use or removed, Ctrl-C, processes that are alone."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moe_param.cli.main import run as command_line
from moe_param.errors import InputError, MoeParamError
from moe_param.training import pretrain
from moe_param.training.processes import LAUNCHED, require_one_group
from moe_param.training.report import MetricsFile, read_lines
from tests.models import BYTE_MIXTRAL
from tests.training.kills import arguments, fork, texts


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return texts(tmp_path)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Calls `act` in the middle of a run, before the logs and checkpoints of `step`."""

    class Acting(MetricsFile):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                act()

    monkeypatch.setattr(pretrain, "MetricsFile", Acting)


def test_a_second_run_into_a_folder_in_use_is_refused_and_the_first_goes_on(
    tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "said.txt"
    ended: list[int] = []

    def refused() -> None:
        with pytest.raises(InputError) as raised:
            pretrain.main(arguments(tmp_path / "run", files, 4, "--resume"))
        said.write_text(str(raised.value))

    def second() -> None:
        ended.append(os.waitpid(fork(refused, tmp_path / "log.txt"), 0)[1])

    at_step(monkeypatch, 2, second)
    pretrain.main(arguments(tmp_path / "run", files, 4))
    assert ended == [0]
    assert re.search(rf"run is in use \(training on .*, process {os.getpid()}, since", said.read_text())
    steps = [line["step"] for line in read_lines(tmp_path / "run" / MetricsFile.name) if "loss" in line]
    assert steps == [1, 2, 3, 4]  # of one run


@pytest.mark.parametrize("logging_steps", [1, 100], ids=["seen by the log", "seen by the checkpoint"])
def test_a_removed_folder_is_not_called_a_full_disk(
    tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch, logging_steps: int
) -> None:
    at_step(monkeypatch, 2, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(MoeParamError) as raised:
        pretrain.main(arguments(tmp_path / "run", files, 4, "--logging_steps", str(logging_steps)))
    assert "run was removed while the run wrote to it" in str(raised.value) and "space" not in str(raised.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("step", "said"), [(5, "--resume goes on from checkpoint-3"), (2, "--resume starts afresh")])
def test_ctrl_c_is_one_line_that_says_how_to_go_on(
    tmp_path: Path,
    files: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: int,
    said: str,
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    at_step(monkeypatch, step, interrupt)
    with pytest.raises(SystemExit) as raised:
        command_line("train", arguments(tmp_path / "run", files, 6))
    assert raised.value.code == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("moe-param train: interrupted: ") and said in line


# -- before the first step -------------------------------------------------------------------------------------------
def test_launched_processes_that_are_alone_are_refused(
    tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(InputError, match=r"2 processes were launched \(SLURM_STEP_NUM_TASKS\).*in a group of 1"):
        pretrain.main(arguments(tmp_path / "run", files, 4))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_launchers_count_is_compared(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    state = PartialState(cpu=True)  # one process; made before the launcher is said to have started more
    for other in LAUNCHED:
        monkeypatch.delenv(other, raising=False)
    require_one_group(state)
    monkeypatch.setenv(name, "1")
    require_one_group(state)
    monkeypatch.setenv(name, "4")
    with pytest.raises(InputError, match=rf"4 processes were launched \({name}\)"):
        require_one_group(state)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--spec", "moe-complete"], "moe-complete"),
        (["--decay", "ema", "--weight_decay", "0.1"], "base_steps"),
        (["--constants", '{"rooter": {"lr": 2}}'], "rooter"),
        (["--adam_epsilon", "-1"], "eps"),
    ],
)
def test_what_is_wrong_is_said_before_text_is_read(tmp_path: Path, flags: list[str], message: str) -> None:
    missing = [str(tmp_path / "missing.jsonl")]
    with pytest.raises(MoeParamError, match=message):
        pretrain.main(arguments(tmp_path / "run", missing, 4, *flags))
    with pytest.raises(InputError, match=r"missing.jsonl: no such file"):
        pretrain.main(arguments(tmp_path / "run", missing, 4))


@pytest.mark.parametrize("name", ["runs/base/config", "./base", "/nowhere/base"])
def test_a_missing_folder_as_model_is_called_that(tmp_path: Path, name: str) -> None:
    with pytest.raises(MoeParamError) as raised:
        pretrain.build_configs(pretrain.parse(["--model", name])[0])
    assert f"no folder or file {name}" in str(raised.value) and "Repo id" not in str(raised.value)


# -- tokenizers ------------------------------------------------------------------------------------------------------
def test_a_tokenizer_without_a_pad_token_trains_evaluates_and_is_saved(tmp_path: Path, files: list[str]) -> None:
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    lines = [json.loads(line)["text"] for line in Path(files[0]).read_text().splitlines()]
    words.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=64, special_tokens=["<|endoftext|>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>")
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(tmp_path / "bpe")
    sizes = {"overrides": json.dumps(BYTE_MIXTRAL | {"vocab_size": 64}), "seq_len": "16", "tokenizer": tmp_path / "bpe"}
    flags = [str(text) for name, value in sizes.items() for text in (f"--{name}", value)]
    summary = pretrain.main(arguments(tmp_path / "run", files, 8, *flags, "--eval_steps", "4"))
    evaluated = [line["step"] for line in read_lines(tmp_path / "run" / MetricsFile.name) if "eval_loss" in line]
    assert evaluated == [4, 8] and summary["validation_loss"] < 4.5
    assert AutoTokenizer.from_pretrained(tmp_path / "run").pad_token is None


# -- CONFIG ----------------------------------------------------------------------------------------------------------
def test_config_is_the_first_argument_or_named_and_may_be_a_model(tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    path.write_text(
        "model_type: mixtral\nlearning_rate: 1e-3\nadam_beta1: 0.8\nadam_beta2: 0.9\nadam_epsilon: 1e-13\n"
        "weight_decay: 0.2\ndecay: independent\ninit_std: 0.03\nconstants: {router: {lr: 2.0}}\nshape: {width: 64}\n"
    )
    for argv in ([str(path), "--seq_len", "8"], ["--seq_len", "8", "--config", str(path)]):
        model, data, args = pretrain.parse([*argv, "--weight-decay", "0.1"])
        assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (1e-3, 0.8, 0.9, 1e-13)
        assert (args.weight_decay, args.decay, model.init_std, data.seq_len) == (0.1, "independent", 0.03, 8)
        assert (model.constants, model.shape) == ({"router": {"lr": 2.0}}, {"width": 64})
    assert pretrain.parse(["mixtral"])[0].model_type == "mixtral"
    assert pretrain.parse([str(tmp_path)])[0].model == str(tmp_path)
    with pytest.raises(InputError, match="CONFIG is given twice"):
        pretrain.parse([str(path), "--config", str(path)])
