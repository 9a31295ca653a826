"""Checkpoints that are whole or not there: written aside, listed in a manifest, then renamed into place.

A folder `checkpoint-N` appears by one rename, after every file in it has reached the disk. Its manifest holds the size
and checksum of each file, so that what happens to it later (a full disk's truncation, a bad copy) is seen on resuming.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

from moe_param.errors import MoeParamError

logger = logging.getLogger(__name__)

MANIFEST, PROGRESS = "manifest.json", "progress.json"
STAGING = "unfinished"
"""Folder in output_dir where a checkpoint is written; what is in it after a crash is worthless."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(MoeParamError):
    """A checkpoint that cannot be written, or that does not belong to the run."""


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def publish(staged: Path, final: Path) -> None:
    """Seals a written folder with its manifest and renames it into place, each step durable before the next."""
    listing = {}
    for path in _files(staged):
        _sync(path)
        listing[path.relative_to(staged).as_posix()] = [path.stat().st_size, _checksum(path)]
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps(listing, indent=1) + "\n", "utf-8")
    _sync(manifest)
    for folder in (*(path for path in staged.rglob("*") if path.is_dir()), staged):
        _sync(folder)
    if final.exists():  # of the same step, written before this run was resumed from an earlier one
        shutil.rmtree(final)
    staged.rename(final)
    _sync(final.parent)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing."""
    try:
        listing = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"
    for name, (size, checksum) in listing.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if _checksum(path) != checksum:
            return f"{name} is not what was written (checksum)"
    return None


def checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders, newest step first, good or not."""
    found = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True) if path.is_dir()]


_STEP = re.compile(r"checkpoint-(\d+)")


def last_good(output: Path) -> Path | None:
    """The newest whole checkpoint. Newer ones that are damaged are said, and put aside as `damaged-checkpoint-N`."""
    bad: list[str] = []
    for path in checkpoints(output):
        wrong = problem(path)
        if wrong is None:
            if bad:
                logger.warning("%s: going on from %s, and putting them aside", "; ".join(bad), path.name)
            for other in checkpoints(output)[: len(bad)]:
                aside = other.with_name(f"damaged-{other.name}")
                shutil.rmtree(aside, ignore_errors=True)
                other.rename(aside)
            return path
        bad.append(f"{path.name} is damaged ({wrong})")
    if bad:
        raise CheckpointError(
            f"{output}: no checkpoint is whole: {'; '.join(bad)}; start again in another --output_dir"
        )
    return None


def read_progress(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / PROGRESS).read_text("utf-8"))


def check_progress(checkpoint: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint holds of the run, refused where going on would show other samples than it would have seen."""
    saved = read_progress(checkpoint)
    changed = [
        f"{key} {saved['facts'].get(key)}, not {value}"
        for key, value in facts.items()
        if saved["facts"].get(key) != value
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint} was written with {'; '.join(changed)}: the run would not go on with the samples it was to "
            "see. Keep them (--batch_tokens keeps the batch on another number of processes), or start a new run"
        )
    return saved


def reason(error: BaseException) -> str:
    """One line, with the system's own words where there are any: libraries wrap ENOSPC in errors of theirs."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        failures = getattr(seen, "failures", None)  # torch's CheckpointException: rank -> (error, its traceback)
        seen = next(iter(failures.values()))[0] if failures else seen.__cause__ or seen.__context__
        error = seen if failures and seen is not None else error
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
