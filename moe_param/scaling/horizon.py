"""Batch size and number of tokens as scaling dimensions of Adam's settings. Off unless asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moe_param.errors import MoeParamError

EXPONENTS: Mapping[str, float] = {"lr": 0.5, "weight_decay": 0.5, "eps": -0.5, "beta": 1.0}
"""Exponents of κ = batch_ratio / tokens_ratio; `beta` is the factor on 1 − β1 and on 1 − β2.

Along batch, lr, eps and beta are Adam's square root rule of arXiv:2205.10287, as its first author states it publicly.
Weight decay, and the same four along tokens, are arXiv:2512.22382 Table 1 second-hand: read in public implementations
that cite the table, not in the paper. Rederived here: lr·weight_decay·steps and (1 − β)·steps are constant along both.
tests/scaling/test_horizon.py checks the batch side by simulating a noisy quadratic; nothing here checks the tokens side
beyond these identities.
"""


class HorizonError(MoeParamError):
    """Ratios of batch or tokens for which the rules say nothing."""


@dataclass(frozen=True)
class HorizonFactors:
    """Factors on the base's lr, weight decay and eps, and on 1 − β of both of Adam's betas."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
    beta: float = 1.0

    def betas(self, betas: tuple[float, float]) -> tuple[float, float]:
        """Adam's betas at the target.

        Raises:
            HorizonError: a batch so much larger than the base's that the memory of a beta would be less than a step.
        """
        first, second = (1.0 - self.beta * (1.0 - beta) for beta in betas)
        if first < 0.0 or second < 0.0:
            limit = 1.0 / (1.0 - min(betas))
            raise HorizonError(
                f"batch_ratio / tokens_ratio = {self.beta:g} takes betas {tuple(betas)} to ({first:.3g}, "
                f"{second:.3g}): for these betas the square root rule ends at {limit:.3g}. Use a smaller batch, or "
                "larger betas at the base"
            )
        return first, second


def horizon_factors(batch_ratio: float = 1.0, tokens_ratio: float = 1.0) -> HorizonFactors:
    """What a batch `batch_ratio` times and a run `tokens_ratio` times the base's (both in tokens) ask of Adam.

    With κ = batch_ratio / tokens_ratio: lr and weight decay ×√κ, eps ×1/√κ, 1 − β ×κ. The same number of steps at a
    larger batch is κ = 1: nothing changes. Sources, and what of them was checked: see `EXPONENTS`.

    Raises:
        HorizonError: ratios that are not positive numbers.
    """
    for name, ratio in (("batch_ratio", batch_ratio), ("tokens_ratio", tokens_ratio)):
        if not (ratio > 0 and math.isfinite(ratio)):
            raise HorizonError(f"{name} is target / base and must be a positive number: got {ratio}")
    kappa = batch_ratio / tokens_ratio
    return HorizonFactors(**{name: kappa**exponent for name, exponent in EXPONENTS.items()})
