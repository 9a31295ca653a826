"""What a search can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from moe_param.errors import InputError
from moe_param.training.arguments import mapping

MODES = ("stages", "grid", "tpe", "gp", "cmaes", "coordinate")

BUDGET = 75.0
"""Runs of the base that a search may cost unless it is told; docs/tune.md says what that finds."""

PAPER_START = {
    "attention_value.init": 1 / 16,
    "expert_down.init": 1 / 4,
    "attention_in.lr": 1 / 16,
    "attention_value.lr": 1 / 16,
    "router.lr": 1 / 16,
    "expert_down.lr": 1 / 16,
}
"""Constants of the paper's own base (arXiv:2601.20205, Appendix D.1), as read in its senior author's public code."""

STARTS = {"config": {}, "paper": PAPER_START}


@dataclass
class TuneArguments:
    """The search. Everything else is training's: --overrides, --max_steps, --seq_len, --output_dir, …"""

    config: str | None = field(default=None, metadata={"help": "YAML file: model, text, horizon."})
    mode: str | None = field(
        default=None,
        metadata={
            "help": "stages: rate and init std, constants, ladder; grid; tpe, gp, cmaes: Optuna's; coordinate: "
            "one pass over the constants, every run with all seeds. Default: stages, or grid where a ladder is given."
        },
    )
    budget: str | None = field(
        default=None,
        metadata={
            "help": f"What the search may cost: full runs of the base, or a percentage of one run at --shape. Default: "
            f"{BUDGET:g} runs. Not for grid and coordinate, whose runs are what they list."
        },
    )
    start: str = field(
        default="config", metadata={"help": "stages: begin with the config's numbers, or the paper's constants."}
    )
    command: str | None = field(
        default=None,
        metadata={
            "help": "Your own training script as what a run is: 'accelerate launch train.py --tuned {trial} --seed "
            "{seed}'. It calls moe_param.apply(model, trial) and moe_param.report(loss). Default: a plain loop of ours."
        },
    )
    limit: float | None = field(
        default=None, metadata={"help": "Seconds that a run may take; longer ones are ended, and count as failed."}
    )
    gpus_per_run: int = field(default=1, metadata={"help": "command: how many of the visible GPUs a run gets."})
    device: str = field(
        default="auto", metadata={"help": "Where runs train: auto (every GPU, else the CPU), cpu, cuda."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto (bfloat16 on a GPU, else float32), float32, bfloat16."})
    storage: str | None = field(
        default=None,
        metadata={
            "help": "Optuna storage: sqlite:///FILE, postgresql://USER:PASSWORD@HOST/NAME for many machines, "
            "journal:FILE on a shared file system. Default: study.db in output_dir."
        },
    )
    study: str = field(default="sweep", metadata={"help": "Name of the study in the storage."})
    workers: int = field(
        default=0,
        metadata={"help": "Runs at a time on this machine. Default: one per GPU, or per core, at most 8."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Of weights and batches. Every candidate is trained with the first, what may win with all."},
    )
    log2_lrs: list[float] = field(
        default_factory=list,
        metadata={"help": "Learning rates, as powers of 2 (samplers: the range). Default: 2^±3 around the config's."},
    )
    init_stds: list[float] = field(
        default_factory=list, metadata={"help": "Init stds (samplers: the range). Default: the config's own."}
    )
    ladders: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Constants to try, JSON: {"router": {"lr": [0.25, 1, 4]}} (samplers: the range).'},
    )
    trials: int | None = field(
        default=None, metadata={"help": "tpe, gp, cmaes: how many points. Default: what the budget allows."}
    )
    roles: list[str] = field(
        default_factory=list,
        metadata={"help": "Whose constants are searched; none: no constants. Default: all of the model's roles."},
    )
    factors: list[float] = field(
        default_factory=lambda: [0.25, 4.0], metadata={"help": "coordinate: the steps of a constant."}
    )
    error_rate: float = field(
        default=0.05, metadata={"help": "coordinate: how often a pass may take noise for a gain."}
    )
    heartbeat: float = field(default=5.0, metadata={"help": "Seconds between two signs of life of this process."})
    grace: float = field(
        default=60.0, metadata={"help": "Seconds without one after which its trials are run by someone else."}
    )

    def __post_init__(self) -> None:
        ladders = mapping("ladders", self.ladders)
        self.ladders = {
            f"{role}.{kind}": values
            for role, kinds in ladders.items()
            for kind, values in (kinds.items() if isinstance(kinds, dict) else [("", kinds)])
        }
        if self.mode is None:
            self.mode = "grid" if self.log2_lrs or self.init_stds or self.ladders else "stages"
        if self.mode not in MODES:
            raise InputError(f"mode is {self.mode!r}: expected one of {', '.join(MODES)}")
        if self.start not in STARTS:
            raise InputError(f"start is {self.start!r}: expected one of {', '.join(STARTS)}")
        self._check_lists(self.ladders)
        self._check_numbers()
        self._check_rates()
        self._check_unused()
        self.runs(1.0)

    def runs(self, share: float | None) -> float:
        """The budget in full runs of the base.

        Args:
            share: FLOPs of a run at the base over those at the target; None where there is no target.

        Raises:
            InputError: no number, or a percentage without a target.
        """
        text = (self.budget or f"{BUDGET:g}").strip()
        try:
            value = float(text.removesuffix("%"))
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise InputError(
                f"budget is {self.budget!r}: expected a number of runs, 75, or a share of a target run, 25%"
            )
        if not text.endswith("%"):
            return value
        if share is None:
            raise InputError(f"budget {text} is a share of a run at --shape, which is not given")
        return value / 100 / share

    def _check_lists(self, ladders: dict[str, Any]) -> None:
        lists: dict[str, Any] = {"seeds": self.seeds, "factors": self.factors, **ladders}
        for name, values in lists.items():
            if not isinstance(values, list) or not values:
                raise InputError(f"{name} is {values!r}: an empty ladder; expected a list with at least one value")
        positive = {"factors": self.factors, "init_stds": self.init_stds, **ladders}
        for name, values in positive.items():
            for value in values:
                if not isinstance(value, int | float) or not 0 < value < math.inf:
                    raise InputError(f"{name}: {value!r} is not a positive number")

    def _check_numbers(self) -> None:
        least = {
            "workers": 0,
            "gpus_per_run": 1,
            "trials": 1,
            "heartbeat": 0.01,
            "grace": 2 * self.heartbeat,
            "limit": 1e-3,
        }
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(f"{name} is {value}: expected at least {smallest:g}")
        if not 0 < self.error_rate < 1:
            raise InputError(f"error_rate is {self.error_rate}: expected a number between 0 and 1")
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds {self.seeds}: the same seed twice is the same run twice")
        if self.mode == "coordinate" and len(self.seeds) < 2:
            raise InputError("mode coordinate compares over seeds: give at least two (--seeds 0 1 2)")

    def _check_rates(self) -> None:
        for value in self.log2_lrs:
            if not -1000 <= value < math.inf:  # 0, infinite or not a number as a rate
                raise InputError(f"log2_lrs: {value:g} is no power of 2 that a learning rate can be")
            if value > 0:  # 0.0078125 is a learning rate, 7 a forgotten sign
                meant = round(math.log2(value), 2) if value < 1 else -value
                raise InputError(
                    f"log2_lrs: {value:g} would be a learning rate of 2^{value:g} = {2**value:.3g}; these are "
                    f"powers of 2: did you mean {meant:g}?"
                )

    def _check_unused(self) -> None:
        ladders = ("log2_lrs", "init_stds", "ladders")
        unused = {
            "stages": (*ladders, "trials", "factors", "error_rate"),
            "grid": ("roles", "trials", "factors", "error_rate", "budget", "start"),
            "coordinate": (*ladders, "trials", "budget", "start"),
        }.get(str(self.mode), ("factors", "error_rate", "start"))
        not_for = {name: f"for mode {self.mode}" for name in unused}
        if self.command is not None:
            not_for |= dict.fromkeys(("device", "dtype"), "for runs that are a command")
        else:
            not_for["gpus_per_run"] = "for runs in our loop, without a command"
        for given in fields(self):
            default = given.default_factory() if callable(given.default_factory) else given.default
            if given.name in not_for and getattr(self, given.name) not in (default, {}):
                raise InputError(f"{given.name} is not {not_for[given.name]}: leave it out")
