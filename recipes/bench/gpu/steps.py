"""What is run, in which order, for how long at most."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

NOT_BUILT_STATUS = 3
"""The exit status of a step that finds nothing to run; the last line that it says is why."""


@dataclass(frozen=True)
class Step:
    """A module that takes `--out FILE --device cuda|cpu [--smallest]` and writes FILE as it goes."""

    name: str
    title: str
    module: str = ""
    arguments: tuple[str, ...] = ()
    limit: float = 120
    """Seconds after which it is killed."""
    needs: str = ""
    """The step without which it makes no sense."""
    not_built: str = ""
    """Why there is nothing to run yet."""

    def command(self, out: Path, device: str, smallest: bool) -> list[str]:
        options = ["--out", str(out), "--device", device, *self.arguments, *(("--smallest",) if smallest else ())]
        return [sys.executable, "-m", self.module, *options]


# One fine-grained shape (Qwen3-30B-A3B's) and two coarse ones.
EXPERTS = (
    "--shapes",
    "E128k8F768H2048",
    "E8k2F4096H1024",
    "E16k4F8192H2048",
    "--tokens",
    "32768",
    "--rounds",
    "10",
    "--resume",
)

STEPS = (
    Step("a", "MegaBlocks' Triton path against eager: outputs and gradients", "recipes.bench.gpu.against_eager"),
    Step("b", "tests/gpu", "recipes.bench.gpu.gpu_tests", limit=300),
    Step("c", "an experts layer, all implementations", "recipes.bench.experts", EXPERTS, limit=240),
    Step("d", "what balancing costs", "recipes.bench.balance", limit=120),
    Step("e", "what our groups of Adam cost", "recipes.bench.overhead", ("--only", "step"), limit=90),
    Step("e, Muon", "what our groups of Muon cost", "recipes.bench.overhead", ("--only", "muon"), limit=90),
    Step("f", "a training run, megablocks against grouped_mm", "recipes.bench.gpu.training", limit=420),
    Step("g", "building grouped_gemm for this GPU", "recipes.bench.gpu.build", limit=420),
    Step("g, c again", "the experts layer, with grouped_gemm", "recipes.bench.experts", EXPERTS, limit=240, needs="g"),
    Step("g, b again", "tests/gpu with grouped_gemm", "recipes.bench.gpu.gpu_tests", ("-k", "grouped_gemm"), 200, "g"),
    Step("h", "tuning a base with one GPU worker, in what time is left", "recipes.bench.gpu.tuning", limit=3600),
)
