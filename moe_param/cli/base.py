"""`moe-param base`: where to tune. Sizes that divide for a config, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_param.cli.configs import CONFIG_HELP, load_config
from moe_param.parsing import parse


@dataclass
class BaseArguments:
    """What `moe-param base` can be told."""

    config: str = field(metadata={"help": CONFIG_HELP})
    cost: float = field(default=0.01, metadata={"help": "Share of the target's FLOPs that a base may cost."})
    json: bool = field(default=False, metadata={"help": "JSON instead of a table."})


def main(argv: Sequence[str]) -> None:
    """Bases for a config at its sparsity and head_dim, with their parameters and their share of the target's FLOPs."""
    (args,) = parse([BaseArguments], argv, prog="moe-param base", description=main.__doc__, config=CONFIG_HELP)
    from transformers.utils import logging

    import moe_param

    logging.set_verbosity_error()
    found = moe_param.suggest_base(load_config(args.config), cost=args.cost)
    print(json.dumps(found.to_dict(), indent=2) if args.json else found)
