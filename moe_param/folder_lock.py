"""One command at a time on an output folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from moe_param.errors import InputError

LOCK, HOLDER = ".lock", ".lock-holder"
"""The locked file, and who locked it: in a file of its own, as versions of filelock differ in what they leave of it."""


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Holds `folder` (made if there is none) for this process while it does `what`, e.g. "training".

    The system frees the lock when the process ends, however it ends.

    Raises:
        InputError: another command holds the folder (the message says which, on which host, its process, since
            when), or the folder cannot be made or written to.
    """
    holder = folder / HOLDER
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        holder.write_text(
            f"{what} on {socket.gethostname()}, process {os.getpid()}, since {datetime.now():%Y-%m-%d %H:%M:%S}",
            "utf-8",
        )
    except Timeout:
        found = holder.read_text("utf-8") if holder.exists() else "another command"
        raise InputError(f"{folder} is in use ({found}): wait for it or end it, or give another folder") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}): give another folder") from error
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
