"""Adds what the machine lacks to the private folder, and says what it has: `python -m recipes.bench.gpu.setup`.

Before any step, in a process that already has that folder on its path.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patches.check import cannot_interpret
from recipes.bench.gpu import packages

KERNELS_IN, KERNELS = "megablocks", ("--level", "triton")
"""The package of the Triton kernels, and how much of it `patches.install` is to install."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.gpu.setup", description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, required=True, help="the folder that `make gpu-wheels` filled")
    parser.add_argument("--target", type=Path, required=True, help="where to install")
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    arguments = parser.parse_args(argv)

    if os.environ.get("TRITON_INTERPRET") == "1" and (reason := cannot_interpret()):
        raise SystemExit(reason)
    before = packages.installed()
    todo = packages.missing(packages.needed(), packages.wheels_here(arguments.wheels), before)
    if todo["install"]:
        packages.install(todo["install"].values(), arguments.target)
    kernels = None
    if importlib.util.find_spec(KERNELS_IN) is None:
        kernels = install_kernels(arguments.wheels, arguments.target)
    importlib.invalidate_caches()

    from recipes.bench.gpu import machine  # torch, only now

    after = packages.installed()
    report = {
        "machine": machine.look(),
        "packages": {
            one.name: {"needed": str(one.specifier), "here": after.get(packages.canonicalize_name(one.name))}
            for one in packages.needed()
        },
        "installed": {name: wheel.name for name, wheel in todo["install"].items()},
        "lacking": todo["lacking"],
        "kernels": kernels,
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return report


def install_kernels(wheels: Path, target: Path) -> str:
    """MegaBlocks' Triton kernels from their sources among the wheels; what the installer's check said at last."""
    done = subprocess.run(
        [sys.executable, "-m", "patches.install", *KERNELS, "--logs", str(target.with_name("setup.logs"))],
        env={**os.environ, **from_wheels(wheels, target)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    return ("installed. " if done.returncode == 0 else "FAILED: ") + done.stdout.strip().splitlines()[-1].strip()


def from_wheels(wheels: Path, target: Path) -> dict[str, str]:
    """The environment in which pip installs from a folder into a folder, without network."""
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels.resolve()),
        "PIP_TARGET": str(target.resolve()),
        "PIP_UPGRADE": "1",  # else a target that holds an older build keeps it
    }


if __name__ == "__main__":
    main()
