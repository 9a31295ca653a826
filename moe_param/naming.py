"""Names as they are typed: which one was probably meant, and sizes by name (`width=4,depth=2`)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import TypeVar

from moe_param.errors import InputError, MoeParamError

LISTED = 20
"""So many names are listed in an error; more of them would hide it."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: ` (did you mean 'width'?)`, else ` (valid: width, depth)`, else nothing.

    The names are listed where none is close, and left out where they are more than `LISTED`. Begins with a space.
    """
    names = tuple(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (valid: {', '.join(names)})" if 0 < len(names) <= LISTED else ""


def check_known(
    names: Iterable[object], valid: Iterable[str], kind: str, where: str, error: type[MoeParamError]
) -> None:
    """Raises `error` for the first of `names` that is not valid: `where: unknown kind 'name'`, and the nearest."""
    valid = tuple(valid)
    for name in names:
        if name not in valid:
            raise error(f"{where}: unknown {kind} {name!r}{nearest(str(name), valid)}")


Number = TypeVar("Number", int, float)


def parse_sizes(text: str, valid: Iterable[str], number: type[Number], *, option: str) -> dict[str, Number]:
    """What `width=4,depth=2` says: every name once, every value a positive number; spaces do not matter.

    Args:
        valid: the names that may occur.
        number: int where only whole numbers make sense, else float (a factor).
        option: what was given, e.g. `--base`; every message begins with it.

    Raises:
        InputError: no NAME=VALUE, an unknown name, one given twice, a value that is not such a number.
    """
    names = tuple(valid)
    kind = "a whole number above 0" if number is int else "a number above 0"
    found: dict[str, Number] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise InputError(f"{option}: {item.strip()!r} is not NAME=VALUE, e.g. {names[0]}=4")
        if name not in names:
            raise InputError(f"{option}: unknown size {name!r}{nearest(name, names)}")
        if name in found:
            raise InputError(f"{option}: {name} is given twice")
        try:
            found[name] = number(value)
        except ValueError:
            found[name] = number(0)
        if not 0 < found[name] < math.inf:
            raise InputError(f"{option}: {name} must be {kind}, got {value!r}")
    return found
