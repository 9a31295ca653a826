"""What a machine has: device, versions, compilers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def look() -> dict[str, Any]:
    """Facts for the report, None for what is not there."""
    cuda = torch.cuda.is_available()
    facts = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "device": facts.name if facts else None,
        "capability": f"{facts.major}.{facts.minor}" if facts else None,
        "GPU memory, GiB": round(facts.total_memory / 2**30, 1) if facts else None,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "CUDA of torch": torch.version.cuda,
        "nvcc": said(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version"),
        "g++": said(os.environ.get("CXX", "g++"), "-dumpversion"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in ("torch", "triton", "transformers", "numpy", "megablocks")},
    }


def said(*command: str) -> str | None:
    """The last line of a program's output; None where there is no such program, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[-1] if lines and not done.returncode else None


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
