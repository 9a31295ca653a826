"""`moe-param tune`: the numbers of a base."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_param.training.arguments import ModelArguments, PretrainArguments
    from moe_param.training.data.text import DataArguments
    from moe_param.tuning.arguments import TuneArguments
    from moe_param.tuning.workers import Evaluate

CONFIG = (
    "YAML file: model, text and horizon as for `moe-param train`, or the file of an earlier search; or a config: its "
    "folder, Hub id or model type."
)


def main(argv: Sequence[str], evaluate: Evaluate | None = None) -> None:
    """See `moe_param.tuning.tune`."""
    from moe_param.tuning.tune import run_tune

    args, model, data, training = read(argv)
    run_tune(args, model, data, training, command=command_of(argv, args.storage), evaluate=evaluate)


def read(argv: Sequence[str]) -> tuple[TuneArguments, ModelArguments, DataArguments, PretrainArguments]:
    """The arguments of the search, and those of training: a YAML file first, the command line over it."""
    from moe_param.parsing import parse
    from moe_param.training.arguments import TRAINING_TYPES, config_defaults
    from moe_param.tuning.arguments import TuneArguments

    def of_file(source: str) -> dict[str, Any]:
        values = config_defaults([source, *(text for text in argv if text.startswith("--") and text != "--config")])
        values.pop("output_dir", None)  # where training writes
        return values

    types = (TuneArguments, *TRAINING_TYPES)
    args, model, data, training = parse(
        types, argv, prog="moe-param tune", config=CONFIG, defaults={"output_dir": "tune"}, of_file=of_file
    )
    return args, model, data, training


def command_of(argv: Sequence[str], storage: str | None) -> str:
    """As typed, but for a password."""
    from moe_param.tuning.study import shown

    hidden = [arg.replace(storage, shown(storage)) if storage else arg for arg in argv]
    return shlex.join(["moe-param", "tune", *hidden])
