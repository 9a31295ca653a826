"""Names as they are typed."""

from __future__ import annotations

import pytest

from moe_param.errors import InputError
from moe_param.naming import LISTED, nearest, parse_sizes


def test_the_close_name_then_all_names_then_none() -> None:
    assert nearest("widht", ["width", "depth"]) == " (did you mean 'width'?)"
    assert nearest("zzz", ["width", "depth"]) == " (valid: width, depth)"
    assert nearest("zzz", (f"name{i}" for i in range(LISTED + 1))) == ""
    assert nearest("zzz", []) == ""


def test_sizes_by_name() -> None:
    assert parse_sizes("width=4, depth = 2", ["width", "depth"], int, option="--base") == {"width": 4, "depth": 2}
    assert parse_sizes("width=0.5", ["width", "depth"], float, option="axes") == {"width": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width", "--base: 'width' is not NAME=VALUE, e.g. width=4"),
        ("width=4,", "--base: '' is not NAME=VALUE, e.g. width=4"),
        ("widht=4", r"--base: unknown size 'widht' \(did you mean 'width'\?\)"),
        ("width=4,width=8", "--base: width is given twice"),
        ("width=4.5", "--base: width must be a whole number above 0, got '4.5'"),
        ("width=-4", "--base: width must be a whole number above 0, got '-4'"),
        ("width=", "--base: width must be a whole number above 0, got ''"),
    ],
)
def test_sizes_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        parse_sizes(text, ["width", "depth"], int, option="--base")


def test_factors_are_finite() -> None:
    with pytest.raises(InputError, match="axes: width must be a number above 0, got 'inf'"):
        parse_sizes("width=inf", ["width"], float, option="axes")
    with pytest.raises(InputError, match="got 'nan'"):
        parse_sizes("width=nan", ["width"], float, option="axes")
