"""The processes of a launched run: one group before the first step, and an orderly end."""

from __future__ import annotations

import gc
import os
import traceback

import datasets
import torch.distributed as dist
import transformers
from accelerate import PartialState

from moe_param.errors import InputError

LAUNCHED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where torchrun, accelerate, Open MPI, MPICH, MVAPICH and srun say how many processes they started."""


def require_one_group(state: PartialState) -> None:
    """Refuses processes that were launched together and do not know of each other: each would train on its own.

    Raises:
        InputError: a launcher started more processes than `state` counts.
    """
    for name in LAUNCHED:
        launched = os.environ.get(name, "1")
        if launched.isdecimal() and int(launched) > state.num_processes:
            raise InputError(
                f"{launched} processes were launched ({name}), but this one is in a group of {state.num_processes}: "
                "each would train a model of its own. Launch with accelerate (recipes/accelerate) or torchrun, on CPUs "
                f"with --use_cpu; or start one process, with {name} unset"
            )


def quiet_but_first(state: PartialState) -> None:
    """Leaves progress bars to the first process."""
    if not state.is_main_process:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def shutdown(error: BaseException | None = None) -> None:
    """Leaves the process group, if there is one: drop what it worked on, wait for the others, destroy it.

    gloo's threads keep tensors of collectives that are done. Where the interpreter ends before them, Python references
    are dropped from a thread without it, and the process dies of SIGABRT after its work (pytorch/pytorch#190489).
    Call it where no variable holds the model any more.

    Args:
        error: what ended the work; what its frames hold is dropped, and nobody waits for processes that may be gone.
    """
    if error is not None:
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    if dist.is_initialized():
        if error is None:
            dist.barrier()
        dist.destroy_process_group()
