"""The file of finished runs: cut lines, lines of something else, a file that is removed under a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_param.errors import InputError
from moe_param.ledger import append, fingerprint, read_finished


def test_a_line_cut_by_a_kill_is_gone_and_the_next_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert read_finished(path) == []
    append(path, {"run": 1})
    path.write_text(path.read_text() + '{"run": 2, "lo')
    assert read_finished(path) == [{"run": 1}]
    append(path, {"run": 3})
    assert read_finished(path) == [{"run": 1}, {"run": 3}]


def test_what_is_no_run_and_a_removed_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text('{"run": 1}\n{"run": {"run": 2}\n')
    with pytest.raises(InputError, match=r"runs\.jsonl, line 2"):
        read_finished(path)
    path.unlink()
    with pytest.raises(InputError, match="was removed"):
        append(path, {"run": 1})
    assert not path.exists()


def test_fingerprints_tell_settings_apart_and_not_their_order() -> None:
    assert fingerprint({"a": 1, "b": [2.0]}) == fingerprint({"b": [2.0], "a": 1})
    assert len({fingerprint({"a": value}) for value in (1, 1.5, "1", None, [1])}) == 5
