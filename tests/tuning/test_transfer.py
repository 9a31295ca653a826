"""`moe_param.transfer` and its command: planted worlds, runs that were really made, and the whole at its smallest."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, MixtralConfig

import moe_param
from moe_param.cli.transfer import main
from moe_param.errors import InputError, MoeParamError
from moe_param.folder_lock import folder_lock
from moe_param.structure.shape import Shape
from moe_param.tuning import transfer as module
from moe_param.tuning.drift import Curves, compare
from moe_param.tuning.short_run import Outcome, ShortRun
from moe_param.tuning.transfer import targets
from tests.models import BYTE_MIXTRAL

NUMBERS: dict[str, Any] = {
    "model_type": "mixtral",
    "overrides": BYTE_MIXTRAL,
    "learning_rate": 0.01,
    "seq_len": 32,
    "init_std": 0.03,
}
CONSTANTS = {"router": {"lr": 0.25}}
BASE_WIDTH = Shape.from_config(MixtralConfig(**BYTE_MIXTRAL)).width


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**NUMBERS, **changes}))
    return path


# -- planted worlds --------------------------------------------------------------------------------------------------
def planted(run: ShortRun, moves: float = 0.0) -> float:
    """Loss of a run: under standard the best rate falls with the width, under ours it moves by `moves` octaves; with
    the base's constants and its init std it is lower. A seed adds its own, and a little noise depends on all."""
    width = math.log2(AutoConfig.for_model(**run.config).hidden_size / BASE_WIDTH)
    octave = math.log2(run.lr / 0.01) + width * (1.0 if run.spec == "standard" else -moves)
    std = math.log2((run.init_std or 0.02) / 0.03)
    noise = 1e-4 * math.sin(1e3 * run.lr + 7 * run.seed + 31 * width)
    loss = 2 + 0.05 * octave**2 + 0.02 * std**2 + 0.02 * run.seed - 0.1 * width + (0.05 if not run.constants else 0)
    return loss + noise + (0.3 if run.spec == "standard" and width else 0.0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Replaces the training of runs by a planted loss; the list fills with the names of what was run."""

    def install(loss: Callable[[ShortRun], float] = planted) -> list[str]:
        ran: list[str] = []

        def run_all(work: Any, jobs: Mapping[str, ShortRun], *_: Any, **__: Any) -> dict[str, dict[str, Any]]:
            ran.extend(name for name in jobs if name not in ran)
            return {name: {"validation_loss": loss(run), "seconds": 1.0} for name, run in jobs.items()}

        monkeypatch.setattr(module, "run_all", run_all)
        return ran

    return install


def test_a_parameterization_that_transfers_and_one_that_does_not(tmp_path: Path, world: Any) -> None:
    ran = world()
    config = write(tmp_path / "tuned.yaml", constants=CONSTANTS)
    report = moe_param.transfer(config, ["width=2", "width=4"], output_dir=tmp_path / "out", base_runs=40)
    assert isinstance(report, moe_param.TransferReport)
    assert report.verdicts == {
        ("moe-completep", "width=2"): "yes",
        ("moe-completep", "width=4"): "yes",
        ("standard", "width=2"): "no",  # the negative control
        ("standard", "width=4"): "no",
    }
    drifts = {(row.spec, row.target): row.drift.octaves for row in report.rows}
    assert drifts["standard", "width=4"] == pytest.approx(-2.0, abs=0.02)
    assert drifts["moe-completep", "width=4"] == pytest.approx(0.0, abs=0.02)
    (costs,) = report.costs  # at the largest target alone
    assert costs.target == "width=4" and costs.loss == pytest.approx(1.8, abs=1e-3)
    best = {found.search.constants: (found.octave, found.init_std) for found in costs.searches}
    assert best == {True: (-2.0, 0.03), False: (-2.0, 0.04)}  # 0.03, which the base knows, instead of 0.02
    assert {found.search.constants: round(found.loss, 2) for found in costs.searches} == {True: 2.1, False: 2.15}
    assert costs.ways[0].total == pytest.approx(40 * costs.base_flops + costs.target_flops)
    assert len(ran) == len(set(ran)) and not any(name.startswith("standard/base") for name in ran)
    said = " ".join(str(report).split())
    assert "no" in said and "Computed, not run" in said
    written = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict())) and (tmp_path / "out" / "costs.png").is_file()


def test_ladders_get_longer_until_the_best_is_inside(tmp_path: Path, world: Any) -> None:
    world(lambda run: planted(run, moves=-1.5))
    config = write(tmp_path / "tuned.yaml")
    options: dict[str, Any] = {"octaves": [-1.0, 0.0, 1.0], "search": ["none"], "specs": ["moe-completep"]}
    report = moe_param.transfer(config, ["width=4"], output_dir=tmp_path / "out", **options)
    (row,) = report.rows
    assert row.octaves["target"] == (-3.0, -2.0, -1.0, 0.0, 1.0) and row.at_edge == ("target",)  # -3 is its best
    assert row.transferred == "no" and report.costs == ()
    report = moe_param.transfer(config, ["width=4"], output_dir=tmp_path / "out", extend=3, **options)
    assert report.rows[0].octaves["target"][0] == -4.0 and not report.rows[0].at_edge
    assert report.rows[0].octaves["base"] == (-1.0, 0.0, 1.0)
    report = moe_param.transfer(config, ["width=4"], output_dir=tmp_path / "out", extend=0, **options)
    assert report.rows[0].octaves["target"] == (-1.0, 0.0, 1.0) and report.rows[0].at_edge == ("target",)


def test_the_bases_best_rung_is_on_every_targets_ladder(tmp_path: Path, world: Any) -> None:
    """Where the base's ladder got longer: what keeping its rate costs is measured, not guessed."""
    world(lambda run: planted(run) + 0.5 * (math.log2(run.lr / 0.01) + 3) * (run.config == run.base))
    config = write(tmp_path / "tuned.yaml")
    options: dict[str, Any] = {"octaves": [-1.0, 0.0, 1.0], "search": ["none"], "specs": ["moe-completep"]}
    (row,) = moe_param.transfer(config, ["width=4"], output_dir=tmp_path / "out", **options).rows
    assert row.octaves["target"] == row.octaves["base"] == (-3.0, -2.0, -1.0, 0.0, 1.0)
    assert row.regret.mean == pytest.approx(0.05 * 9 / 1.8, rel=0.05) and row.transferred == "no"


def test_what_a_search_and_a_ladder_have_in_common_is_run_once(tmp_path: Path, world: Any) -> None:
    ran = world()
    config = write(tmp_path / "tuned.yaml", constants=CONSTANTS)
    report = moe_param.transfer(config, ["width=2"], output_dir=tmp_path / "out", seeds=[0, 1], init_stds=[0.02, 0.04])
    common = [name for name in ran if name.startswith("search/standard/width=2/constants/0.03/")]
    assert common == []  # they are standard/width=2/…
    with_constants = next(found for found in report.costs[0].searches if found.search.constants)
    assert 0.03 in with_constants.search.init_stds


def test_numbers_that_were_read_are_taken_like_their_file(tmp_path: Path, world: Any) -> None:
    world()
    config = write(tmp_path / "tuned.yaml", constants=CONSTANTS)
    options: dict[str, Any] = {"search": ["none"], "seeds": [0, 1]}
    of_file = moe_param.transfer(config, ["width=2"], output_dir=tmp_path / "a", **options)
    read = moe_param.read_tuned(config)
    of_values = moe_param.transfer(read, ["width=2"], output_dir=tmp_path / "b", training={"seq_len": 32}, **options)
    assert of_values.to_dict()["runs"] == of_file.to_dict()["runs"]
    assert of_values.to_dict()["tokens"] == of_file.to_dict()["tokens"]
    with pytest.raises(InputError, match=r"training: unknown argument 'seq_length' .did you mean 'seq_len'"):
        moe_param.transfer(read, ["width=2"], output_dir=tmp_path / "c", training={"seq_length": 32})


# -- runs that were really made --------------------------------------------------------------------------------------
REAL = {  # 300 steps of recipes/configs/transfer.yaml and width ×4, three seeds: octaves -2, -1, 0, 1
    "base": ((2.3749, 2.1557, 2.0059, 2.1105), (2.3651, 2.1739, 2.0941, 2.1652), (2.3853, 2.1433, 2.0432, 2.1278)),
    "moe-completep": ((2.3545, 2.0809, 1.9451, 2.0259), (2.34, 2.0837, 1.9605, 2.016), (2.3717, 2.169, 1.9886, 2.0238)),
    "standard": ((1.9073, 1.882, 1.9601, 2.1382), (1.9385, 1.9045, 1.961, 2.1164), (1.9223, 1.8661, 1.9738, 2.1344)),
}


def test_real_runs_tell_the_two_apart() -> None:
    curves = {name: Curves((-2.0, -1.0, 0.0, 1.0), losses) for name, losses in REAL.items()}
    ours, standard = (compare(name, "width=4", curves["base"], curves[name]) for name in ("moe-completep", "standard"))
    assert ours.transferred == "yes" and abs(ours.drift.octaves) < 0.2
    assert standard.transferred == "no" and standard.drift.octaves < -1


# -- the whole at its smallest ---------------------------------------------------------------------------------------
def test_targets_keep_alpha_and_sparsity() -> None:
    base = MixtralConfig(**BYTE_MIXTRAL)
    found = {
        name: Shape.from_config(config)
        for name, config in targets(base, ["width=2,depth=3", "num_experts=2", "expert_size=0.5,width=2"]).items()
    }
    assert found["width=2,depth=3"] == found["base"].along("width", 2).along("depth", 3)
    assert found["num_experts=2"].sparsity == found["base"].sparsity
    assert found["expert_size=0.5,width=2"].expert_size == found["base"].expert_size  # smaller is fine, too


def command(config: Path, output: Path) -> list[str]:
    return [str(config), "--output_dir", str(output), "--axes", "width=2", "--smallest", "--workers", "1"]


def test_smallest_killed_and_resumed(tmp_path: Path) -> None:
    """A killed command leaves no process, and the next one goes on; then every run was done once."""
    best, output = write(tmp_path / "best.yaml"), tmp_path / "transfer"  # the old name
    ledger = output / "runs.jsonl"
    code = "import sys; from moe_param.cli.transfer import main; main(sys.argv[1:])"
    killed = subprocess.Popen([sys.executable, "-c", code, *command(best, output)], cwd=Path(__file__).parents[2])
    wait_until(lambda: killed.poll() is not None or (ledger.exists() and ledger.read_text().count("\n") >= 2))
    workers = [int(pid) for pid in Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert workers
    wait_until(lambda: not any(map(alive, workers)))
    before = [line for line in ledger.read_text().splitlines(keepends=True) if line.endswith("\n")]

    main(command(best, output))
    record = json.loads((output / "transfer.json").read_text())
    lines = ledger.read_text().splitlines(keepends=True)
    assert lines[: len(before)] == before and len(lines) == len(record["runs"]) == 9 + 3  # ladders, search
    assert record["base_runs_shared"] == ["standard"]
    assert {row["spec"] for row in record["summary"]} == {"moe-completep", "standard"}
    assert {row["transferred"] for row in record["summary"]} <= {"no", "undecided"}  # of one seed
    base, wide = (record["runs"][f"moe-completep/{target}/0/0"] for target in ("base", "width=2"))
    assert base != wide != record["runs"]["standard/width=2/0/0"]
    assert record["costs"][0]["base_runs"] is None and "--base_runs" in record["costs"][0]["base_runs_source"]
    for picture in ("transfer.png", "costs.png", "transfer.html"):
        assert (output / picture).stat().st_size > 10_000
    write(best, learning_rate=0.02)
    with pytest.raises(InputError, match="other settings"):
        main(command(best, output))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# -- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["heads=2"], "--axes: unknown size 'heads' .valid: width"),
        (["width"], "not NAME=VALUE"),
        (["top_k=2"], r"--axes: top_k=2 alone would change the sparsity (\d+)/(\d+).*num_experts=2 takes top_k along"),
        (["num_experts=2,top_k=2"], "would change the sparsity"),
        (["width=1"], "width=1 is the base itself: a target has another size, e.g. width=4"),
        (["width=1.03"], r"width × 1.03: width would be .*not whole.*nearest"),
    ],
)
def test_bad_axes_are_named(axes: list[str], message: str) -> None:
    with pytest.raises(MoeParamError, match=message):
        targets(MixtralConfig(**BYTE_MIXTRAL), axes)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--axe", "width=2"], r"unknown argument '--axe' .did you mean '--axes'"),
        (["--log2_lrs", "-7"], r"unknown argument '--log2_lrs'"),
        (["--axes", "width=2", "--axes"], "expected at least one argument"),
        (["--axes", "depth=0.25"], "depth"),
        (["--specs", "moe-completep", "standrad"], "no scaling spec 'standrad' .did you mean 'standard'"),
        (["--search", "standrad"], "no scaling spec 'standrad' .did you mean 'standard'"),
        (
            ["--axes", "width=2", "--search_at", "width=4"],
            "--search_at: unknown target 'width=4' .did you mean 'width=2'",
        ),
        (["--seeds", "0", "1", "--search_seeds", "2"], r"search_seeds are \[2\]: expected some of the seeds \[0, 1\]"),
        (["--init_stds", "0"], "init_stds: 0 is no standard deviation"),
        (["--octaves", "-1", "0"], "three rungs"),
        (["--octaves", "1", "2", "3"], "0 .the config's rate. among them"),
        (["--octaves", "-1", "0", "1", "nan"], "octaves are .*nan.*: expected numbers"),
        (["--workers", "-1"], "workers is -1"),
        (["--base_runs", "0"], "base_runs is 0.0: expected a number above 0"),
    ],
)
def test_what_is_typed_wrong_is_one_line_before_the_text_is_read(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"model_type": "mixtral", "overrides": BYTE_MIXTRAL, "train_files": ["nowhere"]}))
    with pytest.raises(MoeParamError, match=message) as error:
        main([str(config), "--output_dir", str(tmp_path / "out"), *flags])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tuned_at": {"width": 8, "depth": 1, "num_experts": 4, "top_k": 1, "expert_size": 8}},
            "found on another base",
        ),
        ({"model_type": "olmo"}, "olmo configs have no .*num_local_experts"),  # of another family
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"train_files": ["nowhere"]}, "nowhere"),
    ],
)
def test_a_file_that_is_not_of_this_base_is_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = write(tmp_path / "tuned.yaml", **changes)
    with pytest.raises(MoeParamError, match=message) as error:
        main([str(config), "--output_dir", str(tmp_path / "out"), "--axes", "width=2"])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_too_little_text_and_a_folder_in_use(tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = write(tmp_path / "config.yaml", per_device_train_batch_size=10_000_000)
    with pytest.raises(InputError, match="a batch is 10000000 blocks of 32 tokens, and the whole text has"):
        main([str(config), "--output_dir", str(output), "--axes", "width=2"])
    with folder_lock(output, "moe-param transfer"), pytest.raises(InputError, match=r"out is in use \(moe-param tran"):
        main([str(config), "--output_dir", str(output), "--axes", "width=2", "--smallest"])


def test_a_device_that_is_not_there_is_refused_and_every_gpu_gets_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: Any
) -> None:
    """Two GPUs as far as anyone can tell: two workers, each with its own, in bfloat16; the record says the first."""
    world()
    config = write(tmp_path / "tuned.yaml")
    with pytest.raises(InputError, match="device is 'cuda': there is no GPU here"):
        moe_param.transfer(config, ["width=2"], output_dir=tmp_path / "none", device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr("moe_param.tuning.runners.check_run", lambda run: None)
    asked: list[ShortRun] = []
    monkeypatch.setattr(module, "train", lambda run: (asked.append(run), Outcome(2.0, 2.0, 1.0))[1])
    args = module.TransferArguments(str(config), axes=["width=2"])
    assert args.workers == 2 and args.runner.devices() == ("cuda:0", "cuda:1")
    plan = module.plan_runs(args)
    run = args.runner.checked(plan.template)
    assert (run.device, run.dtype) == ("cuda:0", "bfloat16")
    for index in ("0", "1", "2"):
        monkeypatch.setenv("MOE_PARAM_WORKER", index)
        module.Train(plan.devices)(run, lambda share, loss: True)
    assert [run.device for run in asked] == ["cuda:0", "cuda:1", "cuda:0"]
