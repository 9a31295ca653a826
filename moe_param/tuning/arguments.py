"""What a search can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from moe_param.errors import InputError
from moe_param.training.arguments import mapping
from moe_param.tuning.ledger import cores

MODES = ("grid", "tpe", "coordinate")


@dataclass
class TuneArguments:
    """The search. Everything else is training's: --overrides, --max_steps, --seq_len, --output_dir, …"""

    config: str | None = field(default=None, metadata={"help": "YAML file: model, text, horizon."})
    mode: str = field(default="grid", metadata={"help": "grid, tpe, or coordinate: one pass over role constants."})
    storage: str | None = field(
        default=None,
        metadata={
            "help": "Optuna storage: sqlite:///FILE, postgresql://USER:PASSWORD@HOST/NAME for many machines, "
            "journal:FILE on a shared file system. Default: study.db in output_dir."
        },
    )
    study: str = field(default="sweep", metadata={"help": "Name of the study in the storage."})
    workers: int = field(
        default_factory=lambda: min(8, cores()),
        metadata={"help": "Runs at a time on this machine, one thread each."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Every point is trained with each; losses are averaged."}
    )
    log2_lrs: list[float] = field(
        default_factory=list,
        metadata={"help": "Learning rates, as powers of 2 (tpe: the range). Default: 2^±3 around the config's."},
    )
    init_stds: list[float] = field(
        default_factory=list, metadata={"help": "Init stds (tpe: the range). Default: the config's own."}
    )
    ladders: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Constants to try, JSON: {"router": {"lr": [0.25, 1, 4]}} (tpe: the range).'},
    )
    trials: int = field(default=30, metadata={"help": "tpe: how many points."})
    roles: list[str] = field(
        default_factory=list, metadata={"help": "coordinate: whose constants. Default: all of the model's roles."}
    )
    factors: list[float] = field(
        default_factory=lambda: [0.25, 4.0], metadata={"help": "coordinate: the steps of a constant that are tried."}
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
        if self.mode not in MODES:
            raise InputError(f"mode is {self.mode!r}: expected one of {', '.join(MODES)}")
        self._check_lists(self.ladders)
        self._check_numbers()
        self._check_rates()
        self._check_unused()

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
        for name, least in (("workers", 1), ("trials", 1), ("heartbeat", 0.01), ("grace", 2 * self.heartbeat)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: expected at least {least:g}")
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
        unused = {
            "grid": ("roles", "trials", "factors", "error_rate"),
            "tpe": ("roles", "factors", "error_rate"),
            "coordinate": ("log2_lrs", "init_stds", "ladders", "trials"),
        }[self.mode]
        for given in fields(self):
            default = given.default_factory() if callable(given.default_factory) else given.default
            if given.name in unused and getattr(self, given.name) not in (default, {}):
                raise InputError(f"{given.name} is not for mode {self.mode}: leave it out")
