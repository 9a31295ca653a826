"""The TRL example at its smallest, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def test_trl_sft(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recipes.examples.trl_sft", "--smallest", "--output_dir", str(tmp_path / "sft")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "auxiliary loss is on" not in done.stderr
    found = re.search(r"logits differ by at most (\S+), (\d+) rules", done.stdout)
    assert found is not None and float(found[1]) <= 1e-6 and int(found[2]) > 0, done.stdout[-2000:]
    weights = load_file(tmp_path / "sft" / "model.safetensors")
    biases = {key: value for key, value in weights.items() if key.endswith("selection.bias")}
    assert len(biases) == 4 and all(bias.any() and bias.dtype == torch.float32 for bias in biases.values())
    config = json.loads((tmp_path / "sft" / "config.json").read_text())
    assert [f"{name}.selection.bias" for name in config["moe_param_selection_biases"]] == sorted(biases)
