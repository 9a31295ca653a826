"""Learning-rate schedules that keep the ratios between groups, which are the parameterization."""

from __future__ import annotations

from moe_param.optim.adam import OptimizerError

RATIO_BREAKING_SCHEDULES = ("reduce_lr_on_plateau", "ReduceLROnPlateau", "greedy", "GreedyLR")
"""Schedules that set learning rates by a floor or a probe per group, so that ratios between groups drift."""


def check_schedule(name: str) -> None:
    """Refuses learning-rate schedules that would change the ratios between groups.

    Raises:
        OptimizerError: for ReduceLROnPlateau and Greedy, by the name transformers gives them.
    """
    name = str(getattr(name, "value", name))  # transformers' SchedulerType is an enum
    if name in RATIO_BREAKING_SCHEDULES:
        raise OptimizerError(
            f"the schedule {name} sets each group's learning rate by itself, so the ratios between groups, which are "
            "the parameterization, would drift: use a multiplicative schedule (constant, linear, cosine, wsd)"
        )
