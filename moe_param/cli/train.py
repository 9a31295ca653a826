"""`moe-param train`: a model at any size, with the numbers of its base."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """See `moe_param.training.pretrain`."""
    from moe_param.training.pretrain import main as command

    command(list(argv))
