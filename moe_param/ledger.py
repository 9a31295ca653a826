"""A file of finished runs: JSON lines, one a run. A command adds to it, and the same command later goes on from it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_param.errors import InputError


def fingerprint(settings: Mapping[str, Any]) -> str:
    """What settings a run was made with, in 64 characters: sha256 of their JSON, in which order does not matter."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file, none where there is no file; a last one cut short by a kill is left out.

    Raises:
        InputError: a line that is complete and no JSON; file and line are named.
    """
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                raise InputError(
                    f"{path}, line {number} is no JSON: delete that line to run what it held again"
                ) from None
    return found


def read_finished(path: Path) -> list[dict[str, Any]]:
    """The finished runs in a file, which is made where there is none; what a kill left of a line is cut off it.

    Raises:
        InputError: as `read_lines`.
    """
    path.touch()
    found = read_lines(path)
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # the next line must not run into it
    return found


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Adds one finished run.

    Raises:
        InputError: the file was removed since it was read, and what it held with it.
    """
    try:
        with path.open("r+", encoding="utf-8") as file:  # never a new one
            file.seek(0, os.SEEK_END)
            file.write(json.dumps(line) + "\n")
    except FileNotFoundError:
        raise InputError(f"{path} was removed while runs were added to it: start again") from None
