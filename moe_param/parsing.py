"""One way to read arguments: dataclasses, a YAML file for their defaults, the command line over it.

transformers' `HfArgumentParser` does the reading, because training takes transformers' own `TrainingArguments`: its
hundred options, and their help, come from there. Every command uses it, so `--init_std` and `--init-std` are the same
everywhere. What is added here: the config as first argument, YAML for the defaults, and the nearest name of what is
unknown.
"""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from transformers import HfArgumentParser

from moe_param.errors import InputError
from moe_param.naming import check_known, nearest


class Parser(HfArgumentParser):
    """Its errors are raised, not printed."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} ({self.prog} --help lists what there is)")


def parse(
    types: Sequence[type],
    argv: Sequence[str],
    *,
    prog: str,
    description: str | None = None,
    config: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    of_file: Callable[[str], Mapping[str, Any]] | None = None,
) -> tuple[Any, ...]:
    """An instance of every dataclass in `types`.

    Args:
        types: dataclasses whose fields are the options.
        argv: the command line, without the program.
        prog, description: for the help.
        config: the help of the field `config`, which may then be given as first argument too.
        defaults: values that take the place of the fields' own defaults.
        of_file: the defaults that the file CONFIG holds; they come before `defaults`.

    Raises:
        InputError: an unknown option (with the nearest there is), a value of the wrong type, a missing one.
    """
    parser = Parser(types, prog=prog, description=description, allow_abbrev=False)  # type: ignore[arg-type]
    needed = config is not None and _first_argument(parser, config)
    names = option_names(types)
    if defaults:
        parser.set_defaults(**defaults)
    if of_file:
        given, unknown = parser.parse_known_args(list(argv))
        _refuse(unknown, names)
        if given.config:
            parser.set_defaults(**of_file(given.config))
    *instances, unknown = parser.parse_args_into_dataclasses(
        list(argv), look_for_args_file=False, return_remaining_strings=True
    )
    _refuse(unknown, names)
    if needed and all(getattr(instance, "config", None) is None for instance in instances):
        raise InputError(f"CONFIG is missing, the first argument ({prog} --help lists what there is)")
    return tuple(instances[: len(types)])


def _first_argument(parser: Parser, help: str) -> bool:
    """Lets `--config` be given without its name, first; whether it must be given, in one way or the other."""
    option = next(action for action in parser._actions if action.dest == "config")
    needed, option.required, option.help = option.required, False, SUPPRESS
    parser.add_argument("config", nargs="?", default=SUPPRESS, metavar="CONFIG", help=help)
    return needed


def option_names(types: Iterable[type]) -> tuple[str, ...]:
    """The options that dataclasses give."""
    return tuple(f.name for cls in types for f in fields(cls) if f.init)


def check_keys(source: str, values: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuses keys of a file that are no option.

    Raises:
        InputError: with the nearest that is one.
    """
    check_known(values, names, "key", source, InputError)


def _refuse(unknown: Sequence[str], names: Sequence[str]) -> None:
    """Says what was probably meant by the first argument that is none."""
    if unknown:
        given = unknown[0].split("=")[0]
        raise InputError(f"unknown argument {given!r}{_option(given, names)}")


def _option(given: str, names: Sequence[str]) -> str:
    """The nearest option, written as one. Longer ones come first: --log2_lrs for --log2_lr."""
    bare = given.lstrip("-").replace("-", "_")
    longer = [name for name in names if name.startswith(bare)] if bare else []
    if longer:
        return f" (did you mean '--{min(longer, key=len)}'?)"
    return nearest(given, tuple(f"--{name}" for name in names))
