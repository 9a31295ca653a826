"""The Python standard library's sources: real text on every machine, without a download."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np

from moe_param.errors import InputError

# Installed packages differ by machine, test suites are not in every distribution, codec tables are not text.
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})


def stdlib_files() -> list[tuple[str, Path]]:
    """(relative path, file) of the standard library's sources, in the same order on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    return [(name, path) for name, path in files if STDLIB_SKIPPED.isdisjoint(name.split("/"))]


def stdlib_split(fraction: float) -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
    """Whole files, training and held out. A file's side depends on its name only, not on the other files."""
    files = stdlib_files()
    held_out = [held_out_by_hash(name, fraction) for name, _ in files]
    if not any(held_out) or all(held_out):
        root = sysconfig.get_paths()["stdlib"]
        raise InputError(f"stdlib: too few .py files ({len(files)}) under {root}: use train_files instead")
    return [f for f, out in zip(files, held_out) if not out], [f for f, out in zip(files, held_out) if out]


def held_out_by_hash(key: str, fraction: float) -> bool:
    """Whether what is named `key` is among the `fraction` held out: the same answer everywhere."""
    digest = hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def document_bytes(text: str) -> np.ndarray:
    """UTF-8 bytes as ids 0–255; byte 0, which does not occur in text, closes the document."""
    return np.frombuffer(text.encode(errors="replace") + b"\0", np.uint8)


def byte_windows(documents: list[Path], rows: int, length: int, *, seed: int, vocabulary: int = 256) -> np.ndarray:
    """Windows of text, each from a place in a document that the seed draws.

    Args:
        documents: files to draw from; one shorter than `length` is not drawn.
        vocabulary: ids the model has. With fewer than 256, bytes outside ASCII are left out.

    Returns:
        (rows, length) int64 ids below min(256, vocabulary).

    Raises:
        InputError: a vocabulary that does not hold ASCII, or no document that is long enough.
    """
    if vocabulary < 128:
        raise InputError(f"text as bytes needs a vocabulary of at least 128 ids, the model has {vocabulary}: give ids")
    random = np.random.default_rng(seed)
    left = list(documents)
    found: list[np.ndarray] = []
    while len(found) < rows and left:
        at = int(random.integers(len(left)))
        ids = np.frombuffer(left[at].read_bytes(), np.uint8)
        ids = ids[ids < 128] if vocabulary < 256 else ids
        if len(ids) < length:
            left.pop(at)
            continue
        start = int(random.integers(len(ids) - length + 1))
        found.append(ids[start : start + length])
    if not found:
        raise InputError(f"{documents[0] if documents else 'stdlib'}: no text of {length} bytes in it")
    return np.stack(found).astype(np.int64)
