"""transformers' Trainer with what a long run needs: exact resuming, whole checkpoints, balance and speed logged."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import SaveStrategy, rotate_checkpoints

from moe_param import LoadBalancingCallback, ScaleFreeClipping
from moe_param.balancing.saved import load_selection_biases
from moe_param.balancing.selection import selection_of
from moe_param.training.arguments import PretrainArguments
from moe_param.training.balance import balance_of
from moe_param.training.checkpoints import (
    PROGRESS,
    STAGING,
    CheckpointError,
    checkpoints,
    publish,
    read_progress,
    reason,
)
from moe_param.training.data.batches import Batches
from moe_param.training.data.streams import Position
from moe_param.training.nonfinite import NonFiniteError, first_nonfinite
from moe_param.training.report import Speed

logger = logging.getLogger(__name__)

# What torch's checkpoints say of a run of one process, twice at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

OPTIMIZER, SCHEDULER = "optimizer", "scheduler.pt"
PATIENCE = 20
"""Steps skipped in a row after which `nan: skip` gives up: the weights will not come back."""


class Balancing(LoadBalancingCallback):
    """Balances; logging and saving are the trainer's, so that every integration logs it and every checkpoint has it."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.balancer is not None
        optimizer = kwargs["optimizer"]
        if optimizer is not None and getattr(optimizer, "skipped_nonfinite", False):
            self.balancer.discard()
        else:
            super().on_optimizer_step(args, state, control, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        pass


class Clipping(ScaleFreeClipping):
    """Clips steps that are taken; logging is the trainer's."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not getattr(kwargs["optimizer"], "skipped_nonfinite", False):
            super().on_pre_optimizer_step(args, state, control, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


def balancing(model: PreTrainedModel, args: PretrainArguments) -> Balancing | None:
    """The callback of what `balance_of` finds. None: nothing to count."""
    found = balance_of(model, args.balance_rate, args.inject_bias)
    if found.note:
        logger.warning("%s", found.note)
    if found.rate is None:
        return None
    rule: Any = args.balance_rule
    return Balancing(found.rate, rule, inject=found.inject)


def allow_fsdp_on_cpu() -> None:
    """Makes accelerate shard on the CPU where it was asked to: as of 1.15 it trains with DDP there, without a word."""
    state = PartialState()
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # the branch that looks for FSDP; the device stays the CPU


class MoETrainer(Trainer):
    """Trainer whose checkpoints come back whole.

    transformers writes experts in the layout of the family's published weights, but resumes with a plain,
    non-strict `load_state_dict`: experts and routers would silently restart from their initialization
    (huggingface/transformers#48805, open as of 5.23). `from_pretrained` converts them.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        model = model or self.model
        sharded = self.is_fsdp_enabled
        state: dict[str, Any] = {}
        if not sharded or self.is_world_process_zero():
            saved = AutoModelForCausalLM.from_pretrained(resume_from_checkpoint, dtype=model.dtype)
            if any(selection_of(module) for module in model.modules()):  # otherwise the callback takes them from there
                load_selection_biases(saved)
            state = saved.state_dict()
        if sharded:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(model, state, options=options)
        else:
            model.load_state_dict(state)


class PretrainTrainer(MoETrainer):
    """Trainer with our batches, checkpoints and log.

    A checkpoint is the same whether one process wrote it or many, under DDP or FSDP2: the weights as `from_pretrained`
    takes them, the optimizer by parameter name in torch's distributed format, and `progress.json`. So it can be
    continued on another number of processes.
    """

    args: PretrainArguments
    model: Any  # set from the start, unlike what Trainer's own annotations allow for
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: PreTrainedModel,
        args: PretrainArguments,
        *,
        batches: Batches,
        speed: Speed,
        clipping: Clipping | None = None,
        **kwargs: Any,
    ) -> None:
        self.balancing, self.clipping = balancing(model, args), clipping
        args.ignore_data_skip = True  # our batches begin where the checkpoint ends
        own = [callback for callback in (self.balancing, clipping) if callback is not None]
        callbacks = [*own, *kwargs.pop("callbacks", [])]
        # Trainer refuses checkpoints of models that were sharded while loading, as it cannot resume them; we can.
        strategy = args.save_strategy
        if getattr(model, "is_distributed_loading_by_transformers", False):
            args.save_strategy = SaveStrategy.NO
        super().__init__(model, args, train_dataset=batches.data, callbacks=callbacks, **kwargs)
        args.save_strategy = strategy
        self.batches = replace(
            batches,
            process=args.process_index,
            workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        self.speed = speed
        self.positions: dict[int, Position] = {}
        self.skipped = self.skipped_in_a_row = 0
        self._window = [0, 0]  # optimizer steps since the last log, and those of them that were skipped
        self._inputs: list[dict[str, Any]] = []  # of this optimizer step
        self._good_loss: torch.Tensor | float = 0.0
        self._staging: str | None = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_distributed_loading_by_transformers:  # such a model was sharded while it was loaded
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def create_accelerator_and_postprocess(self) -> None:
        allow_fsdp_on_cpu()
        super().create_accelerator_and_postprocess()

    # -- data ----------------------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(resume_from_checkpoint, str):
            progress = read_progress(Path(resume_from_checkpoint))
            positions = {int(lane): Position(**where) for lane, where in progress["positions"].items()}
            self.positions = {lane: where for lane, where in positions.items() if lane in self.batches.mine}
            self.skipped = progress["skipped_steps"]
            self.batches = replace(self.batches, start=progress["step"], positions=positions)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        return self.batches

    # -- a step --------------------------------------------------------------------------------------------------
    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        self.positions.update(inputs.pop("positions", {}))
        self._inputs.append(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """After the backward passes, before the optimizer: the same number on all processes, so is what follows."""
        norm = super()._get_grad_norm(model, grad_norm)
        inputs, self._inputs = self._inputs, []
        skip = not math.isfinite(float(norm))
        self.optimizer.skipped_nonfinite = skip
        self._window[0] += 1
        if not skip:
            self.skipped_in_a_row = 0
            self._good_loss = self._tr_loss.clone()
            return norm
        self.skipped += 1
        self.skipped_in_a_row += 1
        self._window[1] += 1
        step = self.state.global_step + 1
        if self.args.nan == "stop" or self.skipped_in_a_row > PATIENCE:
            often = f" ({PATIENCE} steps in a row were skipped)" if self.skipped_in_a_row > PATIENCE else ""
            raise NonFiniteError(f"step {step} has non-finite gradients{often}: {self._diagnose(model, inputs)}")
        logger.warning("step %d has non-finite gradients: skipped (%d so far)", step, self.skipped)
        model.zero_grad(set_to_none=True)  # an optimizer leaves parameters without a gradient alone
        self._tr_loss.copy_(torch.as_tensor(self._good_loss))
        return norm

    def _diagnose(self, model: Any, inputs: list[dict[str, Any]]) -> str:
        """Runs the step again, watched; on every process, because sharded modules need all of them."""
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)

        def loss(batch: dict[str, Any]) -> torch.Tensor:
            with self.compute_loss_context_manager():
                value: Any = self.compute_loss(inner, self._prepare_inputs(batch))
            return value

        own = first_nonfinite(inner, [lambda b=b: loss(b) for b in inputs])  # type: ignore[misc]
        found = [own]
        if dist.is_initialized():
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, own)
        unseen = (9, "not seen when the step was run again, so it comes from something that is not repeated")
        return min([finding for finding in found if finding] or [unseen])[1]

    # -- the log -------------------------------------------------------------------------------------------------
    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.speed.pause()  # validation and checkpoints are not training
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._good_loss = self._tr_loss.clone()
        self.speed.go_on()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.state.epoch = self.state.global_step / max(1, self.state.max_steps)  # the share of the run
        if "loss" in logs:
            steps, skipped = self._window
            self._window = [0, 0]
            logs["loss"] = logs["loss"] * steps / (steps - skipped) if steps > skipped else math.nan
            if self.skipped:
                logs["skipped_steps"] = self.skipped
            logs.update(self.speed.metrics(steps))
            if self.balancing is not None and self.balancing.balancer is not None:
                logs.update({f"moe/{name}": value for name, value in self.balancing.balancer.metrics().items()})
            if self.clipping is not None and self.clipping.norm is not None:
                logs["scale_free_grad_norm"] = self.clipping.norm.item()
        super().log(logs, start_time)

    # -- checkpoints ---------------------------------------------------------------------------------------------
    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output, name = Path(str(self.args.output_dir)), f"checkpoint-{self.state.global_step}"
        staged = output / STAGING / name
        if self.args.should_save:
            shutil.rmtree(output / STAGING, ignore_errors=True)
            staged.parent.mkdir()  # not its parents: an output_dir that was removed does not come back half empty
            staged.mkdir()
        self.accelerator.wait_for_everyone()
        try:
            self._staging = str(output / STAGING)
            super()._save_checkpoint(model, trial)
            self._save_progress(staged)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(staged, output / name)
                staged.parent.rmdir()
        except (Exception, CheckpointException) as error:  # safetensors, torch.save and DCP each have their own
            free = shutil.disk_usage(output).free / 2**20  # as few of them say that the disk is full
            if self.args.should_save:
                shutil.rmtree(output / STAGING, ignore_errors=True)
            last = next((path.name for path in checkpoints(output)), None)
            raise CheckpointError(
                f"{name} could not be written under {output} ({reason(error)}; {free:.3g} MiB are free there): "
                + (f"the last good one is {last}; make space, then --resume" if last else "there is none before it")
            ) from error
        finally:
            self._staging = None
        if self.args.should_save:
            rotate_checkpoints(output_dir=str(output), save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _save_progress(self, folder: Path) -> None:
        """What only we know: where the data is, what was skipped, and the biases that the weights leave out."""
        positions = [self.positions]
        if dist.is_initialized():
            positions = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(positions, self.positions)
        if not self.args.should_save:
            return
        lanes = {lane: where.to_dict() for each in positions for lane, where in each.items()}
        progress = {
            "step": self.state.global_step,
            "facts": self.batches.facts,
            "skipped_steps": self.skipped,
            "positions": lanes,
        }
        (folder / PROGRESS).write_text(json.dumps(progress) + "\n", "utf-8")
        self._save_biases(folder)

    def _save_biases(self, folder: Path) -> None:
        balancer = None if self.balancing is None else self.balancing.balancer
        if self.args.should_save and balancer is not None and balancer.needs_file:
            balancer.save(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if not _internal_call:  # the end of the run; checkpoints have theirs
            self._save_biases(Path(output_dir or str(self.args.output_dir)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """What the optimizer remembers of each parameter, by name. Its groups follow from rules and arguments."""
        state = {"state": get_optimizer_state_dict(self.model, self._plain_optimizer)["state"]}
        dcp.save(state, checkpoint_id=str(Path(output_dir) / OPTIMIZER), no_dist=not dist.is_initialized())
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer, schedule = self._plain_optimizer, self.lr_scheduler
        state = get_optimizer_state_dict(self.model, optimizer)
        dcp.load(
            {"state": state["state"]},
            checkpoint_id=str(Path(checkpoint) / OPTIMIZER),
            no_dist=not dist.is_initialized(),
        )
        set_optimizer_state_dict(self.model, optimizer, state)
        # The schedule is a function of the step; how many groups there are depends on the layout.
        saved = torch.load(Path(checkpoint) / SCHEDULER, weights_only=True)
        schedule.last_epoch, schedule._step_count = saved["last_epoch"], saved["_step_count"]
        rates = [base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)
