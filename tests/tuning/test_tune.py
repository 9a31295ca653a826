"""`moe-param tune` from its command line to tuned.yaml; one real training, otherwise losses without cost."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

import moe_param
from moe_param import TunedError
from moe_param.cli.tune import command_of, main, read
from moe_param.errors import InputError, MoeParamError
from moe_param.folder_lock import folder_lock
from moe_param.training.arguments import build_configs, parse
from moe_param.tuned import read_tuned
from moe_param.tuning.base import overrides_of, read_base
from moe_param.tuning.points import key_of
from moe_param.tuning.short_run import train
from moe_param.tuning.study import SearchError
from moe_param.tuning.tune import run_tune, share_of_target, start_of, strategy_of
from moe_param.tuning.workers import Answer, Watch
from tests.models import BYTE_MIXTRAL, CORE, FAMILIES
from tests.tuning.surfaces import Bowl

MODEL = {"model_type": "mixtral", "overrides": BYTE_MIXTRAL}
CONFIG = {
    **MODEL,
    "shape": {"width": 64},  # to train later: the sweep is about the base
    "dataset": "stdlib",
    "seq_len": 32,
    "validation_blocks": 8,
    "learning_rate": 2.0**-7,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.25,
    "logging_steps": 3,
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    return written(tmp_path / "config.yaml")


def written(path: Path, **changes: Any) -> str:
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return str(path)


def run(config: str, output: Path, *flags: str, evaluate: Any = None) -> dict[str, Any]:
    argv = [config, "--output_dir", str(output), "--heartbeat", "0.2", "--grace", "30", *flags]
    return run_tune(*read(argv), command=command_of(argv, None), evaluate=evaluate)


def best(output: Path) -> dict[str, Any]:
    return yaml.safe_load((output / "tuned.yaml").read_text())


def test_real_training(config: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    ladders = '{"router": {"init": [4]}}'
    flags = ["--log2_lrs", "-7", "-4", "--init_stds", "0.05", "--ladders", ladders, "--seeds", "0", "--workers", "1"]
    record = run(config, output, *flags)
    assert record["statuses"] == {"complete": 2}

    # the same numbers as here, in this process, from what is documented
    base = read_base(*read([config, "--log2_lrs", "-7"]))
    for trial in record["trials"]:
        point = trial["point"]
        assert point == {"init_std": 0.05, "learning_rate": point["learning_rate"], "router.init": 4.0}
        there = replace(base.run, lr=point["learning_rate"], init_std=0.05, constants={"router": {"init": 4.0}}, seed=0)
        assert trial["loss"] == pytest.approx(train(there).validation_loss, rel=1e-6)
    assert record["trials"][0]["loss"] != record["trials"][1]["loss"]
    assert train(replace(base.run, lr=point["learning_rate"])).validation_loss != trial["loss"]  # the constants matter

    # tuned.yaml is a config of pretrain as it is, and of this base only
    model, data, training = parse(["--config", str(output / "tuned.yaml")])
    built, target = build_configs(model)
    assert built.to_dict() == base.config.to_dict() and target.hidden_size == 16
    assert model.constants == {"router": {"init": 4.0}} and model.init_std == 0.05
    assert training.learning_rate == min(record["trials"], key=lambda t: t["loss"])["point"]["learning_rate"]
    assert (training.max_steps, training.per_device_train_batch_size, data.seq_len) == (6, 4, 32)
    assert (training.logging_steps, training.lr_scheduler_type, training.warmup_steps) == (3, "cosine", 0.25)
    assert best(output)["tuned_at"] == {"width": 16, "depth": 1, "num_experts": 4, "top_k": 2, "expert_size": 16}
    with pytest.raises(TunedError, match="tuned_at"):
        build_configs(parse(["--config", str(output / "tuned.yaml"), "--base_shape", "width=32"])[0])


def test_grid(config: str, tmp_path: Path) -> None:
    """The optimum, the stable region, what diverged, resuming with a longer ladder, a study of other settings."""
    output = tmp_path / "out"
    bowl = Bowl({"learning_rate": 2.0**-6, "init_std": 0.04}, diverges_above=2.0**-4.2, log=tmp_path / "log")
    flags = ["--init_stds", "0.02", "0.04", "--seeds", "0", "1", "--workers", "2", "--log2_lrs"]
    record = run(config, output, *flags, "-8", "-7", "-6", evaluate=bowl)
    assert record["best"]["at_edge"] == ["learning_rate", "init_std"]
    record = run(config, output, *flags, *(f"{x / 2:g}" for x in range(-16, -7)), evaluate=bowl)
    assert record["best"]["at_edge"] == ["init_std"]
    assert record["statuses"] == {"complete": 32, "diverged": 2}  # the twelve of before among them
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 16 * 2 + 2  # no run twice; a diverged seed spares the other
    numbers = best(output)
    assert (numbers["learning_rate"], numbers["init_std"]) == (2.0**-6, 0.04) and "constants" not in numbers
    low, high = (math.log2(rate) for rate in record["best"]["stable"])
    half_width = math.sqrt(0.01 * record["best"]["loss"] / bowl.curvature)  # where the parabola is 1% above
    assert -6 - low == pytest.approx(half_width, abs=0.05) and high + 6 == pytest.approx(half_width, abs=0.05)
    assert (output / "tune.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "tune.json").read_text())["statuses"] == record["statuses"]
    with pytest.raises(SearchError, match=r"made with training.steps = 6, this is 7"):
        run(config, output, *flags, "-7", "--max_steps", "7")
    with pytest.raises(SearchError, match=r"made with mode = 'grid', this is 'tpe'"):
        run(config, output, "--mode", "tpe", "--seeds", "0", "1")


def test_coordinate(tmp_path: Path) -> None:
    """From a tuned.yaml to a better one: a bad constant is put right, a good one kept, a useful one found."""
    constants = {"router": {"lr": 64.0}, "norm": {"lr": 0.25}}
    config = written(tmp_path / "config.yaml", constants=constants, init_std=0.03)
    bowl = Bowl({"norm.lr": 0.25, "expert_down.init": 1 / 16, "init_std": 0.03}, noise=0.005)
    flags = ["--mode", "coordinate", "--roles", "norm", "router", "expert_down", "--workers", "2"]
    record = run(config, tmp_path / "out", *flags, evaluate=bowl)
    numbers = best(tmp_path / "out")
    assert numbers["constants"] == {"norm": {"lr": 0.25}, "expert_down": {"init": 0.0625}}
    assert (numbers["learning_rate"], numbers["init_std"]) == (2.0**-7, 0.03)
    accepted = {(j["coordinate"], j["factor"]) for j in record["best"]["judgements"] if j["accepted"]}
    assert accepted == {("router.lr", 0.25), ("expert_down.init", 0.25)}
    assert record["best"]["loss"] < record["best"]["start_loss"] - 0.5
    assert (tmp_path / "out" / "tune.png").exists()

    flat = Bowl(noise=0.005, curvature=0.0)  # nothing to gain: nothing changes
    run(config, tmp_path / "flat", *flags, evaluate=flat)
    assert best(tmp_path / "flat")["constants"] == constants


def test_tpe(config: str, tmp_path: Path) -> None:
    flags = ["--mode", "tpe", "--trials", "4", "--log2_lrs", "-9", "-5", "--seeds", "0", "--workers", "1"]
    record = run(config, tmp_path / "out", *flags, evaluate=Bowl())
    assert record["statuses"]["complete"] >= 4
    assert 2.0**-9 <= best(tmp_path / "out")["learning_rate"] <= 2.0**-5
    assert (tmp_path / "out" / "tune.png").exists()


def test_default_coordinates_are_those_that_exist(config: str) -> None:
    args, *rest = read([config, "--mode", "coordinate"])
    coordinates = strategy_of(args, read_base(args, *rest)).coordinates  # type: ignore[union-attr]
    assert "router.init" in coordinates and "norm.lr" in coordinates and "expert_down.lr" in coordinates
    assert "norm.init" not in coordinates and not [c for c in coordinates if c.startswith("shared_up")]


def test_everything_diverged(config: str, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="every trial diverged"):
        run(config, tmp_path, "--log2_lrs", "-7", "--seeds", "0", "--workers", "1", evaluate=Bowl(diverges_above=0.0))


def test_password_is_not_written_down() -> None:
    argv = ["--storage", "postgresql://me:secret@host/db"]
    args, *_ = read([*argv, "--model_type", "mixtral"])
    command = command_of(argv, args.storage)
    assert "secret" not in command and "me:***@host/db" in command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "gird"], "mode is 'gird': expected one of stages, grid, tpe, gp, cmaes, coordinate"),
        (["--ladders", '{"rooter": {"lr": [1, 4]}}'], "ladders: no role 'rooter' in this model .did you mean 'router'"),
        (["--ladders", '{"shared_up": {"lr": [1, 4]}}'], "ladders: no role 'shared_up' in this model"),
        (["--ladders", '{"router": {"lr": []}}'], r"router.lr is \[\]: an empty ladder"),
        (["--ladders", '{"router": {"LR": [1]}}'], "router has 'LR', expected 'init' or 'lr'"),
        (["--ladders", '{"router": {"lr": [0]}}'], "router.lr: 0 is not a positive number"),
        (["--ladders", '{"norm": {"init": [1, 4]}}'], "the initialization of norm is not random"),
        (["--constants", '{"rooter": {"lr": 2}}'], "constants: unknown role 'rooter'"),
        (["--mode", "coordinate", "--roles", "rooter"], "roles: no role 'rooter'"),
        (["--mode", "coordinate", "--seeds", "0"], "at least two"),
        (["--mode", "coordinate", "--log2_lrs", "-7"], "log2_lrs is not for mode coordinate"),
        (["--mode", "tpe", "--log2_lrs", "-7"], "nothing to search"),
        (["--seeds", "0", "0"], "the same seed twice"),
        (["--budget", "many"], "budget is 'many': expected a number of runs, 75, or a share of a target run, 25%"),
        (["--budget", "9"], "a budget of 9 runs is too small for the stages: 33 at least with 3 seeds"),
        (["--mode", "gp", "--budget", "9"], "a budget of 9 runs is too small for mode gp: 26 at least"),
        (["--budget", "60", "--mode", "grid"], "budget is not for mode grid"),
        (["--start", "papr"], "start is 'papr': expected one of config, paper"),
        (["--trials", "4"], "trials is not for mode stages"),
        (["--command", "train {trial} {seed}", "--device", "cpu"], "device is not for runs that are a command"),
        (["--gpus_per_run", "2"], "gpus_per_run is not for runs in our loop, without a command"),
        (["--roles", "rooter"], "roles: no role 'rooter'"),
        (["--log2_lrs", "0.0078125"], r"log2_lrs: 0.0078125 would be a learning rate of .*did you mean -7\?"),
        (["--log2_lrs", "nan"], "log2_lrs: nan is no power of 2"),
        (["--log2_lrs", "-2000"], "log2_lrs: -2000 is no power of 2"),
        (["--ladders", "[1]"], "ladders is .1.: expected a mapping"),
        (["--log2_lrs", "-7", "8"], r"log2_lrs: 8 would be a learning rate of .*did you mean -8\?"),
        (["--log2_lr", "-7"], r"unknown argument '--log2_lr' \(did you mean '--log2_lrs'\?\)"),
        (
            ["--per_device_train_batch_size", "10000000"],
            r"a batch is 10000000 blocks of 32 tokens, and the whole text has \d+: give more text, or a batch of",
        ),
        (["--overrides", json.dumps({**BYTE_MIXTRAL, "vocab_size": 200})], "the tokenizer has 256 ids, the model 200"),
        (["--train_files", "nowhere.txt", "--mode", "gird"], "mode is 'gird'"),  # before the text is looked at
        (["--grace", "1"], "grace is 1.0: expected at least 10"),
        (["--max_grad_norm", "1"], "short runs do not clip"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "reduce_lr_on_plateau"),
        (["--storage", "postgresql://me:secret@127.0.0.1:1/x"], "cannot be used: .*refused"),
        (["--leanring_rate", "1"], "unknown argument '--leanring_rate' .did you mean '--learning_rate'"),
    ],
)
def test_bad_input_is_one_line(config: str, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(MoeParamError, match=message) as error:
        main([config, "--output_dir", str(tmp_path / "out"), *flags])
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_keys_do_not_depend_on_how_a_point_was_reached() -> None:
    assert key_of({"b.lr": 0.25 * 4, "learning_rate": 0.1 + 0.2}) == key_of({"learning_rate": 0.3})


def test_trials_train_as_the_config_says(tmp_path: Path) -> None:
    """Another text, another schedule: both reach the short run, and both matter."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} to be or not to be {i * i}"}) + "\n" for i in range(500)))
    losses = []
    for changes in ({}, {"lr_scheduler_type": "constant"}, {"train_files": [str(text)], "max_steps": 6}):
        config = written(tmp_path / "config.yaml", **changes)
        base = read_base(*read([config]))
        losses.append(train(base.run).validation_loss)
        assert base.yaml.get("train_files") == changes.get("train_files")
    assert len(set(losses)) == 3
    with pytest.raises(InputError, match="streaming: false"):
        config = written(tmp_path / "config.yaml", train_files=[str(text)], streaming=True)
        main([config, "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("family", CORE)
def test_any_family_can_be_written_down(family: str) -> None:
    entry = FAMILIES[family]
    module = importlib.import_module(entry["module"].replace("modeling_", "configuration_"))
    config = getattr(module, entry["config_class"])(**entry["tiny_config"])
    again = AutoConfig.for_model(config.model_type, **overrides_of(config))
    assert again.to_dict() == config.to_dict()


def test_the_file_says_all_that_its_numbers_depend_on(tmp_path: Path) -> None:
    """Nothing is left to a default that may be another one where the file is used: epsilon, betas, decay, schedule."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(MODEL))  # all else is left to the defaults
    run(str(config), tmp_path / "out", "--log2_lrs", "-7", "--seeds", "0", evaluate=Bowl())
    numbers = best(tmp_path / "out")
    there = read_base(*read([str(config)])).run
    assert (numbers["adam_epsilon"], numbers["adam_beta1"], numbers["adam_beta2"]) == (there.eps, *there.betas)
    assert (numbers["weight_decay"], numbers["decay"]) == (0.0, "independent")
    assert (numbers["max_steps"], numbers["seq_len"], numbers["per_device_train_batch_size"]) == (
        *(there.steps, there.seq_len, there.batch_size),
    )
    assert numbers["warmup_steps"] == there.warmup and numbers["lr_scheduler_type"] == there.schedule
    assert numbers["spec"] == "moe-completep" and numbers["tokenizer"] == "bytes"

    found = read_tuned(tmp_path / "out" / "tuned.yaml").numbers
    assert found.adam_epsilon == there.eps == 1e-12 and found.learning_rate == 2.0**-7


def test_one_search_on_a_folder(config: str, tmp_path: Path) -> None:
    with (
        folder_lock(tmp_path / "out", "another search"),
        pytest.raises(InputError, match=r"out is in use .another search"),
    ):
        run(config, tmp_path / "out", "--seeds", "0", evaluate=Bowl())
    storage = ["--storage", f"journal:{tmp_path / 'journal'}", "--seeds", "0", "--log2_lrs", "-7", "-6"]
    with folder_lock(tmp_path / "out", "moe-param tune"):  # joining from another folder is what a storage is for
        assert run(config, tmp_path / "other", *storage, evaluate=Bowl())["statuses"] == {"complete": 2}


@dataclass(frozen=True)
class Removes:
    """A run during which the whole output folder goes away."""

    folder: Path

    def __call__(self, point: dict[str, float], seed: int, watch: Watch) -> Answer:
        shutil.rmtree(self.folder)
        return Answer(2.0)


def test_a_folder_that_is_removed_ends_the_search_with_the_truth(config: str, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"study.db was removed while the search ran, and all its trials with it"):
        run(config, tmp_path / "out", "--seeds", "0", "--workers", "1", evaluate=Removes(tmp_path / "out"))
    # with a storage elsewhere nothing is lost
    storage = ["--storage", f"sqlite:///{tmp_path / 'study.db'}", "--seeds", "0", "--log2_lrs", "-7"]
    record = run(config, tmp_path / "out", *storage, evaluate=Removes(tmp_path / "out"))
    assert record["statuses"] == {"complete": 1} and best(tmp_path / "out")["learning_rate"] == 2.0**-7


def test_the_config_is_read_wherever_it_stands(config: str) -> None:
    for argv in ([config, "--seeds", "0"], ["--seeds", "0", "--config", config], ["--mode", "grid", config]):
        _, model, _, training = read([*argv])
        assert model.model_type == "mixtral" and training.max_steps == 6
    with pytest.raises(InputError, match="unknown argument '--log2_lr'"):  # whose value is no config
        read(["--log2_lr", "-7", "--config", config])
    _, _, _, training = read([config, "--tokens", "640"])  # in place of the file's max_steps
    assert training.tokens == 640 and training.max_steps == -1 and training.output_dir == "tune"


SCRIPT = """
import math, sys, yaml, moe_param
values = yaml.safe_load(open(sys.argv[1]))
rate = values["learning_rate"]
if rate > 2.0**-5:
    sys.exit("out of memory")
for step in (1, 2):
    moe_param.report(3.0 / step, step=step, steps=2)
moe_param.report(2.0 + 0.02 * math.log2(rate / 2.0**-6) ** 2 + 0.001 * int(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_script_of_the_user_s_is_tuned(config: str, tmp_path: Path) -> None:
    """By the command line: its losses decide, its failures are results, with what they said."""
    (tmp_path / "train.py").write_text(SCRIPT)
    command = f"{sys.executable} {tmp_path / 'train.py'} {{trial}} {{seed}}"
    output = tmp_path / "out"
    flags = ["--command", command, "--roles", "none", "--seeds", "0", "1", "--workers", "2", "--limit", "300"]
    record = run(config, output, *flags)
    assert best(output)["learning_rate"] == 2.0**-6 and record["statuses"]["failed"] >= 1
    failed = [trial for trial in record["trials"] if trial["status"] == "failed"]
    assert all("out of memory" in trial["failure"] and trial["loss"] is None for trial in failed)
    assert "out of memory" in (output / "tune.html").read_text()
    with pytest.raises(InputError, match=r"\{trial\}"):
        run(config, tmp_path / "other", "--command", "python train.py")
    with pytest.raises(SearchError, match=r"made with search\.constants"):
        run(config, output, *flags[:2], "--seeds", "0", "1", "--roles", "router")


def test_tune_is_a_function_too(tmp_path: Path) -> None:
    """A mapping or a config in place of the file; what is wrong is one error of ours."""
    found = moe_param.tune(
        {**CONFIG, "max_steps": 2}, budget=20, seeds=(0,), space=moe_param.Space(roles=()), output_dir=tmp_path / "a"
    )
    assert found.numbers.learning_rate and found.init_std and found.constants is None
    assert found.base.hidden_size == 16 and found.spec == "moe-completep"
    with pytest.raises(InputError, match="did you mean 'max_steps'"):
        moe_param.tune(CONFIG, max_step=3, output_dir=tmp_path / "b")
    with pytest.raises(InputError, match="budget 25% is a share of a run at --shape, which is not given"):
        moe_param.tune({**CONFIG, "shape": None}, budget="25%", output_dir=tmp_path / "b")


def test_a_budget_as_a_share_of_the_target_s_run(config: str, tmp_path: Path) -> None:
    """As many runs as have its FLOPs: four times the width and expert size costs about a dozen base runs."""
    args, model, data, training = read([config, "--budget", "400%", "--output_dir", str(tmp_path)])
    base = read_base(args, model, data, training)
    share = share_of_target(args, base, model, data)
    assert share is not None and 1 / 16 < share < 1 / 3
    assert args.runs(share) == pytest.approx(4 / share)


def test_the_search_starts_at_the_paper_s_std_carried_to_the_base_s_width(config: str, tmp_path: Path) -> None:
    """2^-6 at width 512, by fan-in; what was given is kept; --start paper adds constants of roles that there are."""

    def start(*flags: str) -> dict[str, float]:
        args, *rest = read([config, "--output_dir", str(tmp_path), *flags])
        return start_of(args, read_base(args, *rest))

    assert start() == pytest.approx({"learning_rate": 2.0**-7, "init_std": 2.0**-6 * 32**0.5})
    assert start("--init_std", "0.03")["init_std"] == 0.03
    paper = start("--start", "paper")
    assert paper["router.lr"] == 1 / 16 and paper["attention_value.init"] == 1 / 16
