"""Installs MegaBlocks and grouped_gemm into the environment this runs in, patched for current torch, and checks them.

    python -m patches.install              # what is possible here: the lot, or without nvcc the Triton kernels alone
    python -m patches.install --arch 9.0   # where there is no GPU to read the architecture from
    python -m patches.install --dry-run    # what it would do, and what is missing
    python -m patches.install --check      # only the checks

Needs nothing but Python and pip. README.md beside this file says what each patch is for.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
STK, MEGABLOCKS, GROUPED_GEMM = "stanford-stk==0.7.1", "megablocks==0.10.0", "grouped_gemm==0.3.0"
TORCH = (2, 9), (2, 13)  # first and last tried
SYSTEM_CUDA = Path("/usr/local/cuda")
# The packages pin torch<2.7.1, numpy<2.1, packaging<24.2 and setuptools<79, none of which they need: no dependencies,
# no isolated build. No cache: without nvcc pip keeps a wheel that has no extension, and would take it again with nvcc.
# -v: without it pip keeps the compiler's words to itself.
PIP = ("-m", "pip", "install", "-v", "--no-deps", "--no-build-isolation", "--no-cache-dir")
# What the sources include of CUDA, torch's headers counted in, and the pip package that brings it if the toolkit does
# not: for CUDA 12, for CUDA 13.
HEADERS = {
    "cuda_runtime.h": ("nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime"),
    "cub/version.cuh": ("nvidia-cuda-cccl-cu12", "nvidia-cuda-cccl"),
    "cublas_v2.h": ("nvidia-cublas-cu12", "nvidia-cublas"),
    "cusparse.h": ("nvidia-cusparse-cu12", "nvidia-cusparse"),
    "cusolverDn.h": ("nvidia-cusolver-cu12", "nvidia-cusolver"),
}


@dataclass(frozen=True)
class Environment:
    """What is here. `look` fills it in; the plan depends on nothing else."""

    installed: dict[str, str] = field(default_factory=dict)  # package → version
    torch_cuda: str | None = None  # the CUDA version torch was built for
    triton_of_torch: str | None = None  # the requirement torch itself states
    gpus: tuple[str, ...] = ()  # compute capabilities
    cuda_home: Path | None = None  # a folder with bin/nvcc
    cuda_home_wrong: str | None = None  # $CUDA_HOME, if there is no nvcc in it
    nvcc: str | None = None  # its version
    compiler: str | None = None
    headers: dict[str, Path] = field(default_factory=dict)  # those of HEADERS that were found → include folder
    runtime_library: bool = False  # libcudart.so, to link with
    cub: int | None = None  # CUB_VERSION: 200800 is 2.8.0
    extensions: frozenset[str] = frozenset()  # compiled modules that are installed
    variables: dict[str, str] = field(default_factory=dict)  # environment variables we add to


@dataclass(frozen=True)
class Step:
    title: str
    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.env.items()), *self.command])


@dataclass(frozen=True)
class Plan:
    level: str  # "cuda" or "triton"
    steps: tuple[Step, ...]
    missing: tuple[str, ...]  # why this level cannot be installed
    notes: tuple[str, ...]


# -- what is here ----------------------------------------------------------------------------------------------------
def look() -> Environment:
    installed = {}
    for name in (
        "torch",
        "triton",
        "stanford-stk",
        "megablocks",
        "grouped_gemm",
        "setuptools",
        "wheel",
        "ninja",
        "numpy",
    ):
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    triton_of_torch = None
    if "torch" in installed:
        for requirement in importlib.metadata.requires("torch") or ():
            if found := re.match(r"triton\s*(==[\w.]+)", requirement):
                triton_of_torch = "triton" + found[1]
    torch_cuda, gpus = _torch_facts() if "torch" in installed else (None, ())
    cuda_home, wrong = _cuda_home()
    headers = _headers(cuda_home)
    cub = None
    if "cub/version.cuh" in headers:
        text = (headers["cub/version.cuh"] / "cub/version.cuh").read_text("utf-8", "replace")
        cub = int(found[1]) if (found := re.search(r"^#define CUB_VERSION (\d+)", text, re.MULTILINE)) else None
    return Environment(
        installed=installed,
        torch_cuda=torch_cuda,
        triton_of_torch=triton_of_torch,
        gpus=gpus,
        cuda_home=cuda_home,
        cuda_home_wrong=wrong,
        nvcc=_nvcc_version(cuda_home),
        compiler=shutil.which(os.environ.get("CXX", "g++")),
        headers=headers,
        runtime_library=any(
            (cuda_home / folder / "libcudart.so").exists() for folder in ("lib64", "lib") if cuda_home is not None
        ),
        cub=cub,
        extensions=frozenset(
            name for name in ("megablocks_ops", "grouped_gemm_backend") if importlib.util.find_spec(name)
        ),
        variables={
            name: os.environ[name]
            for name in ("NVCC_APPEND_FLAGS", "CPLUS_INCLUDE_PATH", "PYTHONPATH")
            if name in os.environ
        },
    )


def _torch_facts() -> tuple[str | None, tuple[str, ...]]:
    """(CUDA version, compute capabilities), from a second process: importing torch here would keep CUDA open."""
    code = (
        "import torch; n = torch.cuda.device_count(); "
        "print((torch.version.cuda, ['%d.%d' % torch.cuda.get_device_capability(i) for i in range(n)]))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"import torch fails: {_last_line(done.stderr)}. Repair torch first.")
    cuda, gpus = ast.literal_eval(done.stdout.splitlines()[-1])
    return cuda, tuple(sorted(set(gpus)))


def _site_packages() -> list[Path]:
    return [Path(folder) for folder in dict.fromkeys([sysconfig.get_path("purelib"), *site.getsitepackages()])]


def _cuda_home() -> tuple[Path | None, str | None]:
    """The CUDA toolkit: where the user says, or the first folder that has a compiler and its own header.

    torch takes the folder above the nvcc on PATH, which is not the toolkit where that nvcc is a wrapper or a link.
    """
    said = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if said:
        return (Path(said), None) if (Path(said) / "bin/nvcc").exists() else (None, said)
    on_path = shutil.which("nvcc")
    candidates = [Path(on_path).resolve().parent.parent] if on_path else []
    candidates.append(SYSTEM_CUDA)
    candidates += [folder for packages in _site_packages() for folder in sorted(packages.glob("nvidia/cu1?"))]
    for folder in candidates:
        if (folder / "bin/nvcc").exists() and _include(folder, "cuda_runtime.h"):
            return folder, None
    return None, None


def _include(cuda_home: Path, header: str) -> Path | None:
    for folder in (cuda_home / "include", cuda_home / "include/cccl"):
        if (folder / header).exists():
            return folder
    return None


def _headers(cuda_home: Path | None) -> dict[str, Path]:
    """header → include folder: the toolkit's, else that of NVIDIA's pip packages."""
    found = {}
    for header in HEADERS:
        folder = _include(cuda_home, header) if cuda_home else None
        for packages in () if folder else _site_packages():
            hits = sorted(packages.glob(f"nvidia/*/include/{header}")) + sorted(
                packages.glob(f"nvidia/*/include/cccl/{header}")
            )
            if hits:
                folder = hits[0].parents[len(Path(header).parts) - 1]
                break
        if folder:
            found[header] = folder
    return found


def _nvcc_version(cuda_home: Path | None) -> str | None:
    if cuda_home is None:
        return None
    done = subprocess.run([str(cuda_home / "bin/nvcc"), "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else None


# -- the plan --------------------------------------------------------------------------------------------------------
def plan(
    here: Environment,
    level: str = "auto",
    arch: str | None = None,
    jobs: int = 2,
    gemm: str = "cutlass",
    force: bool = False,
) -> Plan:
    """The steps that lead from `here` to `level`; "auto" is "cuda" where nothing is missing for it, else "triton"."""
    missing = missing_for_cuda(here, arch) if level != "triton" else ()
    if level == "auto":
        level = "triton" if missing else "cuda"
    common = missing_for_triton(here)
    notes = [f"not installed: the compiled extensions. {line}" for line in missing] if level == "triton" else []
    if (version := _release(here.installed.get("torch"))) and version > TORCH[1]:
        notes.append(f"torch {here.installed['torch']} is newer than {TORCH[1][0]}.{TORCH[1][1]}, the last one tried.")
    for gpu in here.gpus:
        if int(gpu.split(".")[0]) < 8:
            notes.append(f"a GPU here has compute capability {gpu}: torch's grouped_mm and grouped_gemm need 8.0.")
    if common or (level == "cuda" and missing):
        lines = dict.fromkeys((*common, *(missing if level == "cuda" else ())))
        return Plan(level, (), tuple(lines), tuple(notes))

    build = _build_environment(here, arch, jobs) if level == "cuda" else {}
    steps = _steps(here, level, build, gemm, force)
    tools = [
        name for name in ("setuptools", "wheel", *(("ninja",) if level == "cuda" else ())) if name not in here.installed
    ]
    if steps and tools:
        steps.insert(0, Step("build tools", _pip(*tools)))
    return Plan(level, tuple(steps), (), tuple(notes))


def _steps(here: Environment, level: str, build: dict[str, str], gemm: str, force: bool) -> list[Step]:
    steps = []
    if "triton" not in here.installed:
        steps.append(Step("triton", _pip(here.triton_of_torch or "triton>=3.7.1")))
    packages = [name for name in (STK, MEGABLOCKS) if force or not _has(here, name)]
    if level == "triton":
        if packages:
            # A CUDA build of torch beside an nvcc that cannot be used would make setup.py compile after all.
            paths = filter(None, [str(HERE / "without_nvcc"), here.variables.get("PYTHONPATH")])
            hide = {"PYTHONPATH": ":".join(paths)} if here.torch_cuda else {}
            steps.append(Step("MegaBlocks, its Python part", _pip(*packages, reinstall=force), hide))
        return steps

    if STK in packages:
        steps.append(Step("stanford-stk", _pip(STK, reinstall=force)))
    if force or MEGABLOCKS in packages or "megablocks_ops" not in here.extensions:
        flags = dict(build)
        if (here.cub or 0) >= 300000:
            ours = f"-include {shlex.quote(str(HERE / 'cub_debug_synchronous.h'))}"
            flags["NVCC_APPEND_FLAGS"] = " ".join(filter(None, [here.variables.get("NVCC_APPEND_FLAGS"), ours]))
        command = _pip("--no-binary=megablocks", MEGABLOCKS, reinstall=True)
        steps.append(Step("MegaBlocks with its CUDA extension (minutes)", command, flags))
    if force or not _has(here, GROUPED_GEMM) or "grouped_gemm_backend" not in here.extensions:
        command = _pip("--no-binary=grouped_gemm", GROUPED_GEMM, reinstall=True)
        # With CUTLASS the group sizes stay on the GPU, and an expert without tokens gets a zero gradient (README.md).
        flags = {**build, "GROUPED_GEMM_CUTLASS": "1" if gemm == "cutlass" else "0"}
        steps.append(Step(f"grouped_gemm on {'CUTLASS' if gemm == 'cutlass' else 'cuBLAS'} (minutes)", command, flags))
    return steps


def missing_for_triton(here: Environment) -> tuple[str, ...]:
    version = here.installed.get("torch")
    if version is None:
        return (
            "torch is not installed: install the build for your GPU first, see https://pytorch.org/get-started/locally",
        )
    if _release(version) < TORCH[0]:
        return (f"torch {version} is too old: expected {TORCH[0][0]}.{TORCH[0][1]} or newer, which has grouped_mm.",)
    return ()


def missing_for_cuda(here: Environment, arch: str | None) -> tuple[str, ...]:
    """One line for each thing that the compiled extensions need and that is not here."""
    version = here.installed.get("torch")
    if version is None:
        return missing_for_triton(here)
    if here.torch_cuda is None:
        return (
            f"torch {version} is not a CUDA build: install one for CUDA 12 or 13, "
            "for example pip install torch --index-url https://download.pytorch.org/whl/cu130",
        )
    major = int(here.torch_cuda.split(".")[0])
    lines = []
    if major not in (12, 13):
        return (f"torch {version} was built for CUDA {here.torch_cuda}: expected CUDA 12 or 13.",)
    if here.cuda_home_wrong:
        lines.append(
            f"CUDA_HOME is {here.cuda_home_wrong}, where there is no bin/nvcc: set it to the toolkit or unset it."
        )
    elif here.nvcc is None:
        lines.append(
            f"nvcc was not found (CUDA_HOME, PATH, /usr/local/cuda, pip's nvidia-cuda-nvcc): install the CUDA {major} "
            "toolkit, or set CUDA_HOME to where it is."
        )
    elif int(here.nvcc.split(".")[0]) != major:
        lines.append(
            f"nvcc is of CUDA {here.nvcc} ({here.cuda_home}), torch of CUDA {here.torch_cuda}: torch builds extensions "
            f"with its own major version only. Set CUDA_HOME to a CUDA {major} toolkit."
        )
    if here.compiler is None:
        lines.append("g++ was not found: install a C++ compiler, or set CXX.")
    if here.nvcc is not None:
        for header, packages in HEADERS.items():
            if header not in here.headers:
                lines.append(
                    f"the header {header} is neither in {here.cuda_home}/include nor in NVIDIA's pip packages: "
                    f"pip install {packages[major - 12]}"
                )
        if not here.runtime_library:
            lines.append(
                f"libcudart.so is not in {here.cuda_home}/lib64: install the toolkit's cudart development files."
            )
    if arch is None and not here.gpus:
        lines.append(
            "there is no GPU here to read the architecture from: say which, for example --arch 9.0 (H100, H200)."
        )
    return tuple(lines)


def _build_environment(here: Environment, arch: str | None, jobs: int) -> dict[str, str]:
    assert here.cuda_home is not None
    # Only folders that hold what the toolkit lacks: two versions of one header should not compete.
    extra = [str(folder) for folder in here.headers.values() if here.cuda_home not in folder.parents]
    paths = [*dict.fromkeys(extra), *filter(None, [here.variables.get("CPLUS_INCLUDE_PATH")])]
    return {
        "CUDA_HOME": str(here.cuda_home),
        "TORCH_CUDA_ARCH_LIST": arch or ";".join(here.gpus),
        "MAX_JOBS": str(jobs),
        **({"CPLUS_INCLUDE_PATH": ":".join(paths)} if extra else {}),
    }


def _pip(*arguments: str, reinstall: bool = False) -> tuple[str, ...]:
    return (sys.executable, *PIP, *(("--force-reinstall",) if reinstall else ()), *arguments)


def _has(here: Environment, requirement: str) -> bool:
    name, version = requirement.split("==")
    return here.installed.get(name) == version


def _release(version: str | None) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else (0, 0)


# -- doing it --------------------------------------------------------------------------------------------------------
def install(steps: tuple[Step, ...], logs: Path) -> None:
    logs.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, 1):
        log = logs / f"{number}-{re.sub(r'[^a-z]+', '-', step.title.lower()).strip('-')}.log"
        print(f"[{number}/{len(steps)}] {step.title}", flush=True)
        with log.open("w", encoding="utf-8") as file:
            file.write(f"{step}\n\n")
            file.flush()
            done = subprocess.run(step.command, env={**os.environ, **step.env}, stdout=file, stderr=file)
        if done.returncode:
            raise SystemExit(f"failed: {step.title}: {_error_in(log)}. The whole log: {log}")


def _error_in(log: Path) -> str:
    """The line of a build log that says what went wrong: the compiler's first error, else the last line."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    for line in lines[1:]:  # the first is the command
        if re.search(r"\b(fatal )?error\b ?(#\d+)?:|Error: ", line) and "-Werror" not in line:
            return line
    return lines[-1]


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def check(level: str, logs: Path) -> bool:
    """Every check in a process of its own, so that one that crashes is one line too."""
    names = subprocess.run(
        [sys.executable, HERE / "check.py", level], capture_output=True, text=True, check=True
    ).stdout
    passed = True
    logs.mkdir(parents=True, exist_ok=True)
    for name in names.split():
        log = logs / f"check-{name}.log"
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, HERE / "check.py", level, name], stdout=subprocess.PIPE, stderr=file, text=True
            )
        said = _last_line(done.stdout) if done.stdout.strip() else ""
        if done.returncode == 0:
            print(f"  {said}")  # "ok …" or "not run …"
        else:
            passed = False
            reason = _last_line(log.read_text("utf-8", "replace"))
            if done.returncode < 0:
                reason = f"ended by signal {-done.returncode}"
            print(f"  FAILED  {name}: {reason} (log: {log})")
    return passed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="moe-param install-kernels",
        description="Installs MegaBlocks and grouped_gemm into this environment, patched for current torch.",
    )
    parser.add_argument(
        "--level",
        choices=("auto", "triton", "cuda"),
        default="auto",
        help=(
            "triton: MegaBlocks' Triton kernels, for torch's grouped_mm. cuda: also its extension and grouped_gemm, "
            "which take nvcc. auto: the most that is possible (default)"
        ),
    )
    parser.add_argument(
        "--arch", help="compute capabilities to build for, as '9.0' or '8.0;9.0' (default: the GPUs here)"
    )
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="compilers at a time")
    parser.add_argument(
        "--gemm", choices=("cutlass", "cublas"), default="cutlass", help="what grouped_gemm is built on"
    )
    parser.add_argument(
        "--force", action="store_true", help="install again what is there, for example after a new torch"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--check", action="store_true", help="install nothing, only check")
    parser.add_argument("--logs", type=Path, help="folder for the compilers' words (default: a new private one)")
    arguments = parser.parse_args(argv)
    if arguments.logs is None:  # a predictable name in a shared folder could be someone else's
        arguments.logs = Path(tempfile.mkdtemp(prefix="moe-param-install-"))

    here = look()
    todo = plan(here, arguments.level, arguments.arch, arguments.jobs, arguments.gemm, arguments.force)
    versions = ", ".join(f"{name} {version}" for name, version in here.installed.items())
    print(f"here: {versions}; nvcc {here.nvcc or 'none'}; GPU {', '.join(here.gpus) or 'none'}")
    if arguments.check:
        level = "cuda" if arguments.level == "cuda" or (here.extensions and arguments.level == "auto") else "triton"
        return 0 if check(level, arguments.logs) else 1
    for note in todo.notes:
        print(f"note: {note}")
    if todo.missing:
        for line in todo.missing:
            print(f"missing: {line}", file=sys.stderr)
        return 1
    if arguments.dry_run:
        for step in todo.steps:
            print(f"# {step.title}\n{step}")
        print(f"# then: check, level {todo.level}" + ("" if todo.steps else " (everything is installed)"))
        return 0
    install(todo.steps, arguments.logs)
    print(f"checking, level {todo.level}:", flush=True)
    return 0 if check(todo.level, arguments.logs) else 1


if __name__ == "__main__":
    sys.exit(main())
