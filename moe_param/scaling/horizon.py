"""Batch size and number of tokens as scaling dimensions of Adam's settings. Off unless asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moe_param.errors import MoeParamError

EXPONENTS: Mapping[str, float] = {"lr": 0.5, "weight_decay": 0.5, "eps": -0.5, "beta": 1.0}
"""Exponents of κ = batch_ratio / tokens_ratio^(2·tokens_exponent); `beta` is the factor on 1 − β1 and on 1 − β2.

Along batch, lr, eps and beta are Adam's square root rule of arXiv:2205.10287, as its first author states it publicly.
Weight decay, and the same four along tokens, are arXiv:2512.22382 Table 1 second-hand: read in public implementations
that cite the table, not in the paper. Rederived here: lr·weight_decay·steps and (1 − β)·steps are constant along both.
tests/scaling/test_horizon.py checks the batch side by simulating a noisy quadratic; nothing here checks the tokens side
beyond these identities.
"""

TOKENS_EXPONENT = 0.0
"""lr ∝ tokens^−this at a fixed batch. The default is the paper's finding: with its schedule (a warm-up of fixed length,
then constant, or a decay to zero) numbers found on 1B tokens serve longer horizons as they are (arXiv:2601.20205,
Section 5.2). Others: 0.30 (arXiv:2608.20061, 463B to 10T tokens), 0.32 (arXiv:2603.28743), 1/2 by the square root rule
(arXiv:2512.22382, second-hand), which alone keeps lr·weight_decay·steps and (1 − β)·steps constant."""


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
                f"batch_ratio / tokens_ratio^(2·tokens_exponent) = {self.beta:g} takes betas {tuple(betas)} to "
                f"({first:.3g}, {second:.3g}): for these betas the square root rule ends at {limit:.3g}. Use a smaller "
                "batch, or larger betas at the base"
            )
        return first, second


def horizon_factors(
    batch_ratio: float = 1.0, tokens_ratio: float = 1.0, *, tokens_exponent: float = TOKENS_EXPONENT
) -> HorizonFactors:
    """What a batch `batch_ratio` times and a run `tokens_ratio` times the base's (both in tokens) ask of Adam.

    With κ = batch_ratio / tokens_ratio^(2·tokens_exponent): lr and weight decay ×√κ, eps ×1/√κ, 1 − β ×κ. So at a fixed
    batch lr ∝ tokens^−tokens_exponent: by default more tokens change nothing, and with 1/2 the same number of steps at
    a larger batch does not. Sources, and what of them was checked: `EXPONENTS`, `TOKENS_EXPONENT`.

    Raises:
        HorizonError: ratios that are not positive numbers, an exponent that is not in [0, 1].
    """
    for name, ratio in (("batch_ratio", batch_ratio), ("tokens_ratio", tokens_ratio)):
        if not (ratio > 0 and math.isfinite(ratio)):
            raise HorizonError(f"{name} is target / base and must be a positive number: got {ratio}")
    if not 0.0 <= tokens_exponent <= 1.0:
        raise HorizonError(f"tokens_exponent is {tokens_exponent}: expected 0 (the rate stays) to 1, 0.5 for √tokens")
    kappa = batch_ratio / tokens_ratio ** (2.0 * tokens_exponent)
    return HorizonFactors(**{name: kappa**exponent for name, exponent in EXPONENTS.items()})
