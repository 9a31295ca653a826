"""`moe-param transfer`: that the numbers of a base hold at larger sizes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """See `moe_param.tuning.transfer`."""
    from moe_param.parsing import parse
    from moe_param.tuning.transfer import CONFIG, TransferArguments, transfer

    (args,) = parse([TransferArguments], argv, prog="moe-param transfer", config=CONFIG)
    transfer(args, command=shlex.join(["moe-param", "transfer", *argv]))
