"""The "megablocks" experts on a GPU: `pytest -m gpu tests/gpu -s`, with triton and megablocks, and grouped_gemm for the
second provider. The references are those of the CPU tests (tests/experts/interpreted.py), in float64.

`TRITON_INTERPRET=1` tries these tests themselves, tiny and on the CPU: none is run for the first time when a GPU is
there."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import math
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import transformers

import moe_param
from moe_param.experts import megablocks as experts
from moe_param.training.report import hardware
from patches.check import cannot_interpret
from tests.experts.interpreted import inputs, run, synthetic
from tests.models import build, tiny_config, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRY = DEVICE == "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not experts.is_available(), reason="needs triton and megablocks (moe-param install-kernels)"),
    pytest.mark.skipif(not experts.is_available(DEVICE), reason="needs a CUDA device"),
    pytest.mark.skipif(DRY and cannot_interpret() is not None, reason=cannot_interpret() or ""),
]

SIZES = (8, 16, 16) if DRY else (8, 256, 128)  # experts, width, expert size
TOKENS, TOP_K = (3 if DRY else 512), 2
STEPS, BATCH = (2, (1, 4)) if DRY else (30, (8, 32))
LAYOUTS: dict[str, dict[str, bool]] = {
    "gated": {},
    "gpt-oss": {"is_transposed": True, "has_bias": True, "is_concatenated": False},
    "nemotron-h": {"has_gate": False},
    "muse-spark": {"has_post_expert_norm": True},
}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(scope="module", autouse=True)
def record() -> None:
    packages = ("torch", "triton", "transformers", "megablocks", "grouped_gemm")
    found = {name: version(name) for name in packages if importlib.util.find_spec(name)}
    print(f"\n{hardware()}, CUDA {torch.version.cuda}, {found}")


@pytest.fixture(params=experts.GMM_PROVIDERS)
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "grouped_gemm" and importlib.util.find_spec("grouped_gemm") is None:
        pytest.skip("grouped_gemm is not installed")
    before = experts.use_gmm(request.param)
    yield request.param
    experts.use_gmm(before)


def batch(module: Any, free: tuple[int, ...] = (1,), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 tokens, float32 router weights, as most routers give them."""
    x, indices, weights = inputs(module, TOKENS, TOP_K, seed, SIZES[1], free)
    return x.to(DEVICE).bfloat16(), indices.to(DEVICE), weights.softmax(-1).to(DEVICE)


def on_gpu(dtype: torch.dtype = torch.bfloat16, **layout: bool) -> Any:
    return synthetic(SIZES, **layout).to(DEVICE, dtype)


def exact(module: Any, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """In float64 on the CPU, from the same rounded numbers."""
    reference = copy.deepcopy(module).cpu().double()
    return run(reference, "eager", x.cpu().double(), indices.cpu(), weights.cpu().double())


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {n: ((found[n].cpu().double() - e).norm() / e.norm()).item() for n, e in expected.items()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    worst = errors(found, {n: t.cpu().double() for n, t in expected.items()})
    assert all(error <= tolerance for error in worst.values()), worst


@layouts
def test_bf16_against_float64(layout: dict[str, bool], provider: str) -> None:
    """A few roundings to bf16 (2^-9 each), and no more than the eager implementation makes, within a factor."""
    module = on_gpu(**layout)
    inputs = batch(module)
    expected = exact(module, *inputs)
    found = run(module, "megablocks", *inputs)
    assert found["router weights"].dtype == torch.float32 and found["output"].dtype == torch.bfloat16
    ours, eager = errors(found, expected), errors(run(module, "eager", *inputs), expected)
    print(provider, layout, {n: f"{e:.1e}" for n, e in ours.items()})
    for name, error in ours.items():
        assert error < 0.015 and error < 2 * eager[name] + 0.002, (name, error, eager[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    module = on_gpu(dtype, has_bias=True)
    x, indices, weights = batch(module)
    expected = exact(module, x.to(dtype), indices, weights)
    found = run(module, "megablocks", x.to(dtype), indices, weights)
    assert_close(found, expected, 1e-5 if dtype == torch.float32 else 4e-3)


@layouts
def test_empty_experts_with_poisoned_memory(layout: dict[str, bool], provider: str) -> None:
    """Whatever is allocated holds NaN; half of the experts get no token, the last one and the first among them."""
    module = on_gpu(**layout)
    free = (0, 3, 4, 7)
    inputs = batch(module, free)
    expected = exact(module, *inputs)
    run(module, "megablocks", *inputs)  # tune the kernels before
    module.zero_grad()
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what `torch.empty` returns with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        blocks = [torch.full_like(p, math.nan) for p in module.parameters() for _ in range(8)]  # what others free
        del blocks
        found = run(module, "megablocks", *inputs)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    for name, parameter in module.named_parameters():
        if parameter.shape[0] == SIZES[0]:
            assert not found[name][list(free)].any(), name  # NaN counts as any
            assert found[name][int(inputs[1][0, 0])].any(), name
    assert_close(found, expected, 0.015)


def test_poison_is_there() -> None:
    """The control of the test above."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(100, device=DEVICE).isnan().all()
    finally:
        torch.use_deterministic_algorithms(before)


@layouts
def test_expert_parallel_sentinels(layout: dict[str, bool], provider: str) -> None:
    module = on_gpu(**layout)
    module._is_expert_parallel = True
    x, indices, weights = batch(module)
    indices[::2, 1] = SIZES[0]
    indices[1] = SIZES[0]
    weights = weights.masked_fill(indices == SIZES[0], 0.0)
    found = run(module, "megablocks", x, indices, weights)
    assert not found["output"][1].any() and not found["router weights"][indices == SIZES[0]].any()
    assert_close(found, exact(module, x, indices, weights), 0.015)


@layouts
def test_compiles(layout: dict[str, bool], provider: str) -> None:
    module = on_gpu(**layout)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager" if DRY else "inductor")
    for seed in (0, 1):
        inputs = batch(module, seed=seed)
        expected = exact(module, *inputs)
        assert_close(run(module, "megablocks", *inputs, compiled), expected, 0.015)
    torch._dynamo.reset()


def test_checkpointing(provider: str) -> None:
    module = on_gpu()
    inputs = batch(module)
    expected = run(module, "megablocks", *inputs)
    for reentrant in (False, True):
        call = functools.partial(torch.utils.checkpoint.checkpoint, module, use_reentrant=reentrant)
        found = run(module, "megablocks", *inputs, call)
        assert all(torch.equal(found[n], expected[n]) for n in expected)  # no atomics, hence the same bits


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    if not DRY:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if not DRY:
            torch.cuda.set_sync_debug_mode("default")


@layouts
@pytest.mark.parametrize("parallel", [False, True])
def test_no_synchronization_with_torch(layout: dict[str, bool], parallel: bool) -> None:
    if not DRY and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's own grouped_mm loops on the host before Hopper")
    module = on_gpu(**layout)
    module._is_expert_parallel = parallel
    inputs = batch(module)
    before = experts.use_gmm("torch")
    try:
        run(module, "megablocks", *inputs)  # Triton times its launch configurations here, and waits
        grad = torch.randn(TOKENS, SIZES[1], dtype=torch.bfloat16, device=DEVICE)
        x, weights = inputs[0].clone().requires_grad_(), inputs[2].clone().requires_grad_()
        torch.get_device_module(DEVICE).synchronize()
        with waiting_is_an_error():
            module(x, inputs[1], weights).backward(grad)
    finally:
        experts.use_gmm(before)
    assert x.grad is not None and x.grad.isfinite().all()


def test_autocast(provider: str) -> None:
    """float32 weights: bf16 matmuls as in eager, float32 gradients."""
    module = on_gpu(torch.float32)
    x, indices, weights = batch(module)
    expected = exact(module, x, indices, weights)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(module, "megablocks", x.float(), indices, weights)
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert_close(found, expected, 0.015)


def test_another_device_than_the_current_one(provider: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    module = on_gpu()
    inputs = batch(module)
    expected = exact(module, *inputs)
    found = run(module.to("cuda:1"), "megablocks", *(t.to("cuda:1") for t in inputs))
    assert_close(found, expected, 0.015)


def test_auto_takes_it() -> None:
    config = tiny_config("mixtral")
    model = build("mixtral", config).to(DEVICE)
    moe_param.apply(model, config, seed=0, experts="auto")
    assert (model.config._experts_implementation == "megablocks") != DRY  # on a CPU it leaves what is there


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss", "nemotron_h", "deepseek_v3"][: 1 if DRY else None])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16 autocast"])
def test_training_as_with_eager(family: str, bf16: bool, provider: str) -> None:
    """The same start, the same data, some steps; float32 differs by roundings only."""
    if provider == "grouped_gemm" and not bf16:
        pytest.skip("grouped_gemm is bf16 only")
    transformers.logging.set_verbosity_error()
    losses: dict[str, list[float]] = {}
    for implementation in ("eager", "megablocks"):
        model = build(family, tiny_config(family, experts_implementation=implementation)).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(STEPS):
            data = tokens(128, *BATCH, seed=step % 3).to(DEVICE)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                loss = model(input_ids=data, labels=data).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(implementation, []).append(loss.item())
    worst = max(abs(a - b) for a, b in zip(losses["eager"], losses["megablocks"]))
    print(family, provider, "bf16" if bf16 else "fp32", f"largest difference in loss {worst:.1e}")
    assert DRY or losses["eager"][-1] < losses["eager"][0] - 0.1
    assert worst < (0.05 if bf16 else 5e-3), losses
