"""`moe-param coord-check`: do activations move by the same amount at every size?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe_param.cli.configs import CONFIG_HELP, load_config, scaled
from moe_param.cli.parsing import parse
from moe_param.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from moe_param.checks.coordinates import CoordCheck


@dataclass
class CoordCheckArguments:
    """What `moe-param coord-check` can be told."""

    config: str = field(metadata={"help": CONFIG_HELP})
    base: str = field(
        metadata={"help": "Where factor 1 stands: width=64,depth=2,num_experts=8,expert_size=64, or a config."}
    )
    out: str = field(metadata={"help": "Folder for picture, JSON and the log of finished runs (resumes from it)."})
    axis: list[str] | None = field(
        default=None, metadata={"help": "One or more of width, depth, num_experts, expert_size. Default: all."}
    )
    factors: str = field(default="1,2,4,8", metadata={"help": "Multiples of the base's size along the axis."})
    spec: str | None = field(
        default=None, metadata={"help": "Parameterization: a preset or a YAML file. Default: moe-completep."}
    )
    steps: int = field(default=5, metadata={"help": "AdamW steps."})
    seeds: int = field(default=3, metadata={"help": "Initializations."})
    lr: float = field(default=2**-8, metadata={"help": "The one learning rate of all runs."})
    tokens: str | None = field(
        default=None, metadata={"help": "Token ids to train on: a .npy file, (batch, length). Default: random ids."}
    )
    processes: int = field(default=1, metadata={"help": "Runs at a time, at most one per core."})


def main(argv: Sequence[str]) -> int:
    """Trains the architecture at several sizes for a few steps. Writes AXIS.png and AXIS.json to the folder.

    Exit code 1 if a quantity grows or vanishes.
    """
    (args,) = parse(
        [CoordCheckArguments], argv, prog="moe-param coord-check", description=main.__doc__, config=CONFIG_HELP
    )
    from rich.console import Console
    from transformers.utils import logging

    from moe_param.checks.coordinates import coord_check
    from moe_param.scaling.spec import DEFAULT_SPEC
    from moe_param.structure.shape import AXES, Shape

    logging.set_verbosity_error()
    config = load_config(args.config)
    shape = Shape.from_config(scaled(config, "--base", args.base))
    multiples, batch, out = factors(args.factors), read_tokens(args.tokens), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    console, passed = Console(), True
    for name in args.axis or AXES:
        result = coord_check(
            config,
            shape,
            axis=name,
            factors=multiples,
            spec=args.spec or DEFAULT_SPEC,
            steps=args.steps,
            seeds=args.seeds,
            lr=args.lr,
            batch=batch,
            processes=args.processes,
            resume=out / "finished.jsonl",
            progress=True,
        )
        result.plot(out / f"{name}.png")
        result.to_json(out / f"{name}.json")
        passed = passed and result.passed
        console.print(table(result))
    console.print(f"pictures and numbers are in {out}")
    return 0 if passed else 1


def factors(text: str) -> list[float]:
    """'1,2,4' -> [1.0, 2.0, 4.0]."""
    try:
        return [float(factor) for factor in text.split(",")]
    except ValueError:
        raise InputError(f"--factors: numbers with commas between them, got {text!r}") from None


def read_tokens(path: str | None) -> Tensor | None:
    """The ids in a .npy file, (batch, length)."""
    if path is None:
        return None
    import numpy
    import torch

    batch = torch.from_numpy(numpy.load(path)).long()
    if batch.dim() != 2:
        raise InputError(f"--tokens: {path} must hold a (batch, length) array, found {tuple(batch.shape)}")
    return batch


def table(result: CoordCheck) -> object:
    """Slopes and verdicts."""
    from rich.table import Table

    found = Table(title=f"{result.spec}, {result.axis}: {'passed' if result.passed else 'FAILED'}")
    for column in ("quantity", "initial size ~", "change ~", "verdict"):
        found.add_column(column)
    slopes = result.slopes
    for quantity, verdict in result.verdicts.items():
        start, change = slopes["init"][quantity], slopes["change"][quantity]
        interval = f" [{change.low:+.2f}, {change.high:+.2f}]" if change.low == change.low else ""
        found.add_row(
            quantity,
            f"{result.axis}^{start.value:+.2f}",
            f"{result.axis}^{change.value:+.2f}{interval}",
            ("ok: " if verdict.passed else "FAILED: ") + verdict.reason,
        )
    return found
