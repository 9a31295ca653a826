"""What an error says about a name that is not known."""

from __future__ import annotations

from moe_param.naming import LISTED, nearest


def test_the_close_name_then_all_names_then_none() -> None:
    assert nearest("widht", ["width", "depth"]) == " (did you mean 'width'?)"
    assert nearest("zzz", ["width", "depth"]) == " (valid: width, depth)"
    assert nearest("zzz", (f"name{i}" for i in range(LISTED + 1))) == ""
    assert nearest("zzz", []) == ""
