"""What `TrainingArguments` ask of the optimizer: taken, or refused, never ignored."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_param.optim.adam import DEFAULT_BETAS, DEFAULT_EPS, OptimizerError
from moe_param.optim.schedules import check_schedule

if TYPE_CHECKING:
    from moe_param.tuned import TunedNumbers

NUMBERS: dict[str, float | None] = {
    "learning_rate": None,
    "adam_epsilon": DEFAULT_EPS,
    "adam_beta1": DEFAULT_BETAS[0],
    "adam_beta2": DEFAULT_BETAS[1],
    "weight_decay": 0.0,
}
"""The numbers of `TrainingArguments` that are ours to read, and what holds where nobody says anything."""

OPTIMS = ("adamw_torch", "adamw_torch_fused")
"""`TrainingArguments.optim` that we build. Others are classes: optimizer=…, adam_like=True."""


def choose_numbers(
    args: TrainingArguments, tuned: TunedNumbers | None, given: dict[str, float | None]
) -> dict[str, float]:
    """Decides each number.

    `TrainingArguments` do not tell a default from the same number said on purpose. So a number at its default counts as
    not said, and one that is `given` here always holds. Said numbers may not contradict each other.

    Raises:
        OptimizerError: two different numbers for one thing, or no learning rate.
    """
    chosen = {}
    for name, default in NUMBERS.items():
        unsaid = type(args).__dataclass_fields__[name].default
        ours, found, theirs = given.get(name), getattr(args, name), getattr(tuned, name, None)
        said = None if found == unsaid else found
        if ours is not None and said not in (None, ours):
            raise OptimizerError(
                f"{name} is {ours:g} in trainer_arguments and {said:g} in args: leave it to one of them"
            )
        if ours is None and None not in (said, theirs) and said != theirs:
            raise OptimizerError(
                f"args.{name} is {said:g}, and {theirs:g} was tuned at the base: leave it unset, or say that yours is "
                "meant by giving it to trainer_arguments"
            )
        number = next((n for n in (ours, said, theirs, default) if n is not None), None)
        if number is None:
            raise OptimizerError(
                f"no learning rate: none was tuned, and args.learning_rate is {found:g}, which is what "
                f"{type(args).__name__} has where nobody says anything. Set the base's, or say it: "
                f"trainer_arguments(args, lr={found:g})"
            )
        chosen[name] = number
    return chosen


def check_arguments(args: TrainingArguments) -> None:
    """Refuses what a Trainer would do to the parameterization, or would not do though it is asked.

    Raises:
        OptimizerError: another optimizer, a schedule that breaks the ratios of groups, clipping by a norm that does not
            transfer, DeepSpeed.
    """
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in OPTIMS or args.optim_args:
        asked = f"optim {optim!r}" if optim not in OPTIMS else f"optim_args {args.optim_args!r}"
        raise OptimizerError(
            f"{asked} would be ignored: trainer_arguments builds the optimizer. Leave it unset ({' and '.join(OPTIMS)} "
            "work) and give trainer_arguments optimizer= a class and the options it takes"
        )
    check_schedule(args.lr_scheduler_type)
    if args.max_grad_norm:
        raise OptimizerError(
            f"max_grad_norm {args.max_grad_norm:g} (Trainer's default is 1) clips a norm that changes with the shape, "
            "so it does not transfer: set max_grad_norm=0, and for clipping that does, "
            f"trainer_arguments(args, clip={args.max_grad_norm:g})"
        )
    if args.deepspeed:
        raise OptimizerError("DeepSpeed rebuilds groups and rates by a configuration of its own: use FSDP2 or DDP")


class AgreementCallback(TrainerCallback):
    """When training begins: the optimizer has the groups that `args` ask for, and `args` still ask for them.

    A resumed optimizer brings the numbers of its checkpoint along, and Trainer keeps those without a word.
    """

    def __init__(self, numbers: dict[str, float], groups: Any) -> None:
        self.numbers, self.groups = numbers, groups

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        check_arguments(args)
        for name, number in self.numbers.items():
            if getattr(args, name) != number:
                raise OptimizerError(
                    f"args.{name} was {number:g} in trainer_arguments and is {getattr(args, name):g} now, which the "
                    "optimizer does not have: set it before"
                )
        wanted = {name: group for group in self.groups(kwargs["model"]) for name in group["names"]}
        optimizer: torch.optim.Optimizer = kwargs["optimizer"]
        found = {name: group for group in optimizer.param_groups for name in group.get("names", ())}
        if wanted.keys() != found.keys():
            raise OptimizerError(
                "the optimizer does not train the parameters of this parameterization: give Trainer everything that "
                "trainer_arguments returned, and freeze parameters before training"
            )
        for name, group in found.items():
            ours = {**group, "lr": group.get("initial_lr", group["lr"])}  # a scheduler moves lr and keeps this
            for key in ("lr", "eps", "weight_decay", "betas"):
                if not _close(ours[key], wanted[name][key]):
                    raise OptimizerError(
                        f"{key} of {name} is {ours[key]} in the optimizer and {wanted[name][key]} by the arguments"
                        + ("; a resumed run has its checkpoint's: set them back" if state.global_step else "")
                    )


def _close(a: Any, b: Any) -> bool:
    pairs = zip(a, b, strict=True) if isinstance(a, (tuple, list)) else [(a, b)]
    return all(math.isclose(x, y, rel_tol=1e-9) for x, y in pairs)
