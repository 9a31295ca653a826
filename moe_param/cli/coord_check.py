"""`moe-param coord-check`: do activations move by the same amount at every size?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe_param.cli.configs import CONFIG_HELP, load_config, scaled
from moe_param.errors import InputError
from moe_param.folder_lock import folder_lock
from moe_param.naming import nearest
from moe_param.parsing import parse

if TYPE_CHECKING:
    from torch import Tensor

    from moe_param.checks.coordinates import CoordCheck

WORDS = {"passed": "passed", "failed": "FAILED", "undecided": "UNDECIDED"}
EXIT_CODES = {"passed": 0, "failed": 1, "undecided": 3}
"""2 is that of a wrong input, for every command."""


@dataclass
class CoordCheckArguments:
    """What `moe-param coord-check` can be told."""

    config: str = field(metadata={"help": CONFIG_HELP})
    base: str = field(
        metadata={"help": "Where factor 1 stands: width=64,depth=2,num_experts=8,expert_size=64, or a config."}
    )
    out: str = field(metadata={"help": "Folder for picture, JSON and the log of finished runs (resumes from it)."})
    axis: list[str] | None = field(
        default=None,
        metadata={"help": "One or more of width, depth, num_experts, expert_size. Default: all it has."},
    )
    factors: str = field(default="1,2,4,8", metadata={"help": "Multiples of the base's size along the axis."})
    spec: str | None = field(
        default=None, metadata={"help": "Parameterization: a preset or a YAML file. Default: moe-completep."}
    )
    steps: int = field(default=5, metadata={"help": "Optimizer steps."})
    seeds: int = field(default=5, metadata={"help": "Initializations and texts; more of them narrow the intervals."})
    lr: float = field(default=2**-8, metadata={"help": "The one learning rate of all runs."})
    optimizer: str = field(default="adamw", metadata={"help": "adamw, or muon: for matrices, AdamW for the rest."})
    matrix_lr_ratio: float | None = field(
        default=None, metadata={"help": "muon: the base's rate of matrices over lr. Default: 1."}
    )
    tokens: str | None = field(
        default=None,
        metadata={
            "help": "What to train on: a .npy file of ids, (batch, length), or a .txt file, read as bytes. Default: "
            "the Python standard library's sources, as bytes."
        },
    )
    processes: int = field(default=1, metadata={"help": "Runs at a time, at most one per core."})


def main(argv: Sequence[str]) -> int:
    """Trains the architecture at several sizes for a few steps. Writes AXIS.png and AXIS.json to the folder.

    Exit code 0 if everything passed, 1 if a quantity grows or vanishes, 3 if more seeds are needed to tell.
    """
    (args,) = parse(
        [CoordCheckArguments], argv, prog="moe-param coord-check", description=main.__doc__, config=CONFIG_HELP
    )
    from rich.console import Console
    from transformers.utils import logging

    from moe_param.checks.coordinates import coord_check
    from moe_param.checks.verdicts import overall
    from moe_param.scaling.spec import DEFAULT_SPEC
    from moe_param.structure.shape import AXES, Shape

    logging.set_verbosity_error()
    for name in args.axis or ():
        if name not in AXES:
            raise InputError(f"--axis: unknown axis {name!r}{nearest(name, AXES)}")
    multiples, out = factors(args.factors), Path(args.out)
    config = load_config(args.config)
    shape = Shape.from_config(scaled(config, "--base", args.base))
    axes = args.axis or shape.axes
    batch = read_tokens(args.tokens, config.get_text_config().vocab_size)
    console, statuses = Console(), []
    with folder_lock(out, "coord-check"):
        for name in axes:
            result = coord_check(
                config,
                shape,
                axis=name,
                factors=multiples,
                spec=args.spec or DEFAULT_SPEC,
                steps=args.steps,
                seeds=args.seeds,
                lr=args.lr,
                optimizer=args.optimizer,
                matrix_lr_ratio=args.matrix_lr_ratio,
                batch=batch,
                processes=args.processes,
                resume=out / "finished.jsonl",
                progress=True,
            )
            result.plot(out / f"{name}.png")
            result.to_json(out / f"{name}.json")
            statuses.append(result.status)
            console.print(table(result))
    console.print(f"pictures and numbers are in {out}")
    return EXIT_CODES[overall(statuses)]


def factors(text: str) -> list[float]:
    """'1,2,4' -> [1.0, 2.0, 4.0]."""
    try:
        return [float(factor) for factor in text.split(",")]
    except ValueError:
        raise InputError(f"--factors: numbers with commas between them, got {text!r}") from None


def read_tokens(path: str | None, vocabulary: int) -> Tensor | None:
    """The ids in a .npy file, (batch, length), or a batch of windows of a .txt file.

    Raises:
        InputError: no such file, another kind of file, no array in it, no text that is long enough.
    """
    if path is None:
        return None
    import numpy
    import torch

    from moe_param.checks.coordinates import LENGTH, ROWS
    from moe_param.corpus import byte_windows

    file = Path(path)
    if file.suffix not in (".npy", ".txt"):
        raise InputError(f"--tokens: {path} is neither a .npy file of ids, (batch, length), nor a .txt file")
    if not file.is_file():
        raise InputError(f"--tokens: no file {path}")
    if file.suffix == ".txt":
        return torch.from_numpy(byte_windows([file], ROWS, LENGTH, seed=0, vocabulary=vocabulary))
    try:
        ids = numpy.load(file, allow_pickle=False)
        return torch.from_numpy(ids.astype(numpy.int64, casting="same_kind"))
    except (ValueError, EOFError, TypeError) as error:  # TypeError: not whole numbers
        reason = "it holds no plain array of whole numbers"
        raise InputError(f"--tokens: {path} cannot be used, {reason}: save one with numpy.save") from error


def table(result: CoordCheck) -> object:
    """Slopes and verdicts."""
    from rich.table import Table

    found = Table(title=f"{result.spec}, {result.axis}: {WORDS[result.status]}")
    for column in ("quantity", "initial size ~", "change ~", "verdict"):
        found.add_column(column)
    slopes = result.slopes
    for quantity, verdict in result.verdicts.items():
        start, change = slopes["init"][quantity], slopes["change"][quantity]
        found.add_row(
            quantity,
            f"{result.axis}^{start.value:+.2f}",
            f"{result.axis}^{change.value:+.2f} {change.interval}".rstrip(),
            f"{WORDS[verdict.status]}: {verdict.reason}",
            style=None if verdict.passed else "bold",
        )
    return found
