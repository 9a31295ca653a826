"""Pre-train a Mixture-of-Experts model from scratch, parameterized from a base shape.

    python -m recipes.pretrain --config recipes/configs/tiny.yaml --output_dir out --learning_rate 2e-3

A YAML file holds any of the arguments; the command line overrides it. Everything but the model's
initialization and the optimizer's parameter groups is transformers' own Trainer.
"""

from __future__ import annotations

import difflib
import json
import logging
import sys
import time
from argparse import ArgumentParser
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PretrainedConfig,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

import moe_param
from recipes.data import DataArguments, HFTokenizer, InputError, load_data
from recipes.report import MetricsFile, active_parameters, plot_losses, versions

logger = logging.getLogger(__name__)

# What a wrong input raises: told in one line, without a traceback.
USER_ERRORS = (
    InputError,
    moe_param.OptimizerError,
    moe_param.ParameterizationError,
    moe_param.RoleError,
    moe_param.ShapeError,
    moe_param.SpecError,
    moe_param.StructureError,
)


@dataclass
class ModelArguments:
    """Which model, and from which base its hyperparameters come."""

    model: str | None = field(default=None, metadata={"help": "Folder or Hub id of a config (instead of model_type)."})
    model_type: str | None = field(default=None, metadata={"help": "A transformers model type, e.g. mixtral."})
    overrides: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Config attributes to set; JSON on the command line."}
    )
    base_shape: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Shape the hyperparameters were found at, as changes to the config: JSON with any of "
            "width, depth, num_experts, top_k, expert_size. Default: the config itself."
        },
    )
    target_shape: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Shape to train, likewise. Default: the config itself."}
    )
    spec: str = field(default="moe-completep", metadata={"help": "Parameterization: a preset or a YAML file."})
    init_std: float | None = field(default=None, metadata={"help": "Base initialization std. Default: the config's."})
    constants: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Per-role constants, {role: {"init": c, "lr": c}}; JSON.'}
    )
    experts_implementation: str | None = field(
        default=None,
        metadata={"help": "transformers' experts backend: eager, grouped_mm, megablocks. Default: moe_param's choice."},
    )

    def __post_init__(self) -> None:
        for name in ("overrides", "base_shape", "target_shape", "constants"):
            setattr(self, name, _mapping(name, getattr(self, name)))
        if (self.model is None) == (self.model_type is None):
            raise InputError("set one of model (a config's folder or Hub id) and model_type (e.g. mixtral)")


@dataclass
class PretrainArguments(TrainingArguments):
    """TrainingArguments with the paper's optimizer settings as defaults."""

    output_dir: str | None = field(default="out", metadata={"help": "Where everything is written."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    learning_rate: float = field(
        default=2**-8, metadata={"help": "The base model's peak rate; every group's rate follows from it."}
    )
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Schedule; 'cosine' decays to zero."}
    )
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of linear warm-up, or a share below 1."})
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
    logging_steps: float = field(default=10, metadata={"help": "Steps between logged training losses."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and infinite losses in the log."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to validate."})
    eval_steps: float | None = field(default=100, metadata={"help": "Steps between validations."})
    save_steps: float = field(default=500, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Pin the loader's memory."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})


class MoETrainer(Trainer):
    """Trainer whose checkpoints come back whole.

    transformers writes experts in the layout of the family's published weights, but resumes with a plain,
    non-strict `load_state_dict`: experts and routers would silently restart from their initialization
    (huggingface/transformers#48805, open as of 5.23). `from_pretrained` converts them.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model = model or self.model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # these save and load the live layout
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
            model.load_state_dict(saved.state_dict())


def _mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(f"--{name} {value!r} is not JSON ({error})") from error
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{name} is {value!r}: expected a mapping")
    return value or {}


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, PretrainArguments]:
    """YAML file first, command line over it."""
    first = ArgumentParser(add_help=False)
    first.add_argument("--config", help="YAML file with any of the arguments below.")
    known, rest = first.parse_known_args(argv)
    types = (ModelArguments, DataArguments, PretrainArguments)
    parser = HfArgumentParser(types, prog="python -m recipes.pretrain", parents=[first], allow_abbrev=False)
    names = [f.name for cls in types for f in fields(cls) if f.init]
    if known.config:
        values = _read_yaml(known.config)
        for key in values:
            if key not in names:
                raise InputError(f"{known.config}: unknown key {key!r}{_nearest(key, names)}")
        parser.set_defaults(**values)
    model_args, data_args, args, _, unknown = parser.parse_args_into_dataclasses(
        rest, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise InputError(f"unknown argument {unknown[0]!r}{_nearest(unknown[0].lstrip('-'), names)}")
    return model_args, data_args, args


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {near[0]!r}?" if near else ": see python -m recipes.pretrain --help"


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"--config {path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: expected a mapping of argument names to values")
    return values


def build_configs(args: ModelArguments) -> tuple[PretrainedConfig, PretrainedConfig]:
    """(base, target), both the given config at another shape."""
    try:
        if args.model:
            config = AutoConfig.from_pretrained(args.model, **args.overrides)
        else:
            config = AutoConfig.for_model(args.model_type, **args.overrides)
    except (ValueError, OSError) as error:
        name = args.model or args.model_type
        raise InputError(f"no config for {name!r}: {str(error).splitlines()[0]}") from error
    declared = type(config)()  # head_dim: some families read it without declaring it
    unknown = [key for key in args.overrides if key != "head_dim" and not hasattr(declared, key)]
    if unknown:
        raise InputError(f"overrides: {config.model_type} configs have no {', '.join(unknown)}")
    return _scaled(config, "base_shape", args.base_shape), _scaled(config, "target_shape", args.target_shape)


def _scaled(config: PretrainedConfig, name: str, shape: dict[str, Any]) -> PretrainedConfig:
    axes = ("width", "depth", "num_experts", "top_k", "expert_size")
    unknown = [key for key in shape if key not in axes]
    if unknown:
        raise InputError(f"{name}: no axis {', '.join(map(repr, unknown))}, expected any of {', '.join(axes)}")
    return moe_param.scale_config(config, **shape)


def check(args: PretrainArguments) -> str | None:
    """Refuse what would not do what it says; return the checkpoint to go on from."""
    moe_param.check_schedule(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    default_optim = next(f.default for f in fields(TrainingArguments) if f.name == "optim")
    if args.optim != default_optim:
        raise InputError(f"optim is {args.optim!r}: this recipe trains with torch.optim.AdamW only, leave it unset")
    if args.load_best_model_at_end:
        raise InputError(
            "load_best_model_at_end would lose the experts (huggingface/transformers#48805): leave it unset and "
            "load the checkpoint you want with from_pretrained"
        )
    if args.max_grad_norm > 0:
        logger.warning(
            "max_grad_norm=%g: the global gradient norm changes with the shape, so this threshold does not "
            "transfer from the base model",
            args.max_grad_norm,
        )
    output = Path(args.output_dir)
    checkpoint = get_last_checkpoint(str(output)) if output.is_dir() else None
    if args.resume:
        logger.warning("resuming from %s", checkpoint or f"nothing: no checkpoint in {output}, starting afresh")
        return checkpoint
    if checkpoint or (output / MetricsFile.name).exists():
        raise InputError(f"{output} holds a run already: --resume to go on, or another --output_dir")
    return None


def main(argv: list[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args = parse(sys.argv[1:] if argv is None else argv)
    checkpoint = check(args)
    data = load_data(data_args, seed=args.data_seed or args.seed)
    base, target = build_configs(model_args)
    if data.tokenizer.vocab_size > target.vocab_size:
        raise InputError(
            f"tokenizer {data_args.tokenizer!r} has {data.tokenizer.vocab_size} ids, "
            f"the model {target.vocab_size}: set overrides.vocab_size"
        )

    transformers.set_seed(args.seed)
    choice = model_args.experts_implementation
    kwargs = {"experts_implementation": choice} if choice else {}
    model = AutoModelForCausalLM.from_config(target, **kwargs)
    parameterization = moe_param.apply(
        model,
        base,
        spec=model_args.spec,
        init_std=model_args.init_std,
        constants=model_args.constants or None,
        seed=args.seed,
        experts=None if choice else "auto",
    )
    total, active = active_parameters(parameterization)
    if args.should_log:
        print(parameterization)
        print(f"{data.description}\n{target.model_type}: {total:,} parameters, {active:,} active per token")

    tokens_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * data_args.seq_len
    metrics = MetricsFile(Path(args.output_dir), tokens_per_step)
    trainer = MoETrainer(
        model,
        args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer.hf if isinstance(data.tokenizer, HFTokenizer) else None,
        callbacks=[metrics],
        optimizer_cls_and_kwargs=(
            parameterization.optimizer_factory(torch.optim.AdamW),
            {
                "lr": args.learning_rate,
                "eps": args.adam_epsilon,
                "betas": (args.adam_beta1, args.adam_beta2),
                "weight_decay": args.weight_decay,
            },
        ),
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if not history or history[-1]["step"] != trainer.state.global_step:
        history.append(trainer.evaluate())
    trainer.save_model()

    summary = {
        "validation_loss": history[-1]["eval_loss"],
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * tokens_per_step,
        "parameters": total,
        "active_parameters": active,
        "seconds": round(time.perf_counter() - start, 1),  # of this session, where a run was resumed
        "resumed_from": checkpoint,
        "data": data.description,
        "spec": model_args.spec,
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        output = Path(args.output_dir)
        (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        plot_losses(output / MetricsFile.name, output / "loss.png")
        print(f"validation loss {summary['validation_loss']:.4f}, {summary['tokens']:,} tokens; see {output}/")
    return summary


if __name__ == "__main__":
    try:
        main()
    except USER_ERRORS as error:
        sys.exit(f"pretrain: {error}")
