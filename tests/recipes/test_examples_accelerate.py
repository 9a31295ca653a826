"""Plain accelerate with FSDP2, and continued pre-training, each at its smallest, as a user starts it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from moe_param import Parameterization

ROOT = Path(__file__).parents[2]


def start(*command: str) -> str:
    """What `python -m command` prints, if it ends well."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def test_accelerate_fsdp2(tmp_path: Path) -> None:
    launch = ("accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu-2-processes-fsdp2.yaml")
    said = start(
        *launch, "-m", "recipes.examples.accelerate_fsdp2", "--smallest", "--output_dir", str(tmp_path / "out")
    )
    losses = [float(text) for text in re.findall(r"step \d+: loss (\S+)", said)]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.2, "one line a step: one process prints"
    found = re.search(r"(\d+) sharded parameters, logits differ by at most (\S+), (\d+) rules", said)
    assert found and int(found[1]) > 10 and int(found[3]) > 10 and float(found[2]) < 1e-5


def test_continue_pretraining(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    said = start("recipes.examples.continue_pretraining", "--smallest", "--output_dir", str(tmp_path))
    (first, middle), (again, last) = (map(float, pair) for pair in re.findall(r"loss (\S+) -> (\S+)", said))
    assert middle < first - 1 and again < first - 1, "it goes on from what was learnt"
    assert last < again
    for name in ("start", "end"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert Parameterization.from_model(model).shape.width == 64
