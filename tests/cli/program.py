"""Runs `moe-param` in this process, and what came of it."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_param.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a shell would see."""

    exit_code: int
    stdout: str
    stderr: str


def run(*arguments: str | Path) -> Result:
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _warnings_as_before():
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Result(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _warnings_as_before() -> Iterator[None]:
    with warnings.catch_warnings():  # the program sets how they are shown
        warnings.simplefilter("always")
        yield
