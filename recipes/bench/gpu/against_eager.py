"""The "megablocks" experts on torch's grouped_mm against eager, outputs and all gradients, in bfloat16.

    python -m recipes.bench.gpu.against_eager --out against_eager.json

Both from the same rounded numbers, and both held against float64: what is computed right is off it by a few roundings,
and no further than eager within a factor. On a CPU the kernels run interpreted (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from recipes.bench.experts import BUILDERS, EAGER, Case, Layer, _distance, parse_shape
from recipes.bench.report import bench_report

OURS = "megablocks (torch)"
SHAPES = ("E8k2F1024H512", "E4k1F512H256", "E64k8F256H512", "E128k8F128H256")
TOKENS = 1024
SMALLEST = ("E4k2F16H32",), 4
"""Shapes and tokens of the dry run: interpreting takes 20 ms for each token and expert of it."""
MOST, ABSOLUTE, FACTOR = 0.015, 0.002, {"cuda": 2.0, "cpu": 4.0}
"""Of the norm: a few roundings to bfloat16 (2^-9 each), and no more than this and so many times eager's error; Triton's
interpreter truncates what a GPU rounds."""


def bench(case: Case, device: str) -> dict[str, Any]:
    """How far both are from float64, for the output and each gradient; which of ours are too far."""
    layer = Layer(case, device, torch.bfloat16)
    exact: Any = copy.copy(layer)
    exact.module = copy.deepcopy(layer.module).double()
    exact.config = exact.module.config
    exact.dtype = torch.float64
    for name in ("x", "weights", "grad"):
        setattr(exact, name, getattr(layer, name).detach().double().requires_grad_(name != "grad"))
    expected = computed(exact, EAGER)
    ours, eager = (
        {name: _distance(found, expected[name]) for name, found in computed(layer, implementation).items()}
        for implementation in (OURS, EAGER)
    )
    most = {name: min(MOST, FACTOR[device] * error + ABSOLUTE) for name, error in eager.items()}
    wrong = [name for name, error in ours.items() if not error < most[name]]  # NaN is wrong
    rounded = {
        who: {n: float(f"{e:.2g}") for n, e in errors.items()} for who, errors in (("ours", ours), ("eager", eager))
    }
    return {"shape": case.shape, "tokens": case.tokens, "routing": case.routing, **rounded, "wrong": wrong}


def computed(layer: Layer, implementation: str) -> dict[str, Tensor]:
    """The output, and the gradients of tokens, router weights and expert weights."""
    forward, parameters = BUILDERS[implementation](layer)
    out = forward()
    names = ("hidden states", "router weights", *(name for name, _ in layer.module.named_parameters()))
    gradients = torch.autograd.grad(out, [layer.x, layer.weights, *parameters], layer.grad)
    return {"output": out.detach(), **dict(zip(names, gradients, strict=True))}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.gpu.against_eager", description=__doc__)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smallest", action="store_true", help="one tiny shape: tries the code")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    shapes, tokens = SMALLEST if arguments.smallest else (SHAPES, TOKENS)
    results: list[dict[str, Any]] = []
    for shape in shapes:
        for routing in ("balanced", "skewed"):
            results.append(bench(Case(tokens, *parse_shape(shape), routing), arguments.device))
            report = bench_report("recipes.bench.gpu.against_eager", argv, arguments.smallest, results, arguments.out)
            worst = max(results[-1]["ours"].values())
            print(
                f"{shape}, {routing}: at most {worst:.1e} off; wrong: {results[-1]['wrong'] or 'nothing'}", flush=True
            )
    return report


if __name__ == "__main__":
    sys.exit(any(result["wrong"] for result in main()["results"]))
