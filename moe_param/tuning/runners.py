"""What one run of a search is: a short run in the worker's own process, or a command of the user's.

A runner says how many runs fit on this machine at a time, and makes of a base what a worker calls with a point, a seed
and a watch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from moe_param.errors import InputError
from moe_param.tuned import import_modules
from moe_param.tuning.base import Base
from moe_param.tuning.commands import CommandRunner
from moe_param.tuning.ledger import cores
from moe_param.tuning.points import Point, split
from moe_param.tuning.short_run import ShortRun, check_run, train
from moe_param.tuning.workers import INDEX, Answer, Evaluate, Spent, Watch

__all__ = ["CommandRunner", "LoopRunner", "Runner"]


class Runner(Protocol):
    """What a trial's run is."""

    def workers(self) -> int:
        """Runs at a time on this machine, unless the user says."""

    def bind(self, base: Base) -> Evaluate:
        """What a worker calls; it pickles.

        Raises:
            MoeParamError: whatever would go wrong in every run, as far as can be told before the first.
        """


@dataclass(frozen=True)
class LoopRunner:
    """One run is one short training in a worker's own process.

    device: "auto" is every visible GPU, one worker each, or the CPU where there is none, one thread a worker. Or "cpu",
        "cuda" (every visible GPU) or "cuda:1" (that one).
    dtype: "auto" is bfloat16 (autocast over float32 weights) on GPUs that have it, float32 elsewhere. Or one of these.
    """

    device: str = "auto"
    dtype: str = "auto"

    def devices(self) -> tuple[str, ...]:
        """Those that runs take turns on.

        Raises:
            InputError: no GPU where one is asked for.
        """
        gpus = tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        if self.device == "auto":
            return gpus or ("cpu",)
        if self.device == "cuda":
            if not gpus:
                raise InputError("device is 'cuda': there is no GPU here, or this torch cannot use it; leave it out")
            return gpus
        return (self.device,)

    def workers(self) -> int:
        """One per GPU; one per core where there is none."""
        devices = self.devices()
        return cores() if devices == ("cpu",) else len(devices)

    def bind(self, base: Base) -> Evaluate:
        """See `Runner.bind`: a device that is not there or lacks the dtype, a text that cannot be read or is short."""
        return Loop(self.checked(base.run), self.devices(), base.imports)

    def checked(self, run: ShortRun) -> ShortRun:
        """The run on the first of the devices, in their dtype; it would do on all of them.

        Raises:
            MoeParamError: a device that is not there or lacks the dtype, a text that cannot be read or is short.
        """
        devices = self.devices()
        bf16 = devices[0].startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        run = replace(run, dtype=("bfloat16" if bf16 else "float32") if self.dtype == "auto" else self.dtype)
        for device in devices:
            check_run(replace(run, device=device))
        return replace(run, device=devices[0])


def own_device(devices: Sequence[str]) -> str:
    """The device of this worker process, which take turns."""
    return devices[int(os.environ.get(INDEX, "0")) % len(devices)]


@dataclass(frozen=True)
class Loop:
    """What a worker does with a point and a seed."""

    run: ShortRun
    devices: tuple[str, ...]
    imports: tuple[str, ...] = ()

    def __call__(self, point: Point, seed: int, watch: Watch) -> Answer:
        torch.set_num_threads(1)  # the workers are the parallelism
        import_modules(self.imports)
        device = own_device(self.devices)
        rate, std, constants = split(point)
        try:
            run = replace(self.run, device=device, lr=rate, init_std=std, constants=constants, seed=seed)
            outcome = train(run, watch)
        except Exception as error:
            failed = Answer(math.inf, failure=f"{type(error).__name__}: {' '.join(str(error).split())}")
            if device == "cpu":
                return failed
            raise Spent(failed) from error  # a GPU's context may be broken, or its memory held: another process goes on
        loss = outcome.training_loss if outcome.stopped else outcome.validation_loss
        return Answer(loss if math.isfinite(loss) else math.inf, outcome.share, outcome.stopped)
