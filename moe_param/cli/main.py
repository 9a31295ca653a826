"""`moe-param`: the command line. What is heavy is imported inside the commands, so that `--help` is quick."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_param.scaling.spec import DEFAULT_SPEC

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from moe_param.parameterization import Parameterization

YAML = (".yaml", ".yml")

app = typer.Typer(
    name="moe-param", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True
)


@app.callback()
def _program() -> None:
    """Hyperparameters of mixture-of-experts transformers that stay put across scale."""


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG",
            help="Folder of a checkpoint, path of a config.json, id on the Hub, a transformers model type (`mixtral`: "
            "its default config), or the YAML file of a sweep, whose model and numbers are then the base.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option(
            help="Shape the hyperparameters were found at: `width=512,depth=8,num_experts=8,top_k=2,expert_size=1024` "
            "(sizes that are not given stay the config's; top_k follows num_experts), or a config as above. "
            "Not needed for a model that is parameterized already."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Shape to train, given like --base. Default: the config as it is.")
    ] = None,
    spec: Annotated[
        str | None, typer.Option(help="Parameterization: a preset or a YAML file. Default: moe-completep.")
    ] = None,
    init_std: Annotated[
        float | None, typer.Option(help="Std of the base's random initialization. Default: transformers' own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    full: Annotated[bool, typer.Option("--full", help="One line per parameter, not per role and rule.")] = False,
    allow_sparsity_change: Annotated[
        bool, typer.Option("--allow-sparsity-change", help="Let top_k / num_experts differ from the base's.")
    ] = False,
) -> None:
    """Shows what the parameterization does to every parameter: initialization, learning rate, epsilon, decay.

    Works from configs alone: no weights are loaded or built, so a model of any size is explained in seconds.
    """
    with _errors():
        config = _load_config(model)
        options = {"--target": target, "--spec": spec, "--init-std": init_std}
        given = [name for name, value in options.items() if value is not None]
        tuned = Path(model) if Path(model).suffix in YAML else None
        if base is not None or tuned is not None:
            parameterization = _plan(config, base or tuned, target, spec, init_std, allow_sparsity_change)
        elif getattr(config, "moe_param", None) is None:
            raise ValueError(
                f"{model} is not parameterized yet: give the shape its hyperparameters were found at, "
                "for example --base width=512,depth=8"
            )
        elif given or allow_sparsity_change:
            raise ValueError(
                f"{given[0] if given else '--allow-sparsity-change'} needs --base: without it, what is recorded in "
                f"the config of {model} is shown"
            )
        else:
            from moe_param.parameterization import Parameterization

            parameterization = Parameterization.from_dict(config.moe_param)
        _show(parameterization, config, recorded=base is None and tuned is None, as_json=as_json, full=full)


@app.command("coord-check")
def coord_check_command(
    config_source: Annotated[str, typer.Argument(metavar="CONFIG", help="As MODEL_OR_CONFIG of `explain`.")],
    base: Annotated[
        str, typer.Option(help="Where factor 1 stands: `width=64,depth=2,num_experts=8,expert_size=64`, or a config.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for picture, JSON and the log of finished runs (resumes from it).")],
    axis: Annotated[list[str] | None, typer.Option(help="One or more of the axes; by default all four.")] = None,
    factors: Annotated[str, typer.Option(help="Multiples of the base's size along the axis.")] = "1,2,4,8",
    spec: Annotated[str, typer.Option(help="Parameterization: a preset or a YAML file.")] = DEFAULT_SPEC,
    steps: Annotated[int, typer.Option(help="AdamW steps.")] = 5,
    seeds: Annotated[int, typer.Option(help="Initializations.")] = 3,
    lr: Annotated[float, typer.Option(help="The one learning rate of all runs.")] = 2**-8,
    tokens: Annotated[
        Path | None, typer.Option(help="Token ids to train on: a .npy file, (batch, length). Default: random ids.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Runs at a time, at most one per core.")] = 1,
) -> None:
    """Trains the architecture at several sizes for a few steps: does every activation move by the same amount?

    Writes AXIS.png and AXIS.json to the folder. Exit code 1 if a quantity grows or vanishes.
    """
    with _errors():
        import torch
        from rich.console import Console
        from rich.table import Table

        from moe_param.checks.coordinates import coord_check
        from moe_param.structure.shape import AXES, Shape

        config = _load_config(config_source)
        shape = Shape.from_config(_scaled(config, "--base", base))
        try:
            multiples = [float(factor) for factor in factors.split(",")]
        except ValueError:
            raise ValueError(f"--factors: numbers with commas between them, got {factors!r}") from None
        batch = None
        if tokens is not None:
            import numpy

            batch = torch.from_numpy(numpy.load(tokens)).long()
            if batch.dim() != 2:
                raise ValueError(f"--tokens: {tokens} must hold a (batch, length) array, found {tuple(batch.shape)}")
        out.mkdir(parents=True, exist_ok=True)
        console, passed = Console(), True
        for name in axis or AXES:
            result = coord_check(
                config,
                shape,
                axis=name,
                factors=multiples,
                spec=spec,
                steps=steps,
                seeds=seeds,
                lr=lr,
                batch=batch,
                processes=processes,
                resume=out / "finished.jsonl",
                progress=True,
            )
            result.plot(out / f"{name}.png")
            result.to_json(out / f"{name}.json")
            passed = passed and result.passed
            table = Table(title=f"{result.spec}, {name}: {'passed' if result.passed else 'FAILED'}")
            for column in ("quantity", "initial size ~", "change ~", "verdict"):
                table.add_column(column)
            slopes = result.slopes
            for quantity, verdict in result.verdicts.items():
                start, change = slopes["init"][quantity], slopes["change"][quantity]
                interval = f" [{change.low:+.2f}, {change.high:+.2f}]" if change.low == change.low else ""
                table.add_row(
                    quantity,
                    f"{name}^{start.value:+.2f}",
                    f"{name}^{change.value:+.2f}{interval}",
                    ("ok: " if verdict.passed else "FAILED: ") + verdict.reason,
                )
            console.print(table)
        console.print(f"pictures and numbers are in {out}")
    raise typer.Exit(0 if passed else 1)


def _plan(
    config: PretrainedConfig,
    base: str | Path | None,
    target: str | None,
    spec: str | None,
    init_std: float | None,
    allow_sparsity_change: bool,
) -> Parameterization:
    from moe_param.applying import plan
    from moe_param.structure.trace import model_class_for
    from moe_param.tuned import read_tuned

    if target is not None and isinstance(base, Path) and _is_shape(target):  # as `--shape` beside a file in training
        config = read_tuned(base, _sizes("--target", target)).target
    elif target is not None:
        config = _scaled(config, "--target", target)
    return plan(
        model_class_for(config),
        config,
        _scaled(config, "--base", base) if isinstance(base, str) else base,  # type: ignore[arg-type]
        spec=spec,
        init_std=init_std,
        allow_sparsity_change=allow_sparsity_change,
    )


def _scaled(config: PretrainedConfig, option: str, text: str) -> PretrainedConfig:
    """The config that `--base` or `--target` means: sizes to change in `config`, or another config."""
    from moe_param.structure.shape import ShapeError, scale_config

    if not _is_shape(text):
        return _load_config(text, of_base=option == "--base")
    try:
        return scale_config(config, **_sizes(option, text))
    except ShapeError as error:
        raise ShapeError(f"{option}: {error}") from error


def _is_shape(text: str) -> bool:
    return "=" in text and not Path(text).exists()


def _sizes(option: str, text: str) -> dict[str, int]:
    from moe_param.structure.shape import SIZES

    sizes: dict[str, Any] = {}
    for item in text.split(","):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in SIZES:
            raise ValueError(f"{option}: unknown size {key!r}{_nearest(key, SIZES)}")
        if key in sizes:
            raise ValueError(f"{option}: {key} is given twice")
        try:
            sizes[key] = int(value)
        except ValueError:
            raise ValueError(f"{option}: {key} must be a whole number, got {value!r}") from None
    return sizes


def _load_config(source: str, of_base: bool = False) -> PretrainedConfig:
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
            raise ValueError(f"no file, folder or model type {source!r}{_nearest(source, tuple(CONFIG_MAPPING))}")
    elif path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"the folder {source} holds no config.json")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # every family's config class has its own ways to refuse a file
        raise ValueError(f"no config can be read from {source}: {error}") from error


def _nearest(name: str, valid: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (valid: {', '.join(valid)})" if len(valid) < 10 else ""


def _show(
    parameterization: Parameterization, config: PretrainedConfig, *, recorded: bool, as_json: bool, full: bool
) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from moe_param.explain import rich_table

    rows = parameterization.rows(full)
    if as_json:
        document: dict[str, Any] = {
            "model_type": config.model_type,
            "spec": parameterization.spec.name,
            "recorded": recorded,
            "base_shape": asdict(parameterization.base_shape),
            "shape": asdict(parameterization.shape),
            "init_std": parameterization.init_std,
            "rows": rows,
        }
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    console = Console()
    if console.is_terminal:
        console.print(rich_table(parameterization, full, narrow=not full and console.width < 140))
    else:
        typer.echo(parameterization.table(full))


@contextmanager
def _errors() -> Iterator[None]:
    """One line on stderr and exit code 2 for what the user can put right; a bug keeps its traceback."""

    def say(kind: str, message: object) -> None:
        typer.echo(f"moe-param: {kind}: {' '.join(str(message).split())}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: say("warning", message)
        try:
            from transformers.utils import logging

            logging.set_verbosity_error()
            yield
        except (ValueError, OSError) as error:  # the errors of moe_param are ValueErrors
            say("error", error)
            raise typer.Exit(2) from error


def main() -> None:
    app()


if __name__ == "__main__":
    main()
