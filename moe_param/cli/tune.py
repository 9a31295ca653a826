"""`moe-param tune`: the numbers of a base."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """See `moe_param.tuning.sweep`."""
    from moe_param.tuning.sweep import main as command

    command(list(argv))
