"""What `moe-param transfer` is asked, and everything it will run: read and checked before the first run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

import moe_param
from moe_param import Parameterization
from moe_param.errors import InputError
from moe_param.naming import check_known, parse_sizes
from moe_param.scaling.spec import DEFAULT_SPEC
from moe_param.structure.shape import AXES, Shape, measure
from moe_param.structure.trace import model_class_for, trace_model
from moe_param.training.arguments import ModelArguments, PretrainArguments, build_configs, parse
from moe_param.training.data.text import DataArguments
from moe_param.training.report import active_parameters
from moe_param.tuned import Tuned
from moe_param.tuning.base import overrides_of
from moe_param.tuning.costs import BaseRuns, base_runs, run_flops
from moe_param.tuning.drift import Bounds, Run
from moe_param.tuning.rivals import Search, Trial, init_ladder
from moe_param.tuning.runners import LoopRunner
from moe_param.tuning.short_run import ShortRun, short_run

CONFIG = "tuned.yaml of `moe-param tune`, or any YAML file of `moe-param train`: model, text, horizon, learning rate."
NONE = "none"  # --search none


@dataclass
class TransferArguments:
    """What `moe-param transfer` can be told. Model, text and horizon are the file's."""

    config: str = field(metadata={"help": CONFIG})
    output_dir: str = field(default="transfer", metadata={"help": "Where transfer.json and the pictures go."})
    axes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Targets, as factors of the base: width (expert_size goes with it), depth, num_experts (top_k goes "
            "with it), expert_size; several with commas, e.g. width=2,depth=2. Default: each there is, times 4."
        },
    )
    specs: list[str] = field(
        default_factory=list, metadata={"help": "Parameterizations to compare. Default: the file's, and standard."}
    )
    octaves: list[float] = field(
        default_factory=lambda: [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0],
        metadata={"help": "The ladder: learning rates in octaves from the config's own."},
    )
    extend: int = field(
        default=2, metadata={"help": "Rungs that an end of a ladder may get while the best is there. 0: none."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the weights and the batches."})
    max_drift: float = field(default=Bounds.drift, metadata={"help": "Octaves the best rate may move."})
    max_regret: float = field(
        default=Bounds.regret, metadata={"help": "Share of the loss that keeping the base's rate may cost."}
    )
    search: list[str] = field(
        default_factory=lambda: ["standard"],
        metadata={
            "help": "Parameterizations whose learning rate × init std is searched at the target, with and without the "
            "base's constants: what one would do without a base. none: no search."
        },
    )
    search_at: list[str] = field(
        default_factory=list, metadata={"help": "Targets, as in --axes, to search at. Default: the largest."}
    )
    search_seeds: list[int] = field(
        default_factory=list, metadata={"help": "Of --seeds, those the search is done with. Default: the first."}
    )
    init_stds: list[float] = field(
        default_factory=lambda: [0.01, 0.02, 0.04, 0.08],
        metadata={"help": "The search's init stds; with the base's constants, the base's replaces the nearest."},
    )
    base_runs: float | None = field(
        default=None,
        metadata={"help": "Full runs of the base that finding its numbers took. Default: what tune.json says."},
    )
    workers: int = field(
        default=0,
        metadata={"help": "Runs at a time, one thread each. 0: one per GPU, or per core where there is none."},
    )
    device: str = field(
        default="auto", metadata={"help": "Where runs train: auto (every GPU, else the CPU), cpu, cuda."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto (bfloat16 on a GPU, else float32), float32, bfloat16."})
    smallest: bool = field(default=False, metadata={"help": "A few steps, one seed; proves nothing."})

    def __post_init__(self) -> None:
        if self.smallest:
            self.octaves, self.seeds, self.init_stds, self.extend = [-1.0, 0.0, 1.0], [0], [0.02], 0
        self.octaves, self.seeds = sorted(set(self.octaves)), sorted(set(self.seeds))
        self.init_stds = sorted(set(self.init_stds))
        self.axes, self.specs = list(dict.fromkeys(self.axes)), list(dict.fromkeys(self.specs))
        self.search = [spec for spec in dict.fromkeys(self.search) if spec != NONE]
        self.search_at = list(dict.fromkeys(self.search_at))
        self._check()
        self.search_seeds = sorted(set(self.search_seeds)) or self.seeds[:1]
        self.workers = self.workers or self.runner.workers()

    def _check(self) -> None:
        if not all(-100 < octave < 100 for octave in self.octaves):
            raise InputError(f"octaves are {self.octaves}: expected numbers like -1 or 0.5, between -100 and 100")
        if len(self.octaves) < 3 or 0.0 not in self.octaves:
            raise InputError(
                f"octaves are {self.octaves}: a ladder needs three rungs, 0 (the config's rate) among them"
            )
        if not self.seeds:
            raise InputError("seeds is empty: give at least one, or leave it out")
        if not set(self.search_seeds) <= set(self.seeds):
            raise InputError(
                f"search_seeds are {self.search_seeds}: expected some of the seeds {self.seeds}, so that what was "
                "transferred has the same"
            )
        if self.search and not self.init_stds:
            raise InputError("init_stds is empty: give at least one, or --search none")
        for std in self.init_stds:
            if not 0 < std < 10:
                raise InputError(f"init_stds: {std:g} is no standard deviation: expected numbers like 0.02")
        for name, least in (("workers", 0), ("extend", 0)):
            if getattr(self, name) < least:
                why = " or 0 for one per core" if name == "workers" else " or 0 for none"
                raise InputError(f"{name} is {getattr(self, name)}: expected at least 1,{why}")
        for name in ("max_drift", "max_regret", "base_runs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} is {value}: expected a number above 0")

    @property
    def runner(self) -> LoopRunner:
        return LoopRunner(self.device, self.dtype)

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.max_drift, self.max_regret)


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the first run.

    template: the base's own run. configs: "base" and the targets. first: the spec that the others are compared with,
    the file's unless said. shared: specs that are the first one at the base, which is run once. active: parameters that
    a token visits, flops: of one run, both of the base and every target. devices: those that runs take turns on.
    imports: modules that register the model with transformers, in every process.
    """

    template: ShortRun
    configs: Mapping[str, PretrainedConfig]
    specs: tuple[str, ...]
    shared: frozenset[str]
    active: Mapping[str, int]
    flops: Mapping[str, float]
    searches: tuple[Search, ...]
    base_runs: BaseRuns
    devices: tuple[str, ...] = ("cpu",)
    imports: tuple[str, ...] = ()

    @property
    def first(self) -> str:
        return self.specs[0]

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(name for name in self.configs if name != "base")

    @property
    def tokens(self) -> int:
        """Of one run."""
        return self.template.steps * self.template.batch_size * self.template.seq_len

    def home(self, spec: str, target: str) -> str:
        """The spec under which a ladder is run: specs that are one at the base share the first's."""
        return self.first if target == "base" and spec in self.shared else spec

    @property
    def ladders(self) -> list[tuple[str, str]]:
        """(spec, target) of every ladder that is run."""
        pairs = itertools.product(self.specs, self.configs)
        return [(spec, target) for spec, target in pairs if self.home(spec, target) == spec]

    def rung(self, run: Run) -> ShortRun:
        """What a rung of a ladder trains."""
        return replace(
            self.template,
            config=self.configs[run.target].to_dict(),
            spec=run.spec,
            lr=self.template.lr * 2.0**run.octave,
            seed=run.seed,
        )

    def trial(self, search: Search, trial: Trial) -> ShortRun:
        """What a point of a search trains."""
        return replace(
            self.template,
            config=self.configs[search.target].to_dict(),
            spec=search.spec,
            lr=self.template.lr * 2.0**trial.octave,
            init_std=trial.init_std,
            constants=self.template.constants if search.constants else None,
            seed=trial.seed,
        )


def identity(run: ShortRun) -> str:
    """Runs of one identity are one training."""
    return json.dumps(asdict(run), sort_keys=True, default=str)


def targets(base: PretrainedConfig, axes: Sequence[str]) -> dict[str, PretrainedConfig]:
    """The base and every target, by name; without `axes`, every axis that the base has, times 4.

    Raises:
        InputError: no such axis, another sparsity. ShapeError: sizes that do not divide (with the nearest that do).
    """
    model_class = model_class_for(base)
    shape = measure(*trace_model(model_class, base))
    found = {"base": base}
    for text in axes or [f"{axis}=4" for axis in shape.axes]:
        grown = shape
        for axis, factor in parse_sizes(text, (*AXES, "top_k"), float, option="--axes").items():
            _keep_sparsity(shape, axis, factor)
            grown = grown.along(axis, factor)
        if grown == shape:
            raise InputError(f"--axes: {text} is the base itself: a target has another size, e.g. {shape.axes[0]}=4")
        found[text] = moe_param.scale_config(base, **grown.sizes, model_class=model_class)
    return found


def _keep_sparsity(shape: Shape, axis: str, factor: float) -> None:
    """Refuses top_k by itself."""
    if axis == "top_k" and shape.sparsity is not None and shape.top_k and shape.num_experts:
        raise InputError(
            f"--axes: top_k={factor:g} alone would change the sparsity {shape.top_k}/{shape.num_experts}, which stays "
            f"along a transfer: num_experts={factor:g} takes top_k along ({shape.top_k * factor:g} of "
            f"{shape.num_experts * factor:g})"
        )


def read_arguments(
    args: TransferArguments, tuned: Tuned | None = None, training: Mapping[str, Any] | None = None
) -> tuple[ModelArguments, DataArguments, PretrainArguments]:
    """Those of training: the file's, or of `tuned`, with `training` over them.

    Raises:
        MoeParamError: a file that cannot be read, an unknown name, a value that is none.
    """
    given = dict(training or {})
    if args.smallest:
        given |= {"max_steps": 3, "per_device_train_batch_size": 2}
        given |= {"tokens": None, "batch_tokens": None} if tuned is not None else {}
    if tuned is None:
        typed = [text for name, value in given.items() for text in (f"--{name}", _typed(value))]
        return parse(["--config", args.config, "--output_dir", args.output_dir, *typed])
    numbers = {name: value for name, value in asdict(tuned.numbers).items() if value is not None}
    kinds = (DataArguments, PretrainArguments)
    names = [{f.name for f in fields(kind) if f.init} for kind in kinds]
    check_known(given, sorted(set().union(*names)), "argument", "training", InputError)
    data, training_args = (
        kind(**{name: value for name, value in {**numbers, **given}.items() if name in own})
        for kind, own in zip(kinds, names)
    )
    model = ModelArguments(
        model_type=tuned.base.model_type,
        overrides=overrides_of(tuned.base),
        spec=tuned.spec,
        init_std=tuned.init_std,
        constants={role: dict(kinds) for role, kinds in (tuned.constants or {}).items()} or None,
    )
    assert isinstance(data, DataArguments) and isinstance(training_args, PretrainArguments)
    return model, data, training_args


def _typed(value: Any) -> str:
    """A value as a command line has it."""
    return json.dumps(value) if isinstance(value, Mapping) else str(value)


def plan_runs(args: TransferArguments, tuned: Tuned | None = None, training: Mapping[str, Any] | None = None) -> Plan:
    """Reads the file, builds every target's plan under every spec.

    Raises:
        MoeParamError: whatever is wrong with the file, the axes or the specs.
    """
    model, data, arguments = read_arguments(args, tuned, training)
    base, _ = build_configs(model)
    template = short_run(model, data, arguments, base)
    if args.smallest:
        template = replace(template, validation_blocks=8)
    specs = tuple(args.specs or dict.fromkeys((model.spec or DEFAULT_SPEC, "standard")))
    configs = targets(base, args.axes)
    plans = {(spec, name): plan_of(template, configs[name], base, spec) for spec in specs for name in configs}
    first = specs[0]
    active = {name: active_parameters(plans[first, name])[1] for name in configs}
    tokens = template.steps * template.batch_size * template.seq_len
    flops = {
        name: run_flops(
            plans[first, name], template.seq_len, bool(config.get_text_config().tie_word_embeddings), tokens
        )
        for name, config in configs.items()
    }
    searches = tuple(searches_of(args, template, configs, active))
    for search in searches:
        plan_of(template, configs[search.target], base, search.spec)
    return Plan(
        template,
        configs,
        specs,
        frozenset(spec for spec in specs[1:] if numbers_of(plans[spec, "base"]) == numbers_of(plans[first, "base"])),
        active,
        flops,
        searches,
        base_runs(Path(args.config) if tuned is None else None, template.lr, args.base_runs),
        args.runner.devices(),
        tuple(arguments.imports),
    )


def plan_of(run: ShortRun, config: PretrainedConfig, base: PretrainedConfig, spec: str) -> Parameterization:
    """The rules of one target under one spec."""
    return moe_param.plan(
        model_class_for(base), config, base, spec=spec, init_std=run.init_std, constants=run.constants
    )


def numbers_of(plan: Parameterization) -> dict[str, tuple[Any, ...]]:
    """All that the training of a model takes from its rules."""
    return {name: (rule.init, rule.lr, rule.eps, rule.weight_decay, rule.muon) for name, rule in plan.rules.items()}


def searches_of(
    args: TransferArguments, run: ShortRun, configs: Mapping[str, PretrainedConfig], active: Mapping[str, int]
) -> Iterable[Search]:
    """With the base's constants, where it has any, and without, at every target that is asked for."""
    names = [name for name in configs if name != "base"]
    check_known(args.search_at, names, "target", "--search_at", InputError)
    chosen = args.search_at or [max(names, key=lambda name: active[name])]
    for target, spec in itertools.product(chosen, args.search):
        for constants in (True, False) if run.constants else (False,):
            stds = init_ladder(args.init_stds, run.init_std if constants else None)
            yield Search(spec, target, constants, tuple(args.octaves), stds, tuple(args.search_seeds))
