"""`python -m recipes.bench.gpu.wheels --out DIR` (`make gpu-wheels`): collects what a machine without network may lack.

Wheels for its Python and platform of what pyproject.toml asks for and of what that depends on, less what is `ASSUMED`
there, and the sources of MegaBlocks and grouped_gemm, which are installed or built on the spot.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from patches.install import GROUPED_GEMM, MEGABLOCKS, STK
from recipes.bench.gpu.packages import ROOT, needed, requirements_of

ASSUMED = (
    *("torch", "triton", "transformers", "huggingface-hub", "tokenizers", "numpy", "scipy", "pandas", "pyarrow"),
    *("matplotlib", "tensorboard", "pip"),
)
"""What a machine for deep learning has. What they depend on is there with them. All of it together would not be carried
in 60 MB."""
EXTRA = ("typer", "ninja", "setuptools", "wheel", "tqdm", "hf-xet")
"""What else was missed on such machines, and what builds the sources."""
SOURCES = (STK, MEGABLOCKS, GROUPED_GEMM)
MOST = 60
"""Megabytes of the whole folder."""
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


class CannotCollect(Exception):
    """What is to be collected is not to be had, or too large."""


def collect(folder: Path, python: str, machine: str) -> list[Path]:
    """Fills the folder, and returns what is in it.

    Raises:
        CannotCollect: no such wheel for this Python and platform, or more than the folder may hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left: dict[str, Requirement] = {}
    for requirement in [*needed(), *map(Requirement, EXTRA)]:
        left.setdefault(canonicalize_name(requirement.name), requirement)
    known = set(ASSUMED)
    while todo := {name: requirement for name, requirement in left.items() if name not in known}:
        left = {}
        fetched = wheels_of(todo.values(), folder, python, machine)
        known |= set(todo)
        for wheel in fetched:
            for requirement in requirements_of(wheel, markers(python, machine)):
                left.setdefault(canonicalize_name(requirement.name), requirement)
    sources(folder)
    found = sorted(folder.iterdir(), key=lambda path: -path.stat().st_size)
    size = sum(path.stat().st_size for path in found) / 1e6
    if size > MOST:
        large = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.0f}" for path in found[:3])
        raise CannotCollect(f"{folder} holds {size:.0f} MB, {MOST} are allowed. The largest: {large}")
    return found


def markers(python: str, machine: str) -> dict[str, str]:
    """The other machine, as the markers of requirements ask for it."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": machine,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }


def wheels_of(requirements: Iterable[Requirement], folder: Path, python: str, machine: str) -> list[Path]:
    """One wheel for each, without what they depend on: pip would follow it into torch."""
    before = set(folder.glob("*.whl"))
    names = [f"{requirement.name}{requirement.specifier}" for requirement in requirements]
    platforms = [word for platform in PLATFORMS for word in ("--platform", f"{platform}_{machine}")]
    target = ["--python-version", python, "--implementation", "cp", *platforms, "--only-binary", ":all:"]
    pip_download(["--constraint", str(ROOT / "requirements-tested.txt"), *target, *names], folder)
    return sorted(set(folder.glob("*.whl")) - before)


def sources(folder: Path) -> None:
    """The sources as published. pip asks their setup.py for a name and a version, and that wants a torch with CUDA."""
    with tempfile.TemporaryDirectory() as stub:
        extension = Path(stub) / "torch" / "utils" / "cpp_extension.py"
        extension.parent.mkdir(parents=True)
        for package in (extension.parent, extension.parent.parent):
            (package / "__init__.py").write_text("__version__ = '0'\n")
        extension.write_text(
            "from setuptools import Extension\nfrom setuptools.command.build_ext import build_ext as BuildExtension\n"
            "CUDA_HOME = None\ndef CUDAExtension(name, *args, **kwargs): return Extension(name, [])\n"
        )
        environment = {"PYTHONPATH": stub, "TORCH_CUDA_ARCH_LIST": "9.0"}
        pip_download(["--no-binary", ":all:", "--no-build-isolation", *SOURCES], folder, environment)


def pip_download(arguments: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(folder), *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        raise CannotCollect("\n".join(said))


def main(argv: Sequence[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.gpu.wheels", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/gpu-wheels"), help="the folder")
    parser.add_argument("--python", default=PYTHON, help="version of Python there")
    parser.add_argument("--machine", default="x86_64", help="architecture of the processor there")
    arguments = parser.parse_args(argv)
    try:
        found = collect(arguments.out, arguments.python, arguments.machine)
    except CannotCollect as error:
        raise SystemExit(str(error)) from None
    print(f"{len(found)} files, {sum(path.stat().st_size for path in found) / 1e6:.1f} MB in {arguments.out}")
    return found


if __name__ == "__main__":
    main()
