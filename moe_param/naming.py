"""What an error says about a name that is not known: the name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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
