"""Runs a command that ends with whoever started it: `python -m recipes.bench.gpu.guard COMMAND …`.

The starter makes this the first process of a session and holds the other end of its standard input. When the starter
is gone, however it went, that end is closed, and the session is killed: no step may go on using the GPU unseen.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    def watch() -> None:
        os.read(0, 1)  # nothing is ever written: it returns when the other end is closed
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    code = subprocess.run(command, stdin=subprocess.DEVNULL).returncode
    return code if code >= 0 else 128 - code  # as a shell says that a signal ended it


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
