"""Losses that cost nothing, for tests of the search; imported by its worker processes, so nothing heavy here."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from moe_param.tuning.workers import Answer, Watch


@dataclass(frozen=True)
class Bowl:
    """Lowest at `bottom` (learning rate 2^-7, constants of 1), parabolic in octaves, with noise of its own per seed."""

    bottom: dict[str, float] = field(default_factory=dict)
    noise: float = 0.0
    curvature: float = 0.02
    diverges_above: float = math.inf  # learning rate
    log: Path | None = None  # a line for every run
    kills: dict[float, int] = field(default_factory=dict)  # learning rate → how often it kills its worker
    folder: Path | None = None  # where the kills are counted
    wait_for: int = 0  # processes that must have begun, counted by files in `folder`
    seconds: float = 0.0
    salt: int = 0  # for other noise
    raises_at: float | None = None  # learning rate
    fails_above: float = math.inf  # learning rate: the run says that it failed
    looks: int = 0  # times that a run says how it goes

    def __call__(self, point: dict[str, float], seed: int, watch: Watch) -> Answer:
        if self.log:
            with self.log.open("a") as file:
                file.write(f"{point['learning_rate']:.6g} {seed}\n")
        rate = point["learning_rate"]
        if rate == self.raises_at:
            raise RuntimeError("out of memory")
        time.sleep(0 if self.looks else self.seconds)
        if self.folder:
            (self.folder / f"process-{os.getppid()}").write_text(str(os.getpid()))
            while len(list(self.folder.glob("process-*"))) < self.wait_for:
                time.sleep(0.02)
            for i in range(self.kills.get(rate, 0)):
                try:
                    (self.folder / f"kill-{rate}-{i}").open("x").close()
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
        if rate > self.fails_above:
            return Answer(math.inf, 0.1, failure="out of memory")
        if rate > self.diverges_above:
            return Answer(math.nan)
        for look in range(1, self.looks + 1):
            share = look / self.looks
            time.sleep(self.seconds / self.looks)
            if not watch(share, self.loss(point, seed) + 1 - share) and share < 1:
                return Answer(self.loss(point, seed) + 1 - share, share, stopped=True)
        return Answer(self.loss(point, seed))

    def loss(self, point: dict[str, float], seed: int) -> float:
        bottom = {"learning_rate": 2.0**-7, **self.bottom}
        names = bottom.keys() | point.keys()
        octaves = [math.log2(point.get(name, 1.0) / bottom.get(name, 1.0)) for name in names]
        chance = random.Random(f"{sorted(point.items())} {seed} {self.salt}")
        shared = 0.05 * random.Random(seed).gauss(0, 1)  # what a seed does to every point
        return 2.0 + self.curvature * sum(o * o for o in octaves) + shared + self.noise * chance.gauss(0, 1)
