"""What a step with Muon costs: against AdamW's, and against torch's own Muon on every matrix by itself.

Part of `recipes.bench.overhead` (`--only muon`).
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import moe_param
from moe_param.optim.muon import STEPS, matrices_of, orthogonalized, working_dtype
from moe_param.structure.matrices import Matrices
from moe_param.tuning.costs import run_flops
from recipes.bench.goals import held
from recipes.bench.rounds import GPU_TARGET, base_of, compare, config, forward_and_backward, ratio

DEMO_TARGET = {"width": 128, "depth": 2, "expert_size": 128, "vocab_size": 256}
"""The model that `make demo` ends with."""


class TorchMuon:
    """torch's Muon on a copy of every matrix, which is two-dimensional there, and AdamW on the rest.

    The gradients are those of the model. What it makes of the matrices stays in the copies: writing them back into the
    stacks would only add to its time.
    """

    def __init__(self, ours: torch.optim.Optimizer) -> None:
        with_matrices = [group for group in ours.param_groups if group["matrices"] is not None]
        rest = [p for group in ours.param_groups if group["matrices"] is None for p in group["params"]]
        self.pairs: list[tuple[torch.Tensor, Matrices, list[torch.nn.Parameter]]] = []
        for group in with_matrices:
            for parameter, layout in zip(group["params"], group["matrices"], strict=True):
                matrices = matrices_of(layout)
                own = [torch.nn.Parameter(matrix.clone()) for matrix in pieces(matrices, parameter)]
                self.pairs.append((parameter, matrices, own))
        copies = [copy for _, _, found in self.pairs for copy in found]
        self.muon = torch.optim.Muon(copies, lr=1e-6, weight_decay=0.0, nesterov=True)
        self.adam = torch.optim.AdamW(rest, lr=1e-6, fused=True)

    def take_gradients(self) -> None:
        """Before a step, and no part of its time: a model of plain matrices would have them in place."""
        for parameter, matrices, copies in self.pairs:
            assert parameter.grad is not None
            for copy, gradient in zip(copies, pieces(matrices, parameter.grad), strict=True):
                copy.grad = gradient

    def step(self) -> None:
        self.muon.step()
        self.adam.step()

    def zero_grad(self) -> None:
        self.adam.zero_grad()
        for parameter, *_ in self.pairs:
            parameter.grad = None


def pieces(matrices: Matrices, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every matrix of a parameter, or of its gradient, by itself."""
    return [matrix.contiguous() for view in matrices.views(tensor.detach()) for matrix in view]


def orthogonalization_flops(optimizer: torch.optim.Optimizer) -> float:
    """Of one step: an iteration on an m×n matrix, m ≤ n, is 2m²n for the Gram matrix, 2m³ for its square and 2m²n for
    the product with the matrix."""
    total = 0.0
    for group in optimizer.param_groups:
        for parameter, layout in zip(group["params"], group["matrices"] or (), strict=False):
            for view in matrices_of(layout).views(parameter):
                m, n = sorted(view.shape[1:])
                total += len(view) * STEPS * (4 * m * m * n + 2 * m**3)
    return total


def bench_muon(smallest: bool, device: str) -> list[dict[str, Any]]:
    """Forward, backward and optimizer of one model under three optimizers, in turns."""
    target: MixtralConfig = {"cpu": config(**DEMO_TARGET), "cuda": config(*GPU_TARGET)}[device]
    target = config(64, 2, 64, 128) if smallest else target
    batch = (4, 16) if smallest else {"cpu": (16, 64), "cuda": (8, 1024)}[device]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(target).to(device)
    model.set_experts_implementation("grouped_mm")
    parameterization = moe_param.apply(model, base_of(target), seed=0, experts=None)
    muon = parameterization.optimizer(model, optimizer="muon", lr=1e-6, matrix_lr_ratio=1.0, fused=True)
    optimizers: dict[str, Any] = {
        "AdamW": parameterization.optimizer(model, lr=1e-6, fused=True),
        "Muon": muon,
        "torch's Muon": TorchMuon(muon),
    }
    ids = torch.randint(target.vocab_size, batch, device=device)
    wait = torch.get_device_module(device).synchronize

    def step(name: str) -> float:
        wait()
        start = time.perf_counter()
        forward_and_backward(model, ids)
        wait()
        model_time = time.perf_counter() - start
        if name == "torch's Muon":
            optimizers[name].take_gradients()
            wait()
        start = time.perf_counter()
        optimizers[name].step()
        optimizers[name].zero_grad()
        wait()
        return model_time + time.perf_counter() - start

    measure = {name: partial(step, name) for name in optimizers}
    compare(measure, 1 if smallest else 3)  # the first steps allocate
    seconds = compare(measure, 2 if smallest else 20)
    ours_over_theirs = ratio(seconds, "Muon", "torch's Muon")
    tokens = batch[0] * batch[1]
    details = {
        "device": device,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "iterates_in": str(working_dtype(next(model.parameters()))).removeprefix("torch."),
        "torch_iterates_in": "bfloat16",
        "orthogonalization_flops_over_training_flops": round(
            orthogonalization_flops(muon) / run_flops(parameterization, batch[1], target.tie_word_embeddings, tokens), 4
        ),
    }
    goals = [held("step, Muon", ours_over_theirs["ratio"])] if device == "cuda" or smallest else []
    return [
        {"name": "step with Muon over AdamW", "target": None, **ratio(seconds, "Muon", "AdamW"), **details},
        {"name": "step with Muon over torch's Muon", "target": None, **ours_over_theirs, "goals": goals},
        {"name": "iteration in bfloat16 over float32", "target": None, **bench_dtypes(smallest, device)},
    ]


def bench_dtypes(smallest: bool, device: str) -> dict[str, Any]:
    """The iteration alone, in bfloat16 and in float32, on one batch of expert matrices."""
    stack = torch.randn(2, 16, 32, device=device) if smallest else torch.randn(8, 512, 256, device=device)
    wait = torch.get_device_module(device).synchronize

    def iterate(dtype: torch.dtype) -> float:
        wait()
        start = time.perf_counter()
        orthogonalized(stack, dtype=dtype)
        wait()
        return time.perf_counter() - start

    measure = {str(dtype).removeprefix("torch."): partial(iterate, dtype) for dtype in (torch.bfloat16, torch.float32)}
    compare(measure, 1)
    return {**ratio(compare(measure, 2 if smallest else 5), "bfloat16", "float32"), "matrices": list(stack.shape)}
