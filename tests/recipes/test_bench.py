"""The benchmark runs and writes what its README describes. Times are not checked here: CI machines are busy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import moe_param
from moe_param.optim.muon import Muon, orthogonalized
from moe_param.structure.matrices import Matrices
from recipes.bench import overhead
from recipes.bench.muon_step import TorchMuon, orthogonalization_flops, pieces


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads its memory from /proc")
def test_smallest_run(tmp_path: Path) -> None:
    overhead.main(["--smallest", "--out", str(tmp_path / "new" / "overhead.json")])
    report = json.loads((tmp_path / "new" / "overhead.json").read_text())
    assert report["smallest"] and "--smallest" in report["command"]
    assert report["hardware"] and {"python", "torch", "transformers", "moe_param"} <= set(report["versions"])
    results = {result["name"]: result for result in report["results"]}
    assert {name: result["target"] for name, result in results.items()} == {
        "training step": 1.01,
        "step with Muon over AdamW": None,
        "step with Muon over torch's Muon": None,
        "iteration in bfloat16 over float32": None,
        "apply, 1 thread": 1.0,
        "peak memory of apply, 1 thread": 1.1,
        "import": 1.05,
        "import, all names, own loop": 1.05,
        "import, all names, Trainer": 1.05,
    }
    for result in results.values():
        assert math.isfinite(result["ratio"]) and result["ratio"] > 0
        assert result["passed"] == (None if result["target"] is None else result["ratio"] <= result["target"])
    assert 0 < results["step with Muon over AdamW"]["orthogonalization_flops_over_training_flops"] < math.inf
    groups = results["training step"]["groups"]
    assert groups["stock"] == groups["stock again"] == 2 < groups["ours"] <= 12  # the same split would prove nothing


def test_the_iteration_is_counted_by_hand() -> None:
    """Of two stacked experts with gate and up of 3×4 and down of 4×3, five iterations of 2m²n + 2m³ + 2m²n each."""
    up, down = torch.nn.Parameter(torch.zeros(2, 6, 4)), torch.nn.Parameter(torch.zeros(2, 4, 3))
    layouts = [asdict(Matrices(copies=2, parts=(3, 3))), asdict(Matrices(copies=2))]
    groups = [{"params": [up, down], "matrices": [{**layout, "scales": [1.0, 1.0]} for layout in layouts]}]
    each = 5 * (2 * 9 * 4 + 2 * 27 + 2 * 9 * 4)
    assert orthogonalization_flops(Muon([*groups, {"params": [torch.nn.Parameter(torch.zeros(3))]}])) == 6 * each


def test_torchs_muon_gets_the_same_matrices() -> None:
    """One step from the same gradient ends where ours does, up to the dtype of the iteration."""
    weight = torch.nn.Parameter(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)))
    layout = {**asdict(Matrices(copies=2, parts=(3, 3))), "scales": [1.0, 1.0]}
    ours = Muon([{"params": [weight], "matrices": [layout]}, {"params": [torch.nn.Parameter(torch.zeros(3))]}], lr=1e-6)
    theirs = TorchMuon(ours)
    weight.grad = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    before = weight.detach().clone()
    theirs.take_gradients()
    theirs.step()
    assert torch.equal(weight, before), "its matrices are its own"
    ours.step()
    [(_, matrices, copies)] = theirs.pairs
    assert len(copies) == 4
    moved = [copy - piece for copy, piece in zip(copies, pieces(matrices, before), strict=True)]
    expected = pieces(matrices, weight.detach() - before)
    torch.testing.assert_close(moved, expected, rtol=0.05, atol=1e-7)
    with pytest.raises(AssertionError):  # the control: gate and up as one matrix
        whole = [orthogonalized(weight.grad[:1])[0] * -1e-6]
        torch.testing.assert_close(torch.cat(moved[:1] + moved[2:3]), whole[0], rtol=0.05, atol=1e-7)


def test_ratio_is_the_median_of_pairs() -> None:
    """A round that is slow for both sides does not count; a side that is slower does."""
    seconds = {"a": [1.0, 10.0, 2.0], "b": [1.0, 10.0, 2.0], "c": [2.0, 20.0, 4.0]}
    assert overhead.ratio(seconds, "a", "b")["ratio"] == 1.0
    assert overhead.ratio(seconds, "c", "b")["ratio"] == 2.0


def test_rounds_alternate() -> None:
    order: list[str] = []
    overhead.compare({name: lambda name=name: order.append(name) or 0.0 for name in "xy"}, rounds=2)
    assert order == ["x", "y", "y", "x"]


def test_import_is_lazy_and_complete() -> None:
    """`import moe_param` loads neither torch nor transformers; every public name is there when asked for."""
    code = "import sys, moe_param; sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert all(getattr(moe_param, name).__name__ == name for name in moe_param.__all__)
    assert set(moe_param.__all__) <= set(dir(moe_param))
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        _ = moe_param.aply  # type: ignore[attr-defined]
