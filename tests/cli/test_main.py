"""`moe-param`: the commands, and one line for what the user can put right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from moe_param.cli import main as cli
from moe_param.errors import InputError
from tests.cli.program import run

PROGRAM = [sys.executable, "-m", "moe_param.cli.main"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_file_and_help(name: str) -> None:
    assert callable(import_module(f"moe_param.cli.{name.replace('-', '_')}").main)
    assert name in run("--help").stdout
    result = run(name, "--help")
    assert result.exit_code == 0 and "usage: moe-param" in result.stdout and not result.stderr


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from moe_param.cli.main import main; main(['--help']); "
        "sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True).returncode == 0


def test_unknown_names_are_told_with_the_nearest() -> None:
    for arguments, message in (
        (("explian",), "did you mean 'explain'?"),
        (("explain", "mixtral", "--bse", "width=512"), "unknown argument '--bse' (did you mean '--base'?)"),
        (("explain",), "CONFIG is missing"),
        (("explain", "mixtral", "--init_std", "small"), "invalid float value: 'small'"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr


def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(argv: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'optuna.storages'", name="optuna.storages")

    monkeypatch.setattr("moe_param.cli.explain.main", command)
    result = run("explain")
    assert result.exit_code == 2 and "pip install 'moe-param[tune]'" in result.stderr

    def bug(argv: list[str]) -> None:
        raise ModuleNotFoundError("No module named 'torhc'", name="torhc")

    monkeypatch.setattr("moe_param.cli.explain.main", bug)
    with pytest.raises(ModuleNotFoundError):
        run("explain")


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(argv: list[str]) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("moe_param.cli.explain.main", bug)
    with pytest.raises(KeyError):
        run("explain")


def test_other_processes_of_a_launch_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(argv: list[str]) -> None:
        raise InputError("no")

    monkeypatch.setattr("moe_param.cli.explain.main", wrong)
    monkeypatch.setenv("RANK", "1")
    result = run("explain")
    assert result.exit_code == 2 and not result.stderr
    monkeypatch.setenv("RANK", "0")
    assert run("explain").stderr == "moe-param explain: error: no\n"


def test_an_interrupt_is_one_line(tmp_path: Path) -> None:
    """A real Ctrl-C in a real process, while it works."""
    ready = tmp_path / "ready"
    code = (
        "import sys, time, pathlib\n"
        "from moe_param.cli import main\n"
        "def work():\n"
        f"    pathlib.Path({str(ready)!r}).touch()\n"
        "    time.sleep(60)\n"
        "main.guarded('moe-param x', work)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while not ready.exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.count("\n") == 1 and err.startswith("moe-param x: interrupted")


def test_the_installer_is_found_and_takes_its_arguments() -> None:
    result = run("install-kernels", "--level", "triton", "--dry-run")
    assert result.exit_code == 0 and result.stdout.startswith("here: torch ")
