"""`ReloadExpertsCallback`: checkpoints that a plain `Trainer` loads with their experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_param.errors import MoeParamError


class ReloadError(MoeParamError):
    """A checkpoint that is not there, or not the one that the Trainer resumes from."""


class ReloadExpertsCallback(TrainerCallback):
    """Loads the whole checkpoint where `Trainer` loads all but the experts: resuming, and `load_best_model_at_end`.

    transformers saves experts in the layout of the family's published weights, and its Trainer loads a checkpoint with
    a plain, non-strict `load_state_dict`. Experts and routers whose names differ stay as they are, with a warning at
    most (huggingface/transformers#48805, open as of 5.23). `from_pretrained` converts them; this callback calls it
    after the Trainer has loaded. One process or DDP; under FSDP the Trainer keeps a file in the model's own layout and
    needs no help, and DeepSpeed keeps its own too. Adapters (PEFT) are the Trainer's as well.

    Args:
        resume_from: the folder given to `trainer.train(resume_from_checkpoint=…)`. Default: the folder in
            `args.resume_from_checkpoint`, else `output_dir/checkpoint-<step>`.

    Put it before callbacks that read weights when training begins, such as `LoadBalancingCallback`.
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _whole(kwargs["model"], args)
        if not state.global_step or model is None:
            return
        given = self.resume_from or args.resume_from_checkpoint
        written = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        folder = Path(given) if given and Path(given).is_dir() else written
        _reload(model, folder, resumed=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _whole(kwargs["model"], args)
        if args.load_best_model_at_end and state.best_model_checkpoint and model is not None:
            _reload(model, Path(state.best_model_checkpoint), resumed=False)


def _whole(model: torch.nn.Module, args: TrainingArguments) -> PreTrainedModel | None:
    """The model without its wrappers, or None where its weights are not all here or the Trainer loads them right."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    whole = isinstance(inner, PreTrainedModel) and not any(isinstance(p, DTensor) for p in inner.parameters())
    return inner if whole and not args.fsdp and not args.deepspeed else None


def _reload(model: PreTrainedModel, folder: Path, *, resumed: bool) -> None:
    """Copies the weights of a checkpoint into `model`; those of our own that transformers leaves out stay.

    Raises:
        ReloadError: no such folder, or when resuming one whose embedding is not what the Trainer has loaded.
    """
    if not folder.is_dir():
        raise ReloadError(
            f"{folder} is not there: training goes on from a checkpoint elsewhere, whose experts Trainer did not load "
            "(huggingface/transformers#48805). Name it: ReloadExpertsCallback(resume_from=folder), or "
            "trainer_arguments(args, resume_from=folder)"
        )
    loaded = type(model).from_pretrained(folder, dtype=model.dtype)
    theirs: Any = loaded.get_input_embeddings()
    ours: Any = model.get_input_embeddings()
    if resumed and not torch.equal(theirs.weight, ours.weight.to(theirs.weight)):
        raise ReloadError(
            f"{folder} is not the checkpoint that Trainer has loaded: its embedding is another. Name the one given to "
            "train(resume_from_checkpoint=…): ReloadExpertsCallback(resume_from=folder), or "
            "trainer_arguments(args, resume_from=folder)"
        )
    model.load_state_dict(loaded.state_dict(), strict=False)  # injected selection biases are not in `loaded`
