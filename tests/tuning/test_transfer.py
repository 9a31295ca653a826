"""`moe_param.tuning.transfer`: the statistics against planted optima, and the whole recipe at its smallest."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from moe_param.cli.transfer import main
from moe_param.errors import InputError, MoeParamError
from moe_param.folder_lock import folder_lock
from moe_param.structure.shape import Shape
from moe_param.tuning.drift import Ladder, Run, plot, summarize, table, vertex
from moe_param.tuning.transfer import TransferArguments, targets, transfer
from tests.models import BYTE_MIXTRAL

OCTAVES = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0)


def ladder(*targets: str, octaves: tuple[float, ...] = OCTAVES, seeds: tuple[int, ...] = (0, 1, 2)) -> Ladder:
    return Ladder(("standard",), targets, octaves, seeds)


def planted(args: Ladder, optimum: dict[str, float], jitter: float = 0.0) -> dict[Run, float]:
    """Losses 2 + (octave − optimum)²/20; a seed moves every optimum by `jitter` times its number minus one."""
    return {
        Run(spec, target, octave, seed): 2 + (octave - optimum[target] - jitter * (seed - 1)) ** 2 / 20
        for spec in args.specs
        for target in ("base", *args.targets)
        for octave in args.octaves
        for seed in args.seeds
    }


def test_the_vertex_is_where_it_was_planted() -> None:
    octaves = [-2.0, -1.0, 0.0, 1.0, 2.0]
    assert vertex(octaves, [(x - 0.3) ** 2 for x in octaves]) == pytest.approx(0.3)
    assert vertex(octaves, [x**2 if x < 2 else math.inf for x in octaves]) == pytest.approx(0.0)
    assert vertex(octaves, [(x + 5) ** 2 for x in octaves]) == -2.0  # the ladder's end
    assert vertex(octaves, [1.0, 0.5, 0.4, math.inf, math.inf]) == 0.0  # no parabola across a divergence
    assert math.isnan(vertex(octaves, [math.inf] * 5))


def test_drift_and_regret_of_planted_optima() -> None:
    args = ladder("width=4", "depth=4")
    losses = planted(args, {"base": 0.0, "width=4": -2.0, "depth=4": 0.25}, jitter=0.1)
    width, depth = summarize(args, losses)
    assert width["drift_octaves"] == pytest.approx(-2.0) and not width["transferred"]
    assert width["drift_of_seeds"] == pytest.approx([-2.0] * 3)  # paired: what a seed does to both cancels
    # At the base's octave 0 the target is 2 + 4/20 (+ the jitter's share, the same everywhere), at its best 2.
    jitter = (0.1**2 * 2 / 3) / 20
    assert width["regret"] == pytest.approx(0.2 / (2 + jitter))
    assert depth["drift_octaves"] == pytest.approx(0.25) and depth["regret"] == 0.0 and depth["transferred"]


def test_an_optimum_at_the_end_of_the_ladder_does_not_count() -> None:
    args = ladder("width=4", octaves=(0.0, 1.0, 2.0), seeds=(0,))
    (row,) = summarize(args, planted(args, {"base": 0.0, "width=4": 0.0}))
    assert row["drift_octaves"] == 0 and row["regret"] == 0
    assert row["at_edge"] == ["base", "target"] and not row["transferred"]


def test_runs_that_all_diverge_are_a_result(tmp_path: Path) -> None:
    args = ladder("width=4", seeds=(0,))
    losses = {
        run: math.inf if run.target != "base" else loss
        for run, loss in planted(args, {"base": 0, "width=4": 0}).items()
    }
    (row,) = summarize(args, losses)
    assert row["regret"] == math.inf and not row["transferred"]
    table([row])
    plot(args, [row], 0.01, tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()


def test_targets_keep_alpha_and_sparsity() -> None:
    from transformers import MixtralConfig

    base = MixtralConfig(**BYTE_MIXTRAL)
    found = {
        name: Shape.from_config(config) for name, config in targets(base, ["width=2,depth=3", "num_experts=2"]).items()
    }
    assert found["width=2,depth=3"] == found["base"].along("width", 2).along("depth", 3)
    assert found["num_experts=2"].sparsity == found["base"].sparsity


def test_smallest(tmp_path: Path) -> None:
    best = tmp_path / "best.yaml"  # the old name
    numbers = {
        "model_type": "mixtral",
        "overrides": BYTE_MIXTRAL,
        "learning_rate": 0.01,
        "seq_len": 32,
        "init_std": 0.03,
    }
    best.write_text(yaml.safe_dump(numbers))
    output = tmp_path / "transfer"
    args = TransferArguments(str(best), str(output), ["width=2"], smallest=True, workers=1)
    record = transfer(args, command="")
    assert json.loads((output / "transfer.json").read_text())["summary"] == record["summary"]
    assert (output / "transfer.png").stat().st_size > 10_000
    assert {row["spec"] for row in record["summary"]} == {"moe-completep", "standard"}
    assert len(record["runs"]) == 9 and record["base_runs_shared"] == ["standard"]
    base, wide = (record["runs"][f"moe-completep/{target}/0/0"] for target in ("base", "width=2"))
    assert base != wide != record["runs"]["standard/width=2/0/0"]

    ledger = (output / "runs.jsonl").read_text().splitlines()
    (output / "runs.jsonl").write_text("\n".join(ledger[1:]) + "\n")  # as if killed before the last run
    again = transfer(args, command="")
    assert again["runs"] == record["runs"]
    assert len((output / "runs.jsonl").read_text().splitlines()) == 9
    best.write_text(yaml.safe_dump(numbers | {"learning_rate": 0.02}))
    with pytest.raises(InputError, match="other settings"):
        transfer(args, command="")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": ["heads=2"]}, "--axes: unknown size 'heads' .valid: width"),
        ({"axes": ["width"]}, "not NAME=VALUE"),
        ({"octaves": [1.0, 2.0, 3.0]}, "0 .the config's rate. among them"),
    ],
)
def test_bad_input_is_named(changes: dict[str, list], message: str) -> None:
    from transformers import MixtralConfig

    with pytest.raises(InputError, match=message):
        targets(MixtralConfig(**BYTE_MIXTRAL), TransferArguments("-", **changes).axes)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--axe", "width=2"], r"unknown argument '--axe' .did you mean '--axes'"),
        (["--log2_lrs", "-7"], r"unknown argument '--log2_lrs'"),
        (["--axes", "width=2", "--axes"], "expected at least one argument"),
        (["--axes", "depth=0.25"], "depth"),
        (["--specs", "moe-completep", "standrad"], "no scaling spec 'standrad' .did you mean 'standard'"),
        (["--octaves", "-1", "0"], "three rungs"),
        (["--octaves", "-1", "0", "1", "nan"], "octaves are .*nan.*: expected numbers"),
        (["--workers", "-1"], "workers is -1"),
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
    with pytest.raises(MoeParamError, match="nowhere"):  # all else is right
        main([str(config), "--output_dir", str(tmp_path / "out"), "--axes", "width=2"])


def test_too_little_text_and_a_folder_in_use(tmp_path: Path) -> None:
    config, output = tmp_path / "config.yaml", tmp_path / "out"
    values = {"model_type": "mixtral", "overrides": BYTE_MIXTRAL, "seq_len": 32}
    values |= {"per_device_train_batch_size": 10_000_000}
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match="a batch is 10000000 blocks of 32 tokens, and the whole text has"):
        main([str(config), "--output_dir", str(output), "--axes", "width=2"])
    with folder_lock(output, "moe-param transfer"), pytest.raises(InputError, match=r"out is in use \(moe-param tran"):
        main([str(config), "--output_dir", str(output), "--axes", "width=2", "--smallest"])
