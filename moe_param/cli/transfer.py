"""`moe-param transfer`: that the numbers of a base hold at larger sizes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """See `moe_param.tuning.transfer`."""
    from rich.console import Console

    from moe_param.parsing import parse
    from moe_param.tuning.transfer import CONFIG, TransferArguments, plan_runs, run_transfer

    (args,) = parse([TransferArguments], argv, prog="moe-param transfer", config=CONFIG)
    console = Console()
    report = run_transfer(args, plan_runs(args), shlex.join(["moe-param", "transfer", *argv]), console)
    console.print(report)
    console.print(f"{Path(args.output_dir) / 'transfer.html'}, and the numbers in transfer.json", soft_wrap=True)
