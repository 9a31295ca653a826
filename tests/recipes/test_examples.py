"""The examples at their smallest, as a user starts them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from tests.models import BYTE_MIXTRAL

ROOT = Path(__file__).parents[2]
MODEL = {"model_type": "mixtral", "overrides": BYTE_MIXTRAL}


def run(example: str, *flags: str | Path | int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"recipes.examples.{example}", "--smallest", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def difference(output: str) -> float:
    found = re.search(r"logits differ by at most (\S+)", output)
    assert found is not None, output[-2000:]
    return float(found[1])


def test_own_loop(tmp_path: Path) -> None:
    assert difference(run("own_loop", "--output_dir", tmp_path)) <= 1e-6
    assert len((ROOT / "recipes" / "examples" / "own_loop.py").read_text().splitlines()) < 80


def test_tune_own_script(tmp_path: Path) -> None:
    """Without a search, with the file that one leaves; under a search see tests/tuning/test_commands.py."""
    tuned = {**MODEL, "learning_rate": 0.01, "constants": {"router": {"lr": 2}}}
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(tuned))
    said = run("tune_own_script", "--tuned", tmp_path / "tuned.yaml", "--seed", 3)
    found = re.search(r"held-out loss (\S+)", said)
    assert found and 4.0 < float(found[1]) < 5.7
    assert len((ROOT / "recipes" / "examples" / "tune_own_script.py").read_text().splitlines()) < 80


def test_trainer(tmp_path: Path) -> None:
    flags = ("--output_dir", tmp_path, "--use_cpu")
    straight = run("trainer", *flags)
    assert difference(straight) <= 1e-6
    resumed = run("trainer", *flags, "--resume_from_checkpoint", tmp_path / "checkpoint-2")
    assert resumed.splitlines()[-1] == straight.splitlines()[-1]  # the same held-out loss
