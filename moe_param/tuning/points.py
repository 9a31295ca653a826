"""The words of a search: points, runs, results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Point = dict[str, float]
"""`learning_rate`, `init_std` and constants as `router.lr`; what is not in it is the base's own (constants: 1)."""

Losses = tuple[float, ...]
"""One loss per seed, always in the same order; inf where a run diverged."""


ENDED = ("complete", "diverged", "stopped", "failed")
"""States of a run that cost something and is a result."""


class Result(NamedTuple):
    """What a run came to: held-out loss (nats per token; inf where it diverged, failed or was stopped), and the share
    of its steps that were done, more than 1 for one that was stopped and then run whole."""

    loss: float
    share: float = 1.0
    stopped: bool = False


Results = Mapping[str, Mapping[int, Result]]
"""key of a point → seed → result."""


def canonical(point: Mapping[str, float]) -> Point:
    """Sorted, without constants of 1, rounded so that ×4 and then ×1/4 is the point one started from."""
    rounded = {name: float(f"{value:.9g}") for name, value in sorted(point.items())}
    return {name: value for name, value in rounded.items() if "." not in name or value != 1.0}


def key_of(point: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.9g}" for name, value in canonical(point).items())


def moved(point: Point, name: str, factor: float) -> Point:
    return canonical({**point, name: point.get(name, 1.0) * factor})


def without_rate(point: Mapping[str, float]) -> str:
    """The key of the rest of a point."""
    return key_of({name: value for name, value in point.items() if name != "learning_rate"})


def split(point: Mapping[str, float]) -> tuple[float, float | None, dict[str, dict[str, float]] | None]:
    """(learning rate, init std, constants) as `moe_param.apply` takes them."""
    constants: dict[str, dict[str, float]] = {}
    for name, value in point.items():
        if "." in name:
            role, kind = name.split(".")
            constants.setdefault(role, {})[kind] = value
    return point["learning_rate"], point.get("init_std"), constants or None


def with_numbers(document: Mapping[str, Any], point: Mapping[str, float]) -> dict[str, Any]:
    """What tuned.yaml holds: `document` with the numbers of a point in their places, without what is None."""
    rate, std, constants = split(point)
    numbers = {"learning_rate": rate, "init_std": std, "constants": constants}
    values = {name: numbers.get(name, value) for name, value in document.items()}
    return {name: value for name, value in values.items() if value is not None}


def over_seeds(results: Results, seeds: Sequence[int]) -> dict[str, Losses]:
    """The losses of every point that is decided: all its seeds are known, or one of them diverged, which decides."""
    found: dict[str, Losses] = {}
    for key, of_seed in results.items():
        if any(seed in of_seed and of_seed[seed].loss == math.inf for seed in seeds):
            found[key] = (math.inf,)
        elif all(seed in of_seed for seed in seeds):
            found[key] = tuple(of_seed[seed].loss for seed in seeds)
    return found


def mean_loss(results: Results, key: str) -> float:
    """Over the seeds that are known."""
    return statistics.fmean(result.loss for result in results[key].values())
