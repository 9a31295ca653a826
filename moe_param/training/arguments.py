"""What a training run can be told: model, text, horizon, optimizer. A YAML file first, the command line over it."""

from __future__ import annotations

import importlib.util
import json
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, TrainingArguments

from moe_param import parsing
from moe_param.errors import InputError
from moe_param.naming import parse_sizes
from moe_param.parsing import check_keys, option_names
from moe_param.scaling.horizon import TOKENS_EXPONENT
from moe_param.scaling.spec import DEFAULT_SPEC
from moe_param.structure.shape import SIZES
from moe_param.training.data.text import DataArguments
from moe_param.tuned import base_and_target, import_modules, read_yaml

SCHEDULES = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}  # short names; warm-up is never dropped
ALTERNATIVES = (
    ("tokens", "max_steps"),
    ("warmup_tokens", "warmup_steps"),
    ("batch_tokens", "gradient_accumulation_steps"),
    ("shape", "target_shape"),
    ("model", "model_type"),
)
STEPS, WARMUP = 1000, 0.1  # where neither steps nor tokens are given


CONFIG_HELP = (
    "YAML file with any of the arguments below, which the command line overrides (what `moe-param tune` wrote, or "
    "recipes/configs), or a model: the folder of a config, a Hub id, a model type."
)
DESCRIPTION = "Trains a Mixture-of-Experts model from scratch, at any size, with the numbers of its base."


@dataclass
class ConfigArgument:
    """Where the other arguments are written down."""

    config: str | None = field(default=None, metadata={"help": CONFIG_HELP})


@dataclass
class ModelArguments:
    """Which model, and from which base its hyperparameters come."""

    model: str | None = field(
        default=None, metadata={"help": "Config: a folder, a config.json or a Hub id (instead of model_type)."}
    )
    model_type: str | None = field(default=None, metadata={"help": "A transformers model type, e.g. mixtral."})
    overrides: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Config attributes to set; JSON on the command line."}
    )
    base_shape: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Shape the hyperparameters were found at, as changes to the config: JSON or width=64,depth=2 with "
            "any of width, depth, num_experts, top_k, expert_size. Default: the config itself."
        },
    )
    shape: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Shape to train, likewise. Default: the config itself."}
    )
    target_shape: dict[str, Any] | str | None = field(default=None, metadata={"help": "Another name of shape."})
    tuned_at: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "The base's sizes where the hyperparameters were found, as moe-param tune writes them."},
    )
    spec: str = field(default=DEFAULT_SPEC, metadata={"help": "Parameterization: a preset or a YAML file."})
    init_std: float | None = field(default=None, metadata={"help": "Base initialization std. Default: the config's."})
    constants: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Per-role constants, {role: {"init": c, "lr": c}}; JSON.'}
    )
    experts_implementation: str | None = field(
        default=None,
        metadata={
            "help": "transformers' experts backend: eager, grouped_mm, megablocks, or auto (megablocks where it is "
            "usable). Default: transformers' own."
        },
    )
    allow_sparsity_change: bool = field(
        default=False, metadata={"help": "Warn, do not refuse, where top_k / num_experts is not the base's."}
    )

    def __post_init__(self) -> None:
        for name in ("overrides", "base_shape", "shape", "target_shape", "tuned_at", "constants"):
            setattr(self, name, mapping(name, getattr(self, name)))
        if self.shape and self.target_shape:
            raise InputError("shape and target_shape are two names of one thing: give one of them")
        self.shape = self.shape or self.target_shape
        if (self.model is None) == (self.model_type is None):
            raise InputError("set one of model (a config's folder or Hub id) and model_type (e.g. mixtral)")


@dataclass
class PretrainArguments(TrainingArguments):
    """TrainingArguments with the paper's optimizer settings as defaults, and a horizon in tokens."""

    output_dir: str | None = field(default="out", metadata={"help": "Where everything is written."})
    imports: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Modules to import first, which register models of your own with transformers' Auto classes."
        },
    )
    tokens: float | None = field(default=None, metadata={"help": "Tokens to train on (instead of max_steps)."})
    batch_tokens: float | None = field(
        default=None,
        metadata={
            "help": "Tokens of an optimizer step, over all processes: gives gradient_accumulation_steps, with "
            "per_device_train_batch_size as the most that a device takes at a time."
        },
    )
    warmup_tokens: float | None = field(
        default=None, metadata={"help": "Tokens of linear warm-up (instead of warmup_steps)."}
    )
    decay_tokens: float | None = field(
        default=None, metadata={"help": "Tokens of the decay of schedule 'wsd'. Default: a fifth of the run."}
    )
    max_steps: int = field(default=-1, metadata={"help": f"Optimizer steps. Default: {STEPS}."})
    learning_rate: float = field(
        default=2**-8, metadata={"help": "The base model's peak rate; every group's rate follows from it."}
    )
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "constant, cosine (to zero), wsd (warm-up, stable, linear decay to zero) or transformers'."},
    )
    warmup_steps: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": f"Steps of linear warm-up, or a share below 1. Default: {WARMUP}."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    adam_epsilon: float = field(
        default=1e-12, metadata={"help": "Epsilon of AdamW at the base shape; it is scaled per group."}
    )
    max_grad_norm: float = field(
        default=0.0,
        metadata={
            "help": "Clip the global gradient norm; 0 is off, as in the paper. The norm changes with the shape, "
            "so a threshold (Trainer's own default is 1.0) does not transfer from one shape to the next."
        },
    )
    clip: float | None = field(
        default=None,
        metadata={"help": "Clip a gradient norm that means the same at every shape (moe_param.ScaleFreeClipping)."},
    )
    decay: str = field(
        default="independent",
        metadata={
            "help": "What of weight_decay stays constant: independent (lr·λ), ema (lr·λ·steps, needs base_steps), none."
        },
    )
    optimizer: str = field(default="adamw", metadata={"help": "adamw, or muon: for matrices, AdamW for the rest."})
    matrix_lr_ratio: float | None = field(
        default=None, metadata={"help": "muon: the base's rate of matrices over learning_rate. Default: 1."}
    )
    base_steps: int | None = field(default=None, metadata={"help": "Steps of the base's run, for decay 'ema'."})
    batch_ratio: float = field(
        default=1.0, metadata={"help": "Tokens per step over the base's: scales lr, eps, betas, decay. 1 is off."}
    )
    tokens_ratio: float = field(
        default=1.0, metadata={"help": "Tokens of the run over the base's: with tokens_exponent, likewise. 1 is off."}
    )
    tokens_exponent: float = field(
        default=TOKENS_EXPONENT,
        metadata={"help": "The rate goes as tokens_ratio to minus this. 0: it stays; 0.5: the square root rule."},
    )
    expert_parallel: int = field(
        default=1,
        metadata={
            "help": "Processes that share the experts of a layer, by transformers' own plan for the family; everything "
            "is sharded with FSDP2 besides. Launch as for DDP."
        },
    )
    balance_rate: float | None = field(
        default=None,
        metadata={
            "help": "Step of the selection biases that balance the experts (docs/balancing.md); 0 only counts. "
            "Default: 0.01, and 0.1 for injected biases of softmax routers."
        },
    )
    balance_rule: str = field(default="proportional", metadata={"help": "proportional (2601.20205) or sign."})
    inject_bias: bool = field(
        default=False,
        metadata={"help": "Balance families whose routers have no selection bias: the checkpoint then needs ours."},
    )
    nan: str = field(
        default="stop",
        metadata={"help": "A step with non-finite gradients: 'stop' names the layer, 'skip' counts it and goes on."},
    )
    peak_tflops: float | None = field(
        default=None, metadata={"help": "Peak TFLOP/s of one device, for MFU. Default: by its name, where known."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between logged training losses."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and infinite losses in the log."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 (HfArgumentParser looks at the order)
        default="tensorboard" if importlib.util.find_spec("tensorboard") else "none",
        metadata={"help": "Integrations beside metrics.jsonl. Default: tensorboard, where it is installed."},
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to validate."})
    eval_steps: float | None = field(default=100, metadata={"help": "Steps between validations."})
    save_steps: float = field(default=500, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Pin the loader's memory."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last good checkpoint in output_dir."})

    def __post_init__(self) -> None:
        self.imports = import_modules(self.imports)  # a YAML file may have one name, or none
        for tokens, steps, unset in (("tokens", "max_steps", -1), ("warmup_tokens", "warmup_steps", None)):
            if getattr(self, tokens) is not None and getattr(self, steps) != unset:
                raise InputError(f"{tokens} and {steps} are both set: give one of them")
        if self.batch_tokens is not None and self.gradient_accumulation_steps != 1:
            raise InputError("batch_tokens and gradient_accumulation_steps are both set: the one gives the other")
        for name in ("tokens", "batch_tokens", "warmup_tokens", "decay_tokens", "peak_tflops"):
            value = getattr(self, name)
            if value is not None and not (0 < value < float("inf") or (value == 0 and name == "warmup_tokens")):
                raise InputError(f"{name} is {value}: expected a positive number")
        for name, choices in (("nan", ("stop", "skip")), ("balance_rule", ("proportional", "sign"))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(choices)}")
        self.lr_scheduler_type = SCHEDULES.get(self.lr_scheduler_type, self.lr_scheduler_type)
        if self.warmup_steps is None:
            self.warmup_steps = WARMUP
        if not torch.accelerator.is_available():  # else launched processes without GPUs do not find each other
            self.use_cpu = True
        try:
            super().__post_init__()
        except ValueError as error:
            raise InputError(" ".join(str(error).split())) from error


@dataclass(frozen=True)
class Horizon:
    """Blocks (of seq_len tokens): `batch` in an optimizer step over all processes, `micro` in one forward pass."""

    batch: int
    micro: int
    steps: int
    seq_len: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq_len


def set_horizon(args: PretrainArguments, seq_len: int, processes: int | None = None) -> Horizon:
    """Turns tokens into steps, in `args` too; `processes` that see different data."""
    processes = processes or args.world_size
    if args.batch_tokens is not None:
        blocks = args.batch_tokens / seq_len
        if blocks < 1 or blocks != int(blocks) or int(blocks) % processes:
            unit = seq_len * processes
            near = max(1, round(args.batch_tokens / unit)) * unit
            raise InputError(
                f"batch_tokens is {args.batch_tokens:g}: not a multiple of seq_len {seq_len} × {processes} processes; "
                f"{near} would be"
            )
        share = int(blocks) // processes
        micro = max(m for m in range(1, min(args.per_device_train_batch_size, share) + 1) if share % m == 0)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = micro, share // micro
    micro = args.per_device_train_batch_size
    batch = micro * args.gradient_accumulation_steps * processes
    per_step = batch * seq_len
    if args.tokens is not None:
        args.max_steps = max(1, round(args.tokens / per_step))
    elif args.max_steps <= 0:
        args.max_steps = STEPS
    if args.warmup_tokens is not None:  # a whole number: Trainer reads what is below 1 as a share
        args.warmup_steps = round(args.warmup_tokens / per_step)
        if args.warmup_steps > args.max_steps:
            raise InputError(f"warmup_tokens {args.warmup_tokens:g} is more than the whole run's tokens")
    if getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type) == "warmup_stable_decay":
        decay = args.max_steps / 5 if args.decay_tokens is None else args.decay_tokens / per_step
        warmup = args.get_warmup_steps(args.max_steps)
        if warmup + round(decay) > args.max_steps:
            raise InputError(f"wsd: {warmup} steps of warm-up and {round(decay)} of decay in a run of {args.max_steps}")
        given: dict[str, Any] = args.lr_scheduler_kwargs or {}  # type: ignore[assignment]
        args.lr_scheduler_kwargs = {"num_decay_steps": round(decay), "decay_type": "linear", **given}
    elif args.decay_tokens is not None:
        raise InputError("decay_tokens is for lr_scheduler_type wsd")
    return Horizon(batch, micro, args.max_steps, seq_len)


def mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """What was given for `name`: a mapping in YAML, JSON, or for sizes NAME=VALUE,…"""
    sizes = name in ("base_shape", "shape", "target_shape", "tuned_at")
    if isinstance(value, str) and sizes and not value.lstrip().startswith("{"):
        return dict(parse_sizes(value, SIZES, int, option=f"--{name}"))
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(f"--{name} {value!r} is not JSON ({error})") from error
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{name} is {value!r}: expected a mapping")
    return value or {}


TRAINING_TYPES = (ModelArguments, DataArguments, PretrainArguments)


def parse(
    argv: Sequence[str], prog: str = "moe-param train"
) -> tuple[ModelArguments, DataArguments, PretrainArguments]:
    """The arguments of a run: CONFIG first (or as --config), the command line over what it says.

    Raises:
        InputError: an unknown argument, a value of the wrong type, arguments that contradict each other.
        TunedError: a YAML file that cannot be read.
    """
    model, data, args, _ = parsing.parse(
        (*TRAINING_TYPES, ConfigArgument),
        argv,
        prog=prog,
        description=DESCRIPTION,
        config=CONFIG_HELP,
        defaults=config_defaults(argv),
    )
    return model, data, args


def config_defaults(argv: Sequence[str]) -> dict[str, Any]:
    """What the CONFIG in `argv` sets: a YAML file's values, or the model it is.

    Raises:
        InputError: CONFIG given first and as --config too; an unknown key in it. TunedError: a file that is not read.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    source = first.parse_known_args(argv)[0].config
    if argv and not argv[0].startswith("-"):
        if source is not None:
            raise InputError(f"CONFIG is given twice: {argv[0]} and --config {source}")
        source = argv[0]
    if source is None:
        return {}
    if Path(source).suffix in (".yaml", ".yml"):
        return file_defaults(source, argv)
    return {"model_type" if source in CONFIG_MAPPING else "model": source}


def file_defaults(path: str, argv: Sequence[str]) -> dict[str, Any]:
    """What a YAML file sets, less what the command line `argv` gives in another unit.

    Raises:
        TunedError: a file that cannot be read. InputError: an unknown key in it.
    """
    values = read_yaml(path)
    check_keys(path, values, option_names(TRAINING_TYPES))
    typed = {text.split("=")[0].lstrip("-").replace("-", "_") for text in argv if text.startswith("--")}
    for one, other in ALTERNATIVES:
        for given, replaced in ((one, other), (other, one)):
            if given in typed:
                values.pop(replaced, None)
    return values


def build_configs(args: ModelArguments) -> tuple[PretrainedConfig, PretrainedConfig]:
    """(base, target), both the given config at another shape."""
    return base_and_target(vars(args))
