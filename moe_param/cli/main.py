"""`moe-param COMMAND …`: finds the command's file, runs it, and tells in one line what the user can put right.

A command is a file in this folder with a `main(argv)` that returns None or an exit code. Nothing heavy is imported
before the command is known, so `moe-param --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module

from moe_param.errors import MoeParamError
from moe_param.naming import nearest

COMMANDS = {
    "explain": "what the parameterization does to every parameter of a model",
    "base": "bases for a config: sizes that divide, and what they cost",
    "tune": "find the numbers of a base: learning rate, init std, constants",
    "transfer": "see that the numbers of a base hold at larger sizes",
    "train": "train a model at any size with the numbers of its base",
    "coord-check": "see that activations move by the same amount at every size",
    "install-kernels": "build MegaBlocks' kernels for this machine",
}

EXTRAS = {
    **{"datasets": "train", "tensorboard": "train", "optuna": "tune", "psutil": "tune", "sqlalchemy": "tune"},
    "matplotlib": "plots",
}
"""Module -> the extra of this package that brings it."""

USAGE, INTERRUPTED = 2, 130
"""Exit codes of a wrong input and of Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> None:
    """The program. Ends with exit code 0, the command's own, 2 for a wrong input or 130 for an interrupt."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] == "--version":
        from moe_param import __version__

        print(f"moe-param {__version__}")
        return
    if argv[0] not in COMMANDS:
        say("moe-param", "error", f"no command {argv[0]!r}{nearest(argv[0], tuple(COMMANDS))}")
        sys.exit(USAGE)
    run(argv[0], argv[1:])


def usage() -> str:
    """The list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    head = (
        "Hyperparameters of mixture-of-experts transformers that stay put across scale.\n\nusage: moe-param COMMAND …"
    )
    return "\n".join([head, "", *lines, "", "moe-param COMMAND --help says what a command takes."])


def run(name: str, argv: Sequence[str]) -> None:
    """One command, its errors as one line; ends the process unless the command ends well."""
    file = name.replace("-", "_")
    guarded(f"moe-param {name}", lambda: import_module(f"moe_param.cli.{file}").main(list(argv)))


def guarded(prog: str, command: Callable[[], int | None]) -> None:
    """Calls `command`. What the user can put right is one line from the first process; a bug keeps its traceback."""
    warnings.showwarning = lambda message, *_, **__: say(prog, "warning", message)
    try:
        code = command() or 0
    except KeyboardInterrupt as error:  # with what to do next, where a command knows it
        say(prog, "interrupted", str(error) or "the same command goes on from here where it can resume")
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: nothing to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (MoeParamError, OSError, ModuleNotFoundError) as error:
        say(prog, "error", explained(error))
        code = USAGE
    if code:
        sys.exit(code)


def explained(error: Exception) -> str:
    """The line for an error; raises it again where it is a bug of ours."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise error
        return f"{package} is not installed: pip install 'moe-param[{EXTRAS[package]}]'"
    if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.ENOTDIR):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return str(error)


def say(prog: str, kind: str, message: object) -> None:
    """One line on stderr; of the processes of a launched run, the first one's."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{prog}: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
