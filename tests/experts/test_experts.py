"""The "megablocks" experts without a GPU: what they compute, that the kernels compile, what is said where they cannot.

The kernels run and compile in processes of their own (experts_interpreted.py, experts_ahead.py), one each. What only a
GPU can show is in tests/gpu.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_param.experts import megablocks as experts
from moe_param.experts import registration
from patches.check import cannot_interpret
from tests.experts.interpreted import CHECKS

installed = all(importlib.util.find_spec(package) for package in ("triton", "megablocks"))
needs_kernels = pytest.mark.skipif(not installed, reason="needs triton and megablocks (see Makefile)")


def worker(script: str, folder: Path, **environment: str) -> dict[str, Any]:
    out = folder / "out.json"
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(folder / "triton"), **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(out.read_text())


# -- the kernels -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """moe_param first: it loads neither torch nor transformers, and is there when transformers is."""
    if reason := cannot_interpret():
        pytest.skip(reason)
    first = "import sys, moe_param; assert not {'torch', 'transformers'} & set(sys.modules)"
    script = f"{first}; from tests.experts.interpreted import main; main()"
    return worker(script, tmp_path_factory.mktemp("interpreted"), TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """transformers first; the process itself checks that the name was not there before moe_param."""
    folder = tmp_path_factory.mktemp("ahead")
    return worker("from tests.experts.ahead import main; main()", folder, MOE_PARAM_GMM="grouped_gemm")


@needs_kernels
@pytest.mark.slow
@pytest.mark.xdist_group("experts, interpreted")  # one process for all of them
@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str, interpreted: dict[str, Any]) -> None:
    assert interpreted["results"][name] is None, interpreted["results"][name]


@needs_kernels
@pytest.mark.slow
@pytest.mark.xdist_group("experts, interpreted")
def test_interpreted_covers_what_it_should(interpreted: dict[str, Any]) -> None:
    from tests.models import INTERFACE

    assert interpreted["results"].keys() == CHECKS.keys()
    assert interpreted["numbers"]["families"] == len(INTERFACE) > 40
    assert 0 < interpreted["numbers"]["32 layouts"] < 1e-6


@needs_kernels
@pytest.mark.slow
@pytest.mark.xdist_group("experts, ahead of time")
def test_every_variant_compiles_for_every_architecture(ahead: dict[str, Any]) -> None:
    assert len(ahead["sizes"]) > 30
    for name, sizes in ahead["sizes"].items():
        assert set(sizes) == {"sm_80", "sm_90", "sm_100"} and min(sizes.values()) > 1000, name
    assert "int64" in ahead["refusals"]["64-bit bins"]


@needs_kernels
@pytest.mark.slow
@pytest.mark.xdist_group("experts, ahead of time")
def test_cpu_tensors_are_refused(ahead: dict[str, Any]) -> None:
    assert "runs on CUDA" in ahead["refusals"]["CPU"] and "'grouped_mm'" in ahead["refusals"]["CPU"]


@needs_kernels
@pytest.mark.slow
@pytest.mark.xdist_group("experts, ahead of time")
def test_environment_chooses_the_provider(ahead: dict[str, Any]) -> None:
    assert ahead["provider"] == "grouped_gemm"


# -- what is installed -----------------------------------------------------------------------------------------------
@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def hide(*packages: str) -> None:
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in packages else real(name, *a))
        monkeypatch.setattr(experts, "_kernels", None)

    return hide


def mixtral(implementation: str) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=4,
        experts_implementation=implementation,
    )
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("missing", [("megablocks",), ("triton",), ("triton", "megablocks")])
def test_missing_packages_are_named_on_first_use(missing: tuple[str, ...], without: Callable[..., None]) -> None:
    without(*missing)
    model = mixtral("megablocks")  # building one is fine: it may run elsewhere
    with pytest.raises(ImportError, match=f"needs {' and '.join(missing)}, not installed here") as error:
        model(torch.zeros(1, 4, dtype=torch.long))
    for words in ("moe-param install-kernels", "pip install", "experts_implementation='grouped_mm'"):
        assert words in str(error.value)
    with pytest.raises(ImportError, match="moe-param install-kernels"):
        experts.check_available()
    assert not experts.is_available() and not experts.is_available("cuda")
    model.set_experts_implementation("eager")  # the control
    model(torch.zeros(1, 4, dtype=torch.long))


@needs_kernels
def test_finding_the_kernels_does_not_import_megablocks() -> None:
    experts.check_available()
    assert "megablocks" not in sys.modules
    assert experts.is_available() and experts.is_available("cuda")
    assert not experts.is_available("cpu")  # this process does not interpret


@needs_kernels
def test_another_megablocks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_param.experts import kernels

    path = tmp_path / "kernels.py"
    path.write_text("def gather(): ...\n")
    monkeypatch.setattr(kernels, "find_permutations", lambda: path)
    with pytest.raises(ImportError, match=r"has no scatter, _padded_copy, _padded_copy_wgrad: megablocks 0\.10\.0"):
        kernels._load_permutations()


# -- who multiplies --------------------------------------------------------------------------------------------------
def test_provider_choice(without: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 9))
    assert experts.gmm_provider(cuda, torch.bfloat16) == experts.DEFAULT == "torch"
    monkeypatch.setitem(experts.FASTEST, (9, 9), "grouped_gemm")
    without("grouped_gemm")
    assert experts.gmm_provider(cuda, torch.bfloat16) == "torch"  # faster, but not there
    with pytest.raises(ImportError, match=r"grouped_gemm package.*install-kernels"):
        experts.gmm_provider(cuda, torch.bfloat16, "grouped_gemm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert experts.gmm_provider(cuda, torch.bfloat16) == "grouped_gemm"
    assert experts.gmm_provider(cuda, torch.float32) == experts.gmm_provider(cpu, torch.bfloat16) == "torch"
    assert experts.gmm_provider(cuda, torch.bfloat16, "torch") == "torch"
    for device, dtype in ((cuda, torch.float16), (cpu, torch.bfloat16)):  # asked for by name: no silent replacement
        with pytest.raises(ValueError, match=r"bfloat16 on CUDA only, not (float16 on cuda|bfloat16 on cpu)"):
            experts.gmm_provider(device, dtype, "grouped_gemm")
    before = experts.use_gmm("torch")
    try:
        assert before == "auto" and experts.gmm_provider(cuda, torch.bfloat16) == "torch"
        assert experts.use_gmm("grouped_gemm") == "torch"
        assert experts.gmm_provider(cuda, torch.bfloat16) == "grouped_gemm"
    finally:
        experts.use_gmm(before)


def test_unknown_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"use_gmm: unknown provider 'cublas' \(valid: auto, torch, grouped_gemm\)"):
        experts.use_gmm("cublas")
    monkeypatch.setattr(experts, "_choice", "cublas")  # what the environment variable sets
    with pytest.raises(ValueError, match="MOE_PARAM_GMM: unknown provider 'cublas'"):
        mixtral("megablocks")(torch.zeros(1, 4, dtype=torch.long))


def test_groups_reach_grouped_gemm_as_it_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls, against a stand-in that multiplies group by group: which operand is transposed, and the sizes."""

    class Backend:
        @staticmethod
        def gmm(a: Any, b: Any, sizes: Any, trans_a: bool = False, trans_b: bool = False) -> torch.Tensor:
            assert a.is_contiguous() and b.is_contiguous() and sizes.dtype == torch.int64 and not (trans_a and trans_b)
            if trans_a:
                return torch.stack([x.t() @ y for x, y in zip(a.split(sizes.tolist()), b.split(sizes.tolist()))])
            return torch.cat([x @ (y.t() if trans_b else y) for x, y in zip(a.split(sizes.tolist()), b)])

    class Kernels:  # of no interest here
        zero_empty = staticmethod(lambda values, ends: values)

    monkeypatch.setattr(experts, "_grouped_gemm", lambda: Backend)
    monkeypatch.setattr(experts, "_kernels_for", lambda x, rows: Kernels)
    ends, sizes = torch.tensor([2, 2, 5], dtype=torch.int32), torch.tensor([2, 0, 3])
    for transposed in (False, True):
        x = torch.randn(5, 8, requires_grad=True)
        weight = torch.randn(3, *((8, 4) if transposed else (4, 8)), requires_grad=True)
        results = []
        for given in (None, sizes):
            out = experts.grouped_mm(x, weight, ends, given, transposed)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
        for ours, reference in zip(results[1], results[0]):
            torch.testing.assert_close(ours, reference)


def test_meta_tensors_pass() -> None:
    """Shapes and gradients without kernels or data, for what plans with them."""
    with torch.device("meta"):
        model = mixtral("megablocks").bfloat16()
        ids = torch.zeros(2, 4, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
    layer = model.model.layers[0].mlp
    assert layer.experts.down_proj.grad.shape == layer.experts.down_proj.shape
    assert layer.gate.weight.grad.dtype == torch.bfloat16


# -- registration ----------------------------------------------------------------------------------------------------
def test_registered() -> None:
    assert ALL_EXPERTS_FUNCTIONS["megablocks"] is experts.megablocks_experts_forward
    assert mixtral("megablocks").config._experts_implementation == "megablocks"


def test_registration_waits_for_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its first import fails; other modules, and other finders, are left alone."""
    (tmp_path / "table_of_tests.py").write_text(
        "import os\n"
        "if 'FAIL' in os.environ: raise RuntimeError('not now')\n"
        "class ALL_EXPERTS_FUNCTIONS(dict):\n"
        "    found = {}\n"
        "    register = found.__setitem__\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "TABLE", "table_of_tests")
    before = list(sys.meta_path)
    registration.register_experts()
    registration.register_experts()  # twice is once
    assert len(sys.meta_path) == len(before) + 1
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(RuntimeError, match="not now"):
        importlib.import_module("table_of_tests")
    monkeypatch.delenv("FAIL")
    table = importlib.import_module("table_of_tests")
    assert table.ALL_EXPERTS_FUNCTIONS.found == {"megablocks": experts.megablocks_experts_forward}
    assert sys.meta_path == before
    table.ALL_EXPERTS_FUNCTIONS.found.clear()
    registration.register_experts()  # there already
    assert list(table.ALL_EXPERTS_FUNCTIONS.found) == ["megablocks"] and sys.meta_path == before
    del sys.modules["table_of_tests"]
