"""`moe-param transfer`: that the numbers of a base hold at larger sizes."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """See `moe_param.tuning.transfer`."""
    from moe_param.tuning.transfer import main as command

    command(list(argv))
