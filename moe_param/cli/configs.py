"""The config that a command is given: a file, a folder, an id on the Hub, a model type; or sizes that change one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_param.errors import InputError
from moe_param.naming import nearest, parse_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

YAML = (".yaml", ".yml")

CONFIG_HELP = (
    "Folder of a checkpoint, path of a config.json, id on the Hub, a transformers model type (mixtral: its default "
    "config), or the YAML file that `moe-param tune` wrote."
)


def load_config(source: str, *, of_base: bool = False) -> PretrainedConfig:
    """The config of a file, folder, Hub id or model type; of a YAML file the target it describes, or its base.

    Raises:
        InputError: nothing of that name, or nothing in it that transformers reads.
        TunedError: a YAML file that describes no model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(source)
    if path.suffix in YAML:
        from moe_param.tuned import read_tuned

        tuned = read_tuned(path)
        return tuned.base if of_base else tuned.target
    if not path.exists():
        if source in CONFIG_MAPPING:
            return AutoConfig.for_model(source)
        if source.count("/") != 1 or path.suffix == ".json":  # not an id on the Hub either
            raise InputError(f"no file, folder or model type {source!r}{nearest(source, CONFIG_MAPPING)}")
    elif path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"the folder {source} holds no config.json")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # every family's config class has its own ways to refuse a file
        raise InputError(f"no config can be read from {source}: {error}") from error


def is_shape(text: str) -> bool:
    """Whether sizes are meant, not the name of a config."""
    return "=" in text and not Path(text).exists()


def sizes(option: str, text: str) -> dict[str, int]:
    """`width=64,depth=2` as absolute sizes; what is wrong with them names the option."""
    from moe_param.structure.shape import SIZES

    return parse_sizes(text, SIZES, int, option=option)


def scaled(config: PretrainedConfig, option: str, text: str) -> PretrainedConfig:
    """The config that `--base` or `--target` means: sizes to change in `config`, or another config.

    Raises:
        InputError, ShapeError: unknown sizes, or ones that do not fit; the option is named.
    """
    from moe_param.structure.scaling_config import scale_config
    from moe_param.structure.shape import ShapeError

    if not is_shape(text):
        return load_config(text, of_base=option == "--base")
    try:
        changes: dict[str, Any] = {**sizes(option, text)}
        return scale_config(config, **changes)
    except ShapeError as error:
        raise ShapeError(f"{option}: {error}") from error
