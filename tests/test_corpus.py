"""The standard library as a corpus: splits by file, windows of bytes below a vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moe_param.corpus import byte_windows, stdlib_files, stdlib_split
from moe_param.errors import InputError


def test_stdlib_split_is_by_file_disjoint_and_complete() -> None:
    train, held_out = (dict(part) for part in stdlib_split(0.05))
    assert not train.keys() & held_out.keys()
    assert train.keys() | held_out.keys() == dict(stdlib_files()).keys()
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.1
    assert not any("site-packages" in name or "/test/" in f"/{name}" for name in train | held_out)


def test_stdlib_side_of_a_file_depends_on_its_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = dict(stdlib_split(0.05)[1])
    files = stdlib_files()
    monkeypatch.setattr("moe_param.corpus.stdlib_files", lambda: files[::2])
    assert dict(stdlib_split(0.05)[1]).keys() == held_out.keys() & dict(files[::2]).keys()


def test_windows_are_text_and_the_seed_decides_which() -> None:
    files = [path for _, path in stdlib_files()]
    ids = byte_windows(files, 6, 40, seed=1)
    assert ids.shape == (6, 40) and ids.dtype == np.int64 and ids.max() < 256
    assert np.array_equal(ids, byte_windows(files, 6, 40, seed=1))
    assert not np.array_equal(ids, byte_windows(files, 6, 40, seed=2))
    assert any(bytes(ids[0].tolist()) in path.read_bytes() for path in files)


def test_a_small_vocabulary_gets_ascii(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("déjà vu " * 20, "utf-8")
    assert byte_windows([file], 4, 32, seed=0).max() >= 128
    assert byte_windows([file], 4, 32, seed=0, vocabulary=128).max() < 128
    with pytest.raises(InputError, match="at least 128 ids, the model has 100"):
        byte_windows([file], 4, 32, seed=0, vocabulary=100)
    with pytest.raises(InputError, match=r"text\.txt: no text of 1000 bytes"):
        byte_windows([file], 4, 1000, seed=0)
