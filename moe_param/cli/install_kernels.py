"""`moe-param install-kernels`: MegaBlocks' kernels, built and checked for this machine."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path

from moe_param.errors import InputError


def main(argv: Sequence[str]) -> int:
    """Runs `patches/install.py`, which has its own arguments: see `moe-param install-kernels --help`."""
    program = runpy.run_path(str(installer()))
    return int(program["main"](list(argv)))


def installer() -> Path:
    """The installer: in the package where it was installed from a wheel, beside it in a checkout.

    Raises:
        InputError: in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "patches", package.parent / "patches"):
        if (folder / "install.py").is_file():
            return folder / "install.py"
    raise InputError(f"the installer is not in {package}: install moe-param from its wheel, or run in a checkout")
