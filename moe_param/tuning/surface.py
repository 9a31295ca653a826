"""What all runs together say of every number: a quadratic in octaves, held together by a prior.

A single run is noisy (0.02 nats on our demo base, with the same batches or not), as much as most constants are worth.
So no constant is judged by the two runs that tried it: all runs, of all constants, share one least-squares fit, whose
prior draws what a few runs cannot show towards nothing, and all constants move together to where the fit is lowest.

All offsets are octaves, log2 of the factor to the point that the stage began at; losses are logarithms, so that the
priors are shares of the loss. (Box & Wilson 1951, with one number moved at a time: moved together at random, the
interplay of the numbers scattered our losses by 7%.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NOISE, SLOPE, CURVATURE, CURVATURE_SPREAD = 0.015, 0.02, 0.005, 0.004
"""What is taken for likely, as shares of the loss: a run's noise (standard deviation), a slope per octave (about 0), a
curvature per square octave and its spread. From a few hundred runs of the demo's base."""

FLATTEST = 0.002
"""The least curvature that a step is computed with: what looks flat is not left for a far minimum."""

STEEPEST = 0.08
"""Of the loss: what is worse than the best by more counts as this much. Beyond a cliff nothing is quadratic."""


@dataclass(frozen=True)
class Quadratic:
    """log loss ≈ constant + Σ slope·x + curvature·x², x in octaves; (numbers,) each. `covariance`: of both, stacked."""

    slope: Array
    curvature: Array
    covariance: Array
    noise: float  # standard deviation of a run's log loss around the fit
    freedom: float  # degrees of freedom of that

    def lowest(self, around: Array, reach: float) -> Array:
        """Where it is lowest, no farther than `reach` octaves from `around` along any number."""
        return np.clip(-self.slope / (2 * np.maximum(self.curvature, FLATTEST)), around - reach, around + reach)

    def gain(self, at: Array) -> tuple[Array, Array]:
        """How much lower each number makes the log loss by being at `at`, and the standard error of that."""
        n = len(at)
        gain = -(self.slope * at + self.curvature * at**2)
        slopes, curvatures = np.diag(self.covariance)[:n], np.diag(self.covariance)[n:]
        mixed = np.diag(self.covariance[:n, n:])
        return gain, np.sqrt(at**2 * slopes + 2 * at**3 * mixed + at**4 * curvatures)


def fit(offsets: Sequence[Array], losses: Sequence[float], seeds: Sequence[int]) -> Quadratic:
    """The quadratic of all runs so far; each seed has a level of its own.

    Args:
        offsets: (numbers,) of each run. losses: nats; at least one is finite. seeds: of each run.
    """
    x = np.stack(list(offsets))
    n = x.shape[1]
    best = min(losses)
    y = np.log([min(loss, best * (1 + STEEPEST)) for loss in losses])
    levels = np.array([[seed == other for other in sorted(set(seeds))] for seed in seeds], np.float64)
    known = np.column_stack([x, x**2, levels]) / NOISE
    prior = np.diag([1 / SLOPE] * n + [1 / CURVATURE_SPREAD] * n + [1e-9] * levels.shape[1])
    expected = np.concatenate([np.zeros(n), np.full(n, CURVATURE / CURVATURE_SPREAD), np.zeros(levels.shape[1])])
    rows, values = np.vstack([known, prior]), np.concatenate([y / NOISE, expected])
    found = np.linalg.lstsq(rows, values, rcond=None)[0]
    covariance = np.linalg.inv(rows.T @ rows)
    freedom = max(1.0, len(y) - float(np.trace(known @ covariance @ known.T)))  # runs less what the fit took of them
    left = known @ found * NOISE - y
    noise = float(np.sqrt(left @ left / freedom))
    return Quadratic(found[:n], found[n : 2 * n], covariance[: 2 * n, : 2 * n], noise, freedom)
