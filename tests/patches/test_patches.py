"""The installer decides right for environments it is told of, and the patches do what they say."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from patches import check, install
from patches.install import Environment, plan

PYTHON_PARTS = {"stanford-stk": "0.7.1", "megablocks": "0.10.0"}
PIP_HEADERS = Path("/env/nvidia/cu13/include")
TOOLKIT = Path("/usr/local/cuda")


def here(**changes: Any) -> Environment:
    """A machine with CUDA 13 and nothing of ours on it yet; cuBLAS and the like come from pip."""
    headers = {header: PIP_HEADERS for header in install.HEADERS}
    headers["cuda_runtime.h"] = headers["cub/version.cuh"] = TOOLKIT / "include"
    complete = Environment(
        installed={"torch": "2.12.1+cu130", "triton": "3.7.1", "setuptools": "80", "wheel": "1", "ninja": "1"},
        torch_cuda="13.0",
        triton_of_torch="triton==3.7.1",
        gpus=("9.0",),
        cuda_home=TOOLKIT,
        nvcc="13.0",
        compiler="/usr/bin/g++",
        headers=headers,
        runtime_library=True,
        cub=300001,
    )
    return dataclasses.replace(complete, **changes)


def torch_of(version: str) -> dict[str, str]:
    return {**here().installed, "torch": version}


# -- the plan --------------------------------------------------------------------------------------------------------
def test_everything_is_there() -> None:
    todo = plan(here(), jobs=3)
    assert (todo.level, todo.missing, todo.notes) == ("cuda", (), ())
    stk, megablocks, grouped_gemm = todo.steps
    assert stk.command[-1] == "stanford-stk==0.7.1" and not stk.env
    shared = {
        "CUDA_HOME": "/usr/local/cuda",
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "MAX_JOBS": "3",
        "CPLUS_INCLUDE_PATH": str(PIP_HEADERS),  # once, and not the toolkit's own
    }
    header = install.HERE / "cub_debug_synchronous.h"
    assert header.exists()
    assert megablocks.env == {**shared, "NVCC_APPEND_FLAGS": f"-include {header}"}
    assert grouped_gemm.env == {**shared, "GROUPED_GEMM_CUTLASS": "1"}
    for step in (megablocks, grouped_gemm):
        # pins that refuse current torch, an isolated build without torch, the wheel without extension in pip's cache
        assert {"--no-deps", "--no-build-isolation", "--no-cache-dir", "--force-reinstall"} <= set(step.command)
    assert (megablocks.command[-1], grouped_gemm.command[-1]) == ("megablocks==0.10.0", "grouped_gemm==0.3.0")
    assert plan(here(), gemm="cublas").steps[-1].env["GROUPED_GEMM_CUTLASS"] == "0"


def test_the_header_follows_cub_not_cuda() -> None:
    cuda12 = {"installed": torch_of("2.9.1+cu128"), "torch_cuda": "12.8", "nvcc": "12.8"}
    assert "NVCC_APPEND_FLAGS" not in plan(here(**cuda12, cub=200802)).steps[1].env
    assert "NVCC_APPEND_FLAGS" in plan(here(**cuda12, cub=300100)).steps[1].env


def test_what_the_user_set_is_kept() -> None:
    theirs = {"NVCC_APPEND_FLAGS": "-lineinfo", "CPLUS_INCLUDE_PATH": "/theirs"}
    env = plan(here(variables=theirs)).steps[1].env
    assert env["NVCC_APPEND_FLAGS"].startswith("-lineinfo -include /")
    assert env["CPLUS_INCLUDE_PATH"] == f"{PIP_HEADERS}:/theirs"


def test_architectures() -> None:
    assert plan(here(gpus=("8.0", "9.0"))).steps[1].env["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0"
    assert "compute capability 7.5" in plan(here(gpus=("7.5", "9.0"))).notes[0]
    assert plan(here(gpus=()), arch="10.0").steps[1].env["TORCH_CUDA_ARCH_LIST"] == "10.0"
    assert plan(here(gpus=())).level == "triton"  # with a note, see below


MISSING = {
    "CUDA build": {"installed": torch_of("2.13.0+cpu"), "torch_cuda": None},
    "expected CUDA 12 or 13": {"torch_cuda": "11.8"},
    "nvcc was not found": {"nvcc": None, "cuda_home": None},
    "CUDA_HOME is /wrong": {"nvcc": None, "cuda_home": None, "cuda_home_wrong": "/wrong"},
    "nvcc is of CUDA 12.8 (/usr/local/cuda), torch of CUDA 13.0": {"nvcc": "12.8"},
    "g++ was not found": {"compiler": None},
    "libcudart.so": {"runtime_library": False},
    "--arch 9.0": {"gpus": ()},
    "pip install nvidia-cublas": {"headers": {h: f for h, f in here().headers.items() if h != "cublas_v2.h"}},
    "header cub/version.cuh": {"headers": {h: f for h, f in here().headers.items() if h != "cub/version.cuh"}},
}


@pytest.mark.parametrize("words", MISSING)
def test_what_is_missing_is_named(words: str) -> None:
    """One line each; asked for by name it is an error, by default a note and the level that is possible."""
    environment = here(**MISSING[words])
    strict = plan(environment, "cuda")
    assert len(strict.missing) == 1 and words in strict.missing[0] and not strict.steps
    default = plan(environment)
    assert default.level == "triton" and not default.missing and len(default.notes) == 1 and words in default.notes[0]
    assert [step.command[-2:] for step in default.steps] == [("stanford-stk==0.7.1", "megablocks==0.10.0")]


def test_packages_of_the_right_cuda() -> None:
    without = {h: f for h, f in here().headers.items() if h != "cublas_v2.h"}
    (line,) = plan(here(headers=without, torch_cuda="12.8", nvcc="12.8"), "cuda").missing
    assert line.endswith("pip install nvidia-cublas-cu12")


def test_torch_comes_first() -> None:
    for level in ("auto", "triton", "cuda"):
        (line,) = plan(Environment(), level).missing
        assert "torch is not installed" in line
        (line,) = plan(here(installed=torch_of("2.8.0")), level).missing
        assert "2.8.0 is too old" in line
    assert "newer than 2.13" in plan(here(installed=torch_of("2.15.0"))).notes[0]


def test_triton_level() -> None:
    """MegaBlocks' setup.py compiles wherever it sees nvcc, so beside a CUDA torch it must not see it."""
    (step,) = plan(here(variables={"PYTHONPATH": "/theirs"}), "triton").steps
    folder, theirs = step.env["PYTHONPATH"].split(":")
    assert theirs == "/theirs" and (Path(folder) / "sitecustomize.py").exists()
    cpu = here(installed={"torch": "2.13.0+cpu"}, torch_cuda=None, triton_of_torch=None)
    titles = {step.title: step for step in plan(cpu).steps}
    assert list(titles) == ["build tools", "triton", "MegaBlocks, its Python part"]
    assert titles["triton"].command[-1] == "triton>=3.7.1"
    assert titles["build tools"].command[-2:] == ("setuptools", "wheel")
    assert not titles["MegaBlocks, its Python part"].env
    pinned = here(installed={"torch": "2.12.1", "setuptools": "80", "wheel": "1"})
    assert plan(pinned, "triton").steps[0].command[-1] == "triton==3.7.1"


def test_what_is_there_is_not_installed_again() -> None:
    python = {**here().installed, **PYTHON_PARTS}
    assert plan(here(installed=python), "triton").steps == ()
    # the Python part alone does not satisfy the level "cuda": compiled anew, over it
    assert [s.command[-1] for s in plan(here(installed=python)).steps] == ["megablocks==0.10.0", "grouped_gemm==0.3.0"]
    everything = here(
        installed={**python, "grouped_gemm": "0.3.0"},
        extensions=frozenset({"megablocks_ops", "grouped_gemm_backend"}),
    )
    assert plan(everything).steps == ()
    assert len(plan(everything, force=True).steps) == 3
    old = dataclasses.replace(everything, installed={**everything.installed, "megablocks": "0.7.0"})
    assert [step.command[-1] for step in plan(old).steps] == ["megablocks==0.10.0"]


# -- what is here ----------------------------------------------------------------------------------------------------
def fake_toolkit(folder: Path, release: str = "13.0", cub: int = 300001) -> Path:
    for path, text in {
        "bin/nvcc": f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n",
        "include/cuda_runtime.h": "",
        "include/cccl/cub/version.cuh": f"// #define CUB_VERSION 1\n#define CUB_VERSION {cub} // a comment\n",
        "lib64/libcudart.so": "",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (folder / "bin/nvcc").chmod(0o755)
    return folder


def test_look_reads_the_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = fake_toolkit(tmp_path / "cuda", "12.9", 200802)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setattr(install, "_torch_facts", lambda: ("12.9", ("9.0",)))
    monkeypatch.setattr(install, "_site_packages", lambda: [tmp_path / "packages"])
    found = install.look()
    assert (found.cuda_home, found.nvcc, found.cub, found.runtime_library) == (toolkit, "12.9", 200802, True)
    assert set(found.headers) == {"cuda_runtime.h", "cub/version.cuh"}
    cublas = tmp_path / "packages/nvidia/cublas/include/cublas_v2.h"
    cublas.parent.mkdir(parents=True)
    cublas.write_text("")
    found = install.look()
    assert found.headers["cublas_v2.h"] == cublas.parent
    assert str(cublas.parent) == install._build_environment(found, None, 1)["CPLUS_INCLUDE_PATH"]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert install.look().cuda_home_wrong == str(tmp_path)


def test_a_wrapper_on_path_is_not_the_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would take the folder above it; where there is no header, we go on looking."""
    fake_toolkit(tmp_path / "other")
    (tmp_path / "other/include/cuda_runtime.h").unlink()
    real = fake_toolkit(tmp_path / "packages/nvidia/cu13")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "other/bin"))
    monkeypatch.setattr(install, "_site_packages", lambda: [tmp_path / "packages"])
    monkeypatch.setattr(install, "SYSTEM_CUDA", tmp_path / "none")
    assert install._cuda_home() == (real, None)
    (tmp_path / "other/include/cuda_runtime.h").write_text("")
    assert install._cuda_home() == (tmp_path / "other", None)


# -- doing it --------------------------------------------------------------------------------------------------------
def test_a_failing_step_is_one_line_and_a_log(tmp_path: Path) -> None:
    code = "print('nvcc warning: x'); print('csrc/a.cu(3): error: no such thing'); print('exit 1'); raise SystemExit(1)"
    good = install.Step("Good", (sys.executable, "-c", "import os; print(os.environ['OURS'])"), {"OURS": "set"})
    bad = install.Step("Bad one (minutes)", (sys.executable, "-c", code))
    with pytest.raises(SystemExit) as stopped:
        install.install((good, bad, good), tmp_path)
    log = tmp_path / "2-bad-one-minutes.log"
    message = f"failed: Bad one (minutes): csrc/a.cu(3): error: no such thing. The whole log: {log}"
    assert str(stopped.value) == message
    assert log.read_text().startswith(str(bad)) and (tmp_path / "1-good.log").read_text().endswith("set\n")
    assert not (tmp_path / "3-good.log").exists()


FAKE_CHECKS = """
import os, sys
if len(sys.argv) == 2:
    print("fine wrong crash")
elif sys.argv[2] == "fine":
    print("chatter\\nok: fine")
elif sys.argv[2] == "wrong":
    assert 1 == 2, "one is not two"
else:
    os.abort()
"""


def test_checks_that_fail_or_crash_are_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "check.py").write_text(FAKE_CHECKS)
    monkeypatch.setattr(install, "HERE", tmp_path)
    assert install.check("cuda", tmp_path / "logs") is False
    fine, wrong, crash = capsys.readouterr().out.splitlines()
    assert fine.strip() == "ok: fine"
    assert "FAILED  wrong: AssertionError: one is not two" in wrong and "check-wrong.log" in wrong
    assert "FAILED  crash: ended by signal 6" in crash


def test_an_old_interpreter_beside_a_new_numpy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 takes int() of an array of one element, which numpy 2.4 refuses; on a GPU that is no matter."""
    here = {"triton": "3.6.0", "numpy": "2.5.5"}

    def version(name: str) -> str:
        if name not in here:
            raise check.importlib.metadata.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setattr(check.importlib.metadata, "version", version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    said = check.permutations()
    assert said.startswith("not run: ") and "Triton 3.6.0 does not work with numpy 2.5.5" in said
    for fine in ({"triton": "3.7.1"}, {"numpy": "2.3.5"}):
        with monkeypatch.context() as inner:
            inner.setitem(here, *next(iter(fine.items())))
            assert check.cannot_interpret() is None
    del here["triton"]
    assert check.cannot_interpret() is None


def test_empty_experts_are_noticed() -> None:
    """The check must tell a grouped GEMM that leaves the gradient of an unused expert unwritten from one that clears
    it. On the CPU: the unwritten memory is made up."""
    torch = pytest.importorskip("torch")

    class Gemm(torch.autograd.Function):
        dirt = 0.0

        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, sizes: Any) -> Any:
            ctx.save_for_backward(x, weight, sizes)
            return torch.cat([part @ w for part, w in zip(x.split(sizes.tolist()), weight)])

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            x, weight, sizes = ctx.saved_tensors
            parts = list(zip(x.split(sizes.tolist()), grad.split(sizes.tolist()), weight))
            weight_grad = torch.stack([a.t() @ g if len(a) else torch.full_like(w, Gemm.dirt) for a, g, w in parts])
            return torch.cat([g @ w.t() for _, g, w in parts]), weight_grad, None

    assert check._grouped(Gemm.apply) == "empty expert: zero"
    Gemm.dirt = float("nan")
    assert "NOT zero" in check._grouped(Gemm.apply)
    with pytest.raises(AssertionError, match="expected norm"):
        check._grouped(lambda *arguments: Gemm.apply(*arguments) * 1.1)


@pytest.mark.slow
def test_as_a_plain_file(tmp_path: Path) -> None:
    """From any folder, told nothing: the plan for this environment, whatever that is."""
    command = [sys.executable, install.HERE / "install.py", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("here: torch 2."), done.stderr
    assert "# then: check, level" in done.stdout.splitlines()[-1]
    if importlib.util.find_spec("torch").origin and "+cpu" in done.stdout:
        assert "note: not installed: the compiled extensions. torch" in done.stdout


# -- the patches -----------------------------------------------------------------------------------------------------
STUB = """
#pragma once
#include <cstddef>
typedef int cudaError_t;
typedef struct Stream* cudaStream_t;
#ifdef CUB_WRAPPED_NAMESPACE
namespace CUB_WRAPPED_NAMESPACE {
#endif
namespace cub {
struct DeviceScan {
  template <typename In, typename Out, typename Count>
  static cudaError_t ExclusiveSum(void*, size_t&, In, Out, Count count, cudaStream_t = 0 FLAG) { return 10 * count; }
  template <typename In, typename Out, typename Count>
  static cudaError_t InclusiveSum(void*, size_t&, In, Out, Count count, cudaStream_t = 0 FLAG) { return 20 * count; }
  template <typename In, typename Count>
  static cudaError_t InclusiveSum(void*, size_t&, In, Count count, cudaStream_t = 0) { return 30 * count; }
};
}
#ifdef CUB_WRAPPED_NAMESPACE
}
#endif
"""
USER = """
#undef CUB_WRAPPED_NAMESPACE
#define CUB_WRAPPED_NAMESPACE megablocks
#include <cub/cub.cuh>
namespace megablocks {
int run() {
  size_t bytes = 0;
  int x = 0;
  int sum = cub::DeviceScan::ExclusiveSum(nullptr, bytes, &x, &x, 1, (cudaStream_t)0, false);
  sum += cub::DeviceScan::InclusiveSum(nullptr, bytes, &x, &x, 1, (cudaStream_t)0, false);
  sum += cub::DeviceScan::InclusiveSum(nullptr, bytes, &x, &x, 1);  // without the argument, as ever
  return sum + cub::DeviceScan::InclusiveSum(nullptr, bytes, &x, 1);
}
}
int main() { return megablocks::run(); }
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("cub, patched, compiles", [(300001, False, False), (300001, True, True), (200802, True, True)])
def test_cub_header(tmp_path: Path, cub: int, patched: bool, compiles: bool) -> None:
    """MegaBlocks' old calls against a CUB with the new signatures (and, for 2.x, with the old ones)."""
    (tmp_path / "cub").mkdir()
    (tmp_path / "cub/version.cuh").write_text(f"#define CUB_VERSION {cub}\n")
    (tmp_path / "cub/cub.cuh").write_text(STUB.replace("FLAG", "" if cub >= 300000 else ", bool = false"))
    (tmp_path / "user.cpp").write_text(USER)
    include = ["-include", install.HERE / "cub_debug_synchronous.h"] if patched else []
    command = [
        "g++",
        "-std=c++17",
        "-D__CUDACC__",
        "-I",
        tmp_path,
        *include,
        tmp_path / "user.cpp",
        "-o",
        tmp_path / "a",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) is compiles, done.stderr
    if compiles:
        assert subprocess.run([tmp_path / "a"], timeout=10).returncode == 10 + 20 + 20 + 30
    else:
        assert "no matching function" in done.stderr


def test_nvcc_is_hidden_from_setup_py(tmp_path: Path) -> None:
    """Only in the process in which pip runs setup.py."""
    torch = tmp_path / "torch/utils/cpp_extension.py"
    torch.parent.mkdir(parents=True)
    for file in ("torch/__init__.py", "torch/utils/__init__.py"):
        (tmp_path / file).write_text("")
    torch.write_text("CUDA_HOME = '/usr/local/cuda'\n")
    env = {**os.environ, "PYTHONPATH": f"{install.HERE / 'without_nvcc'}:{tmp_path}"}
    for name, expected in (("_in_process.py", "None"), ("other.py", "/usr/local/cuda")):
        (tmp_path / name).write_text("from torch.utils.cpp_extension import CUDA_HOME; print(CUDA_HOME)")
        done = subprocess.run([sys.executable, tmp_path / name], env=env, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == expected, done.stderr


@pytest.mark.slow
def test_python_part_installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For real, into a throw-away folder, where a package index is in reach; and its kernels are found there."""
    pytest.importorskip("triton")
    (step,) = plan(here(), "triton").steps
    command = [*step.command, "--target", str(tmp_path), "--retries", "0", "--timeout", "10"]
    done = subprocess.run(command, env={**os.environ, **step.env}, capture_output=True, text=True, timeout=300)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("no package index in reach")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.glob("megablocks_ops*")) and (tmp_path / "stk/ops").is_dir()
    monkeypatch.syspath_prepend(str(tmp_path))
    kernels = check._kernels()
    assert Path(str(kernels.__file__)).is_relative_to(tmp_path) and kernels.gather and kernels.scatter_wgrad
