"""The experts benchmark counts, compares and reports right. Times are not checked: CI machines are busy."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recipes.bench import experts as bench_experts
from recipes.bench.experts import BUILDERS, Case, Layer, bench, goals, parse_shape, route

CASE = Case(tokens=24, num_experts=4, top_k=2, expert_size=16, width=32, routing="balanced")


def layer(**changes: Any) -> Layer:
    return Layer(Case(**{**CASE.__dict__, **changes}), "cpu", torch.float32)


# -- what is counted -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["eager", "batched_mm", "dense"])
def test_flops(name: str) -> None:
    """Against torch's counter: the same for every implementation, the dense one included."""
    case = layer()
    forward, _ = BUILDERS[name](case)
    with FlopCounterMode(display=False) as counter:
        forward().backward(case.grad)
    assert counter.get_total_flops() == case.case.flops == 3 * 2 * 24 * 2 * (3 * 16 * 32)


def test_routing() -> None:
    generator = torch.Generator().manual_seed(0)
    for routing in bench_experts.ROUTINGS:
        case = Case(tokens=4096, num_experts=16, top_k=4, expert_size=8, width=8, routing=routing)
        index = route(case, generator)
        assert index.shape == (4096, 4)
        assert all(len(set(row)) == 4 for row in index.tolist())  # an expert is chosen once
        load = torch.bincount(index.flatten(), minlength=16) / 4096
        if routing == "balanced":
            assert load.tolist() == [0.25] * 16
        else:
            assert load[0] > 3 * load[15] and load.argmax() == 0
    # top_k = 1: Zipf exactly
    case = Case(tokens=200_000, num_experts=3, top_k=1, expert_size=8, width=8, routing="skewed")
    load = torch.bincount(route(case, generator).flatten(), minlength=3) / 200_000
    torch.testing.assert_close(load, torch.tensor([6, 3, 2]) / 11, atol=5e-3, rtol=0)


def test_peak_memory() -> None:
    """1 + 2 MiB, then 2 + 2: the most is 4, though nothing is left in the end."""

    def step() -> None:
        first = torch.empty(2**20, dtype=torch.int8)
        second = torch.empty(2**21, dtype=torch.int8)
        del first
        third = torch.empty(2**21, dtype=torch.int8)
        del second, third

    assert bench_experts.peak_memory(step, "cpu") == pytest.approx(2**22, rel=1e-3)


def test_eager_and_grouped_mm_agree_on_memory_and_numbers() -> None:
    """Gradients are part of the peak: at the least the weights', once."""
    result = bench(CASE, "cpu", torch.float32, rounds=1)
    weights = 4 * 3 * 16 * 32 * 4 / 2**20
    for name in ("eager", "grouped_mm", "batched_mm"):
        assert result["implementations"][name]["peak_mib"] >= round(weights, 2)
    assert result["implementations"]["grouped_mm"]["error"] < 1e-6
    assert result["busiest_expert"] == 1.0 and result["empty_experts"] == 0


# -- what is compared ------------------------------------------------------------------------------------------------
def timed_as(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare` without a clock: so many seconds for each name, in every round another multiple."""

    def compare(measure: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
        return {name: [seconds[name] * (i + 1) for i in range(rounds)] for name in measure}

    monkeypatch.setattr(bench_experts, "compare", compare)


def test_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"eager": 8.0, "batched_mm": 16.0, "grouped_mm": 4.0, "dense": 2.0, "dense again": 2.1}
    timed_as(seconds, monkeypatch)
    result = bench(CASE, "cpu", torch.float32, rounds=3)
    found = result["implementations"]
    assert {name: of["over_dense"] for name, of in found.items()} == {
        "eager": 4.0, "batched_mm": 8.0, "grouped_mm": 2.0, "dense": 1.0
    }  # fmt: skip
    assert found["grouped_mm"]["over_eager"] == 0.5
    assert found["grouped_mm"]["seconds"] == 8.0  # the median of 4, 8, 12
    assert found["grouped_mm"]["tflops"] == pytest.approx(CASE.flops / 8.0 / 1e12, rel=1e-3)
    assert (result["fastest"], result["noise"], result["goals"]) == ("grouped_mm", 1.05, [])


def test_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which numbers are held against which, with times that are made up."""
    monkeypatch.setattr(bench_experts.experts, "gmm_provider", lambda device, dtype, choice: "torch")
    times = {"megablocks (torch)": 2.0, "megablocks (grouped_gemm)": 1.0, "eager": 5.0, "grouped_mm": 1.9, "dense": 1.7}
    seconds = {name: [value, 2 * value] for name, value in times.items()}
    large = Case(tokens=32768, num_experts=8, top_k=2, expert_size=4096, width=64, routing="balanced")
    found = {goal["goal"]: goal for goal in goals(large, seconds, "cuda", torch.bfloat16)}
    assert {name: (goal["value"], goal["met"]) for name, goal in found.items()} == {
        "fastest other": (0.95, False),  # grouped_mm; the other provider of ours is no rival
        "eager": (2.5, True),
        "dense": (1.1765, True),
    }
    assert found["dense"]["where"] == "E8k2F4096H64, 32768 tokens, balanced"
    assert {goal["goal"] for goal in goals(CASE, seconds, "cuda", torch.bfloat16)} == {"fastest other", "eager"}
    assert goals(large, {"eager": [1.0]}, "cuda", torch.bfloat16) == []


def test_measured_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def case(torch_seconds: float, gemm_seconds: float | None) -> dict[str, Any]:
        found = {"megablocks (torch)": {"seconds": torch_seconds}}
        if gemm_seconds is not None:
            found["megablocks (grouped_gemm)"] = {"seconds": gemm_seconds}
        return {"implementations": found}

    choice = bench_experts.providers([case(4.0, 1.0), case(1.0, 1.0), case(100.0, None)])
    assert choice is not None
    assert (choice["torch_over_grouped_gemm"], choice["fastest"], choice["cases"]) == (2.0, "grouped_gemm", 2)
    assert choice["line"] == "moe_param.experts.megablocks.FASTEST[(9, 0)] = 'grouped_gemm'"
    faster = bench_experts.providers([case(1.0, 2.0)])
    assert faster is not None and faster["fastest"] == "torch"
    assert bench_experts.providers([case(1.0, None)]) is None


def test_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the allocator says, over what was there before; and what is free decides whether copies fit."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 130)
    steps: list[int] = []
    assert bench_experts.peak_memory(lambda: steps.append(1), "cuda") == 30 and steps == [1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**31))
    small, large = layer(), layer(tokens=2**10, expert_size=2**8, width=2**10)
    small.device = large.device = "cuda"
    bench_experts._check_memory(small)
    with pytest.raises(bench_experts.NotHere, match="12 GiB, 1 are free"):
        bench_experts._check_memory(large)


def test_nothing_is_dropped_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that raises, one that computes something else, one that does not fit: in the report, with the reason."""

    def wrong(of: Layer) -> Any:
        forward, parameters = BUILDERS["eager"](of)
        return lambda: 1.1 * forward(), parameters

    def raises(of: Layer) -> Any:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setitem(BUILDERS, "sonicmoe", raises)
    monkeypatch.setitem(BUILDERS, "dMoE", wrong)
    monkeypatch.setattr(bench_experts.os, "sysconf", lambda name: 100)  # 10 kB of free memory
    result = bench(CASE, "cpu", torch.float32, rounds=1)
    assert set(result["implementations"]) == {"eager", "grouped_mm", "dense"}
    assert set(result["implementations"]) | set(result["not_run"]) == set(BUILDERS)
    assert result["not_run"]["sonicmoe"] == "RuntimeError: no kernel image"
    assert result["not_run"]["dMoE"].startswith("its result is off eager's by 1.0e-01")
    assert "copies the weights once per token" in result["not_run"]["batched_mm"]
    assert "run on CUDA, not on cpu" in result["not_run"]["megablocks (torch)"]


def test_dmoe_gets_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """MegaBlocks' layer keeps its weights as (experts·size, width), down transposed. A stand-in that multiplies as its
    grouped GLU does must give what eager gives; where down is not transposed it does not."""

    class Stub(torch.nn.Module):
        def __init__(self, arguments: SimpleNamespace) -> None:
            super().__init__()
            self.a = arguments
            sizes = (arguments.moe_num_experts * arguments.ffn_hidden_size, arguments.hidden_size)
            new = {name: torch.nn.Parameter(torch.empty(sizes, dtype=torch.bfloat16)) for name in ("w1", "v1", "w2")}
            self.mlp = torch.nn.ParameterDict(new)

        def forward(self, x: Any, scores: None, weights: Any, index: Any) -> Any:
            w1, v1, w2 = (self.mlp[n].view(self.a.moe_num_experts, -1, self.a.hidden_size) for n in ("w1", "v1", "w2"))
            h = self.a.activation_fn(torch.einsum("th,efh->tef", x, w1)) * torch.einsum("th,efh->tef", x, v1)
            every = torch.einsum("tef,efh->teh", h, w2)
            return (every.gather(1, index[..., None].expand(-1, -1, x.shape[1])) * weights[..., None]).sum(1)

    package, dmoe = ModuleType("megablocks"), ModuleType("megablocks.layers.dmoe")
    package.Arguments, dmoe.ParallelDroplessMLP = SimpleNamespace, Stub  # type: ignore[attr-defined]
    for name, module in {"": package, ".layers": ModuleType("layers"), ".layers.dmoe": dmoe}.items():
        monkeypatch.setitem(sys.modules, f"megablocks{name}", module)
    of = Layer(CASE, "cpu", torch.bfloat16)
    expected = BUILDERS["eager"](of)[0]()
    of.device = "cuda"  # all that is asked
    forward, parameters = BUILDERS["dMoE"](of)
    assert bench_experts._distance(forward(), expected) < 2e-2
    assert all(p.grad is None for p in parameters) and sum(p.numel() for p in parameters) == 4 * 3 * 16 * 32
    with torch.no_grad():
        parameters[2].copy_(of.module.down_proj.reshape(-1, 32))
    assert bench_experts._distance(forward(), expected) > 0.5


# -- what is left behind ---------------------------------------------------------------------------------------------
def test_smallest_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "experts.json"
    bench_experts.main(["--smallest", "--device", "cpu", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["smallest"] and "--smallest" in report["command"] and report["hardware"]
    assert [result["routing"] for result in report["results"]] == ["balanced", "skewed"]
    for result in report["results"]:
        assert set(result["implementations"]) | set(result["not_run"]) == set(BUILDERS)
        assert {"eager", "batched_mm", "grouped_mm", "dense"} <= set(result["implementations"])
        assert all(result["not_run"].values())
        assert (result["device"], result["dtype"], result["shape"]) == ("cpu", "float32", "E4k2F32H64")
        for found in result["implementations"].values():
            for number in ("seconds", "tflops", "over_eager", "over_dense", "peak_mib"):
                assert math.isfinite(found[number]) and found[number] > 0
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "E4k2F32H64" in printed and "grouped_mm" in printed
    assert "not run: megablocks (torch), 2 of 2 cases: MegaBlocks' kernels run on CUDA, not on cpu" in printed


def test_the_faster_provider_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the end of a run with both, and not among the cases where one goes on."""
    choice = {"name": "provider", "line": "FASTEST[(9, 0)] = 'torch'", "torch_over_grouped_gemm": 0.5}
    monkeypatch.setattr(bench_experts, "providers", lambda results: choice)
    out = tmp_path / "experts.json"
    command = ["--smallest", "--device", "cpu", "--out", str(out)]
    bench_experts.main(command)
    assert "FASTEST[(9, 0)] = 'torch'  # torch / grouped_gemm: 0.5" in capsys.readouterr().out
    assert json.loads(out.read_text())["results"][-1] == choice
    assert len(bench_experts.main([*command, "--resume"])["results"]) == 3


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "experts.json"
    command = ["--smallest", "--device", "cpu", "--out", str(out)]
    calls: list[str] = []

    def counted(case: Case, *args: Any) -> dict[str, Any]:
        calls.append(case.routing)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return bench(case, *args)

    monkeypatch.setattr(bench_experts, "bench", counted)
    with pytest.raises(KeyboardInterrupt):
        bench_experts.main(command)
    kept = json.loads(out.read_text())["results"]
    bench_experts.main([*command, "--resume", "--without", "batched_mm"])
    results = json.loads(out.read_text())["results"]
    assert calls == ["balanced", "skewed", "skewed"]
    assert results[:1] == kept and [result["routing"] for result in results] == ["balanced", "skewed"]
    assert results[1]["not_run"]["batched_mm"] == "left out by --without"
    with pytest.raises(SystemExit, match=r"was measured with dtype float32, this is bfloat16"):
        bench_experts.main([*command, "--resume", "--dtype", "bfloat16"])
    with pytest.raises(SystemExit, match="give it"):
        bench_experts.main(["--smallest", "--device", "cpu", "--resume"])


def test_a_device_that_is_gone_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an illegal access leaves behind would otherwise be put down to all implementations after the guilty one."""

    def gone() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(SystemExit, match=r"sonicmoe left CUDA unusable .*illegal.*E4k2F16H32.*--without 'sonicmoe'"):
        bench_experts._check_device("cuda", "sonicmoe", CASE)
    bench_experts._check_device("cpu", "sonicmoe", CASE)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    bench_experts._check_device("cuda", "sonicmoe", CASE)


@pytest.mark.parametrize("text", ["E4k5F8H8", "E0k0F8H8", "4,1,8,8", "E4k2F8H8x"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=rf"'{text}' is no shape.*E128k8F768H2048"):
        parse_shape(text)
    assert parse_shape("E128k8F768H2048") == (128, 8, 768, 2048)


def test_grids() -> None:
    """Every default case is one; fine-grained and the paper's range are in the GPU's."""
    cases = {device: [parse_shape(text) for text in grid.split()] for device, grid in bench_experts.GRID.items()}
    assert (128, 8, 768, 2048) in cases["cuda"]
    assert {(e, k) for e, k, _, _ in cases["cuda"]} >= {(4, 1), (48, 4)}
    widths = {width for _, _, _, width in cases["cuda"]}
    assert {512, 1024, 2048} <= widths
    assert all(16 * size % 256 == 0 for case in cases["cuda"] + cases["cpu"] for size in case[2:])  # whole 16 bytes
