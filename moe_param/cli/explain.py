"""`moe-param explain`: what the parameterization does to every parameter, from configs alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_param.cli.configs import CONFIG_HELP, YAML, is_shape, load_config, scaled, sizes
from moe_param.errors import InputError
from moe_param.parsing import parse

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from moe_param.parameterization import Parameterization


@dataclass
class ExplainArguments:
    """What `moe-param explain` can be told."""

    config: str = field(metadata={"help": CONFIG_HELP})
    base: str | None = field(
        default=None,
        metadata={
            "help": "Shape the hyperparameters were found at: width=512,depth=8,num_experts=8,top_k=2,expert_size=1024 "
            "(sizes that are not given stay the config's; top_k follows num_experts), or a config as above. "
            "Not needed for a model that is parameterized already."
        },
    )
    target: str | None = field(
        default=None, metadata={"help": "Shape to train, given like --base. Default: the config as it is."}
    )
    spec: str | None = field(
        default=None, metadata={"help": "Parameterization: a preset or a YAML file. Default: moe-completep."}
    )
    init_std: float | None = field(
        default=None, metadata={"help": "Std of the base's random initialization. Default: transformers' own."}
    )
    json: bool = field(default=False, metadata={"help": "JSON instead of a table."})
    full: bool = field(default=False, metadata={"help": "One line per parameter, not per role and rule."})
    allow_sparsity_change: bool = field(
        default=False, metadata={"help": "Let top_k / num_experts differ from the base's."}
    )
    only: str | None = field(
        default=None, metadata={"help": "text: leave the other towers of a model (vision, audio) alone."}
    )


def main(argv: Sequence[str]) -> None:
    """Works from configs alone: no weights are loaded or built, so a model of any size is explained in seconds."""
    (args,) = parse([ExplainArguments], argv, prog="moe-param explain", description=main.__doc__, config=CONFIG_HELP)
    from transformers.utils import logging

    from moe_param.structure.known import unfamiliar

    logging.set_verbosity_error()
    config = load_config(args.config)
    if (line := unfamiliar(config)) is not None:
        print(f"warning: {line}", file=sys.stderr)
    if args.base is None and Path(args.config).suffix not in YAML:
        show(recorded(config, args), config, recorded=True, args=args)
    else:
        show(planned(config, args), config, recorded=False, args=args)


def recorded(config: PretrainedConfig, args: ExplainArguments) -> Parameterization:
    """What the config of a parameterized model says."""
    from moe_param.parameterization import Parameterization

    if getattr(config, "moe_param", None) is None:
        raise InputError(
            f"{args.config} is not parameterized yet: give the shape its hyperparameters were found at, "
            "for example --base width=512,depth=8"
        )
    needing = {
        "--target": args.target,
        "--spec": args.spec,
        "--init_std": args.init_std,
        "--allow_sparsity_change": args.allow_sparsity_change or None,
        "--only": args.only,
    }
    given = [name for name, value in needing.items() if value is not None]
    if given:
        raise InputError(
            f"{given[0]} needs --base: without it, what is recorded in the config of {args.config} is shown"
        )
    return Parameterization.from_dict(config.moe_param)


def planned(config: PretrainedConfig, args: ExplainArguments) -> Parameterization:
    """What `apply` would do."""
    from moe_param.applying import plan
    from moe_param.structure.trace import model_class_for
    from moe_param.tuned import read_tuned

    base: Any = Path(args.config) if args.base is None else scaled(config, "--base", args.base)
    if (
        args.target is not None and args.base is None and is_shape(args.target)
    ):  # as `--shape` beside a file in training
        config = read_tuned(base, sizes("--target", args.target)).target
    elif args.target is not None:
        config = scaled(config, "--target", args.target)
    return plan(
        model_class_for(config),
        config,
        base,
        spec=args.spec,
        init_std=args.init_std,
        allow_sparsity_change=args.allow_sparsity_change,
        only=args.only,
    )


def show(
    parameterization: Parameterization, config: PretrainedConfig, *, recorded: bool, args: ExplainArguments
) -> None:
    """A table, or JSON."""
    from rich.console import Console

    from moe_param.explain import regimes, rich_table

    if args.json:
        document: dict[str, Any] = {
            "model_type": config.model_type,
            "spec": parameterization.spec.name,
            "recorded": recorded,
            "base_shape": asdict(parameterization.base_shape),
            "shape": asdict(parameterization.shape),
            "init_std": parameterization.init_std,
            "regime": regimes(parameterization),
            "rows": parameterization.rows(args.full),
        }
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return
    console = Console()
    if console.is_terminal:
        narrow = not args.full and console.width < 140
        console.print(rich_table(parameterization, args.full, narrow=narrow))
    else:
        print(parameterization.table(args.full))
