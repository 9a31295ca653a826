"""The model that is searched, and how its trials train: read, checked, and written down again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from transformers import AutoConfig, PretrainedConfig

import moe_param
from moe_param import Parameterization
from moe_param.errors import InputError
from moe_param.structure.trace import model_class_for
from moe_param.training.arguments import ModelArguments, PretrainArguments, build_configs
from moe_param.training.data.text import DataArguments
from moe_param.tuned import read_yaml
from moe_param.tuning.arguments import TuneArguments
from moe_param.tuning.points import Point, canonical
from moe_param.tuning.short_run import ShortRun, short_run

# Of training's arguments, those that a trial's loss depends on. tuned.yaml has them all, defaults of today included.
TRAINING = (
    *("tokens", "max_steps", "batch_tokens", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("warmup_tokens", "warmup_steps", "decay_tokens", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("balance_rate", "balance_rule", "inject_bias"),
    *("weight_decay", "decay", "base_steps", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("optimizer", "matrix_lr_ratio"),
)
TEXT = ("seq_len", "tokenizer", "validation_blocks")  # likewise; of the rest, what is not the default
OURS = ("learning_rate", "output_dir", "resume", *(f.name for f in fields(ModelArguments)), *TRAINING)


@dataclass(frozen=True)
class Base:
    """The model that is searched, and how its trials train."""

    config: PretrainedConfig
    shape: moe_param.Shape
    roles: dict[str, bool]  # every trained role → whether its init is random
    start: Point
    run: ShortRun
    settings: dict[str, Any]  # what a trial's loss depends on: a study holds trials of one kind only
    yaml: dict[str, Any]  # tuned.yaml, with None for the numbers that are searched
    imports: tuple[str, ...] = ()  # modules that register the model with transformers, in every process


def read_base(args: TuneArguments, model: ModelArguments, data: DataArguments, training: PretrainArguments) -> Base:
    """Everything that can be wrong with the model and the training, but for the text, is found here.

    Raises:
        MoeParamError: of any kind.
    """
    base, _ = build_configs(model)
    given = {name: getattr(training, name) for name in TRAINING}
    given["lr_scheduler_type"] = str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type))
    if training.warmup_tokens is not None:
        given["warmup_steps"] = None
    run = replace(short_run(model, data, training, base), init_std=None, constants=None)
    if given["tokens"] is None:
        given["max_steps"] = run.steps
    constants: Any = model.constants
    plan = moe_param.plan(
        model_class_for(base), base, base, spec=model.spec, init_std=model.init_std, constants=constants or None
    )
    start = {"learning_rate": training.learning_rate}
    start |= {"init_std": model.init_std} if model.init_std is not None else {}
    start |= {f"{role}.{kind}": value for role, kinds in constants.items() for kind, value in kinds.items()}
    return Base(
        base,
        plan.base_shape,
        trained_roles(plan),
        canonical(start),
        run,
        settings_of(args, base, run, plan),
        document_of(args.config, {"spec": model.spec or plan.spec.name, **given}, base, plan, data, training.imports),
        tuple(training.imports),
    )


def trained_roles(plan: Parameterization) -> dict[str, bool]:
    """Every role that learns → whether its initialization is random."""
    roles: dict[str, bool] = {}
    for rule in plan.rules.values():
        if rule.lr > 0:
            roles[rule.role] = roles.get(rule.role, False) or rule.constant is None
    return roles


def settings_of(args: TuneArguments, base: PretrainedConfig, run: ShortRun, plan: Parameterization) -> dict[str, Any]:
    """What every trial of a study has in common, as plain values."""
    searched = ("config", "base", "spec", "lr", "seed", "init_std", "constants", "data")
    settings = {
        "mode": args.mode,
        "seeds": list(args.seeds),
        "training": {name: value for name, value in asdict(run).items() if name not in searched},
        "data": run.data or {"dataset": f"stdlib of Python {'.'.join(platform.python_version_tuple()[:2])}"},
        "model": {name: value for name, value in base.to_dict().items() if name != "transformers_version"},
        "spec": plan.spec.to_dict(),
    }
    found: dict[str, Any] = json.loads(json.dumps(settings))  # as the storage gives it back
    return found


def document_of(
    source: str | None,
    given: Mapping[str, Any],
    base: PretrainedConfig,
    plan: Parameterization,
    data: DataArguments,
    imports: Sequence[str],
) -> dict[str, Any]:
    """tuned.yaml but for the numbers that are searched; what else the file `source` says is carried over."""
    text = {f.name: getattr(data, f.name) for f in fields(DataArguments)}
    defaults = {f.name: f.default for f in fields(DataArguments)}
    carried = read_yaml(source) if source else {}
    return {
        "model_type": base.model_type,
        "overrides": overrides_of(base),
        "tuned_at": plan.base_shape.sizes,
        "spec": given["spec"],
        **dict.fromkeys(("learning_rate", "init_std", "constants")),
        **{name: value for name, value in given.items() if value not in (None, -1, {})},
        **{name: value for name, value in text.items() if name in TEXT or value != defaults[name]},
        **{name: value for name, value in carried.items() if name not in (*OURS, *text)},
        **({"imports": list(imports)} if imports else {}),
    }


def overrides_of(config: PretrainedConfig) -> dict[str, Any]:
    """What makes `config` out of its model type's defaults; checked by making it."""
    skipped = ("model_type", "transformers_version", "architectures", "moe_param", "_name_or_path", "dtype")
    default = type(config)().to_dict()
    values = {
        name: value
        for name, value in config.to_dict().items()
        if name not in skipped and (name not in default or default[name] != value)
    }
    made = AutoConfig.for_model(config.model_type, **values).to_dict()
    wrong = [k for k, v in config.to_dict().items() if k not in skipped and made.get(k) != v]
    if wrong:
        raise InputError(
            f"a {config.model_type} config is not its defaults and overrides: {', '.join(wrong)} would differ"
        )
    return values
