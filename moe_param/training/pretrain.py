"""Pre-train a Mixture-of-Experts model from scratch, parameterized from a base shape.

    moe-param train recipes/configs/tiny.yaml --output_dir out --learning_rate 2e-3
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m moe_param.train CONFIG.yaml --output_dir out

Everything but the model's initialization, the optimizer's groups, the order of the data and the form of checkpoints is
transformers' own Trainer. `pretrain` has the order of things; docs/train.md the rest.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, TrainingArguments

import moe_param
from moe_param import Parameterization
from moe_param.errors import InputError, MoeParamError
from moe_param.folder_lock import folder_lock
from moe_param.training.arguments import (
    Horizon,
    ModelArguments,
    PretrainArguments,
    build_configs,
    parse,
    set_horizon,
)
from moe_param.training.checkpoints import (
    DISK_FULL,
    STAGING,
    CheckpointError,
    check_progress,
    checkpoints,
    last_good,
    reason,
)
from moe_param.training.data.batches import Batches
from moe_param.training.data.loading import Data, load_data
from moe_param.training.data.text import DataArguments, HFTokenizer, load_tokenizer
from moe_param.training.processes import quiet_but_first, require_one_group, shutdown
from moe_param.training.report import (
    MetricsFile,
    Speed,
    active_parameters,
    flops_per_token,
    peak_flops,
    plot_losses,
    versions,
)
from moe_param.training.trainer import Clipping, MoETrainer, PretrainTrainer

__all__ = [
    "DataArguments",
    "MoETrainer",
    "ModelArguments",
    "PretrainArguments",
    "build_configs",
    "main",
    "parse",
    "pretrain",
]

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, prog: str = "moe-param train") -> dict[str, Any]:
    """The whole command: reads the arguments, trains, and leaves the other processes in order.

    Returns:
        The run's summary, as in summary.json.

    Raises:
        MoeParamError: what is wrong with the input, the machine or the numbers, in one line.
        KeyboardInterrupt: with what to do next.
    """
    try:
        summary = pretrain(*parse(sys.argv[1:] if argv is None else argv, prog))
    except BaseException as error:
        shutdown(error)
        raise
    shutdown()
    return summary


def pretrain(model_args: ModelArguments, data_args: DataArguments, args: PretrainArguments) -> dict[str, Any]:
    """The run that the arguments describe, from the first check to the last file; cheap checks come first."""
    require_one_group(args.distributed_state)
    quiet_but_first(args.distributed_state)
    check(args)
    base, target = build_configs(model_args)
    horizon = set_horizon(args, data_args.seq_len)
    numbers = optimizer_numbers(args, horizon)
    check_rules(model_args, base, target, numbers)
    with output_folder(args):
        checkpoint = agreed(lambda: checkpoint_to_resume(args), args)
        data, batches = read_data(data_args, args, target, horizon)
        if checkpoint:
            agreed(lambda: check_progress(checkpoint, batches.facts), args)
        transformers.set_seed(args.seed)
        model, parameterization = build_model(model_args, args, base, target)
        if args.expert_parallel > 1:
            model = spread_experts(model, args, checkpoint)
        if args.process_index == 0:
            print(f"{parameterization}\n{data.description}\n{described(parameterization, target, args, horizon)}")
        trainer = build_trainer(model, parameterization, args, horizon, data, batches, numbers)
        start = time.perf_counter()
        loss = train(trainer, checkpoint)
        total, active = active_parameters(parameterization)
        summary = {
            "validation_loss": loss,
            "steps": trainer.state.global_step,
            "tokens": trainer.state.global_step * horizon.tokens_per_step,
            "parameters": total,
            "active_parameters": active,
            "skipped_steps": trainer.skipped,
            "seconds": round(time.perf_counter() - start, 1),  # of this session, where a run was resumed
            "resumed_from": str(checkpoint) if checkpoint else None,
            "processes": args.world_size,
            "data": data.description,
            "spec": model_args.spec,
            "versions": versions(),
        }
        if args.process_index == 0:
            leave_results(Path(str(args.output_dir)), summary)
    return summary


# -- before the data is read -----------------------------------------------------------------------------------------
def check(args: PretrainArguments) -> None:
    """Refuses what would not do what it says."""
    moe_param.check_schedule(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    default_optim = next(f.default for f in fields(TrainingArguments) if f.name == "optim")
    if args.optim != default_optim:
        raise InputError(f"optim is {args.optim!r}: this recipe trains with torch.optim.AdamW only, leave it unset")
    if args.load_best_model_at_end:
        raise InputError(
            "load_best_model_at_end would lose the experts (huggingface/transformers#48805): leave it unset and "
            "load the checkpoint you want with from_pretrained"
        )
    if args.auto_find_batch_size:
        raise InputError("auto_find_batch_size would change the batch, and with it the run: leave it unset")
    if args.save_only_model:
        raise InputError(
            "save_only_model leaves nothing to resume from: leave it unset (save_strategy no saves nothing)"
        )
    if args.n_gpu > 1:
        raise InputError(
            f"one process sees {args.n_gpu} GPUs: start one per GPU (recipes/accelerate), or show it one "
            "(CUDA_VISIBLE_DEVICES=0)"
        )
    if args.max_grad_norm > 0:
        logger.warning(
            "max_grad_norm=%g: the global gradient norm changes with the shape, so this threshold does not "
            "transfer from the base model; --clip does",
            args.max_grad_norm,
        )


def optimizer_numbers(args: PretrainArguments, horizon: Horizon) -> dict[str, Any]:
    """The base's numbers that `args` hold, under the names of `Parameterization.param_groups`."""
    return {
        "lr": args.learning_rate,
        "eps": args.adam_epsilon,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.weight_decay,
        "decay": args.decay,
        "batch_ratio": args.batch_ratio,
        "tokens_ratio": args.tokens_ratio,
        "tokens_exponent": args.tokens_exponent,
        "base_steps": args.base_steps,
        "steps": horizon.steps if args.decay == "ema" else None,
        "optimizer": args.optimizer,
        "matrix_lr_ratio": args.matrix_lr_ratio,
    }


def check_rules(
    model_args: ModelArguments, base: PretrainedConfig, target: PretrainedConfig, numbers: dict[str, Any]
) -> None:
    """Derives the rules and the optimizer's groups for a model without memory, to refuse early what will not do."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are said once, when the rules are applied
        rules = moe_param.plan(
            type(model),
            target,
            base,
            spec=model_args.spec,
            init_std=model_args.init_std,
            constants=model_args.constants or None,  # type: ignore[arg-type]
            allow_sparsity_change=model_args.allow_sparsity_change,
        )
    rules.optimizer(model, **numbers)


# -- the folder ------------------------------------------------------------------------------------------------------
@contextmanager
def output_folder(args: PretrainArguments) -> Iterator[None]:
    """Keeps output_dir for this run alone, and says what became of the run where it could not be written to.

    Raises:
        InputError: another command holds the folder, or it was removed.
        CheckpointError: the disk is full.
        KeyboardInterrupt: with the checkpoint that a new run can go on from.
    """
    output = Path(str(args.output_dir))
    with ExitStack() as held:
        agreed(lambda: held.enter_context(folder_lock(output, "training")), args)
        try:
            yield
        except KeyboardInterrupt:
            last = next((path.name for path in checkpoints(output)), None)
            raise KeyboardInterrupt(
                f"--resume goes on from {last}" if last else "no checkpoint was written yet: --resume starts afresh"
            ) from None
        except (OSError, CheckpointError) as error:
            if not output.exists():
                raise InputError(
                    f"{output} was removed while the run wrote to it: what it had written is lost, start it anew"
                ) from error
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise CheckpointError(
                    f"{error.filename or output} could not be written ({reason(error)}): make space, then --resume"
                ) from error
            raise


def agreed(decide: Callable[[], Any], args: PretrainArguments) -> Any:
    """What process 0 finds, on every process; its error too."""
    found: list[Any] = [None]
    if args.process_index == 0:
        try:
            found = [decide()]
        except MoeParamError as error:
            found = [error]
    if args.world_size > 1:
        found = broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def checkpoint_to_resume(args: PretrainArguments) -> Path | None:
    """The checkpoint to go on from; an output_dir with a run in it is refused without --resume."""
    output = Path(str(args.output_dir))
    if args.resume:
        found = last_good(output)
        logger.warning("resuming from %s", found or f"nothing: no checkpoint in {output}, starting afresh")
        return found
    if checkpoints(output) or (output / MetricsFile.name).exists():
        raise InputError(f"{output} holds a run already: --resume to go on, or another --output_dir")
    return None


# -- data and model --------------------------------------------------------------------------------------------------
def read_data(
    data_args: DataArguments, args: PretrainArguments, target: PretrainedConfig, horizon: Horizon
) -> tuple[Data, Batches]:
    """The text, and which blocks of it this process trains on."""
    tokenizer = load_tokenizer(data_args.tokenizer)
    if tokenizer.vocab_size > target.vocab_size:
        raise InputError(
            f"tokenizer {data_args.tokenizer!r} has {tokenizer.vocab_size} ids, the model {target.vocab_size}: "
            "set overrides.vocab_size"
        )
    seed = args.seed if args.data_seed is None else args.data_seed
    data = load_data(data_args, seed, tokenizer)
    args.per_device_eval_batch_size = eval_batch_size(len(data.validation), args.per_device_eval_batch_size)
    return data, Batches(data.train, horizon, seed, processes=args.world_size)


def eval_batch_size(blocks: int, most: int) -> int:
    """The largest that leaves no short batch: the mean over batches is then that over blocks, on any number of
    processes."""
    return max(n for n in range(1, min(blocks, most) + 1) if blocks % n == 0)


def build_model(
    model_args: ModelArguments, args: PretrainArguments, base: PretrainedConfig, target: PretrainedConfig
) -> tuple[PreTrainedModel, Parameterization]:
    """The target, initialized by the rules, on the device where one device holds it."""
    if args.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(target)
    if args.device.type == "cuda" and not sharded(args) and args.expert_parallel == 1:
        model.to(args.device)
    parameterization = moe_param.apply(
        model,
        base,
        spec=model_args.spec,
        init_std=model_args.init_std,
        constants=model_args.constants or None,  # type: ignore[arg-type]
        seed=args.seed,
        experts=model_args.experts_implementation,
        allow_sparsity_change=model_args.allow_sparsity_change,
    )
    return model, parameterization


def described(
    parameterization: Parameterization, target: PretrainedConfig, args: PretrainArguments, horizon: Horizon
) -> str:
    """Size and length of the run, in two lines."""
    total, active = active_parameters(parameterization)
    return (
        f"{target.model_type}: {total:,} parameters, {active:,} active per token\n"
        f"{horizon.steps:,} steps of {horizon.tokens_per_step:,} tokens ({horizon.batch} blocks: "
        f"{horizon.micro} at a time × {args.gradient_accumulation_steps} × {args.world_size} processes)"
    )


def sharded(args: PretrainArguments) -> bool:
    """Whether FSDP is asked for, of Trainer or by accelerate's configuration: then no device holds the whole model."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def spread_experts(model: PreTrainedModel, args: PretrainArguments, checkpoint: Path | None) -> PreTrainedModel:
    """The same model over all processes, experts whole and the rest sharded (FSDP2).

    transformers shards while it loads, so process 0 writes the initial weights where there is no checkpoint yet.
    """
    size, processes = args.expert_parallel, args.world_size
    try:
        from transformers.distributed import DistributedConfig

        plan = DistributedConfig(fsdp_size=processes, ep_size=size)
    except (ImportError, TypeError) as error:
        raise InputError("expert_parallel needs a transformers whose DistributedConfig has ep_size (5.23)") from error
    except ValueError as error:
        raise InputError(f"expert_parallel is {size}: {' '.join(str(error).split())}") from error
    if processes % size or sharded(args):
        raise InputError(
            f"expert_parallel is {size}: expected a divisor of the {processes} processes, launched as for DDP"
        )
    start = Path(str(args.output_dir)) / STAGING / "start"
    if checkpoint is None:
        if args.process_index == 0:
            model.save_pretrained(start)
        torch.distributed.barrier()
    try:
        spread = AutoModelForCausalLM.from_pretrained(checkpoint or start, dtype=model.dtype, distributed_config=plan)
    except ValueError as error:
        raise InputError(f"expert_parallel: {' '.join(str(error).split())}") from error
    torch.distributed.barrier()
    if args.process_index == 0:
        shutil.rmtree(start, ignore_errors=True)
    return spread


@contextmanager
def tensorboard_in(folder: Path) -> Iterator[None]:
    """One folder for all launches of a run; by itself every launch gets one with the time in its name."""
    given = "TENSORBOARD_LOGGING_DIR" in os.environ
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder))
    try:
        yield  # the callback reads it when it is made
    finally:
        if not given:
            del os.environ["TENSORBOARD_LOGGING_DIR"]


# -- training --------------------------------------------------------------------------------------------------------
def build_trainer(
    model: PreTrainedModel,
    parameterization: Parameterization,
    args: PretrainArguments,
    horizon: Horizon,
    data: Data,
    batches: Batches,
    numbers: dict[str, Any],
) -> PretrainTrainer:
    """transformers' Trainer with the groups of the rules, our batches and our log."""
    peak = args.peak_tflops * 1e12 if args.peak_tflops else None
    if peak is None and args.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name())
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    flops = flops_per_token(parameterization, horizon.seq_len, tied)
    output = Path(str(args.output_dir))
    with tensorboard_in(output / "tensorboard"):
        return PretrainTrainer(
            model,
            args,
            batches=batches,
            speed=Speed(horizon.tokens_per_step, flops, args.world_size, peak),
            eval_dataset=data.validation,
            data_collator=transformers.default_data_collator,  # blocks are whole: nothing is padded
            processing_class=data.tokenizer.hf if isinstance(data.tokenizer, HFTokenizer) else None,
            clipping=None if args.clip is None else Clipping(parameterization, args.clip),
            callbacks=[MetricsFile(output, horizon.tokens_per_step)],
            optimizer_cls_and_kwargs=(
                parameterization.optimizer_factory(args.optimizer),
                {name: value for name, value in numbers.items() if name != "optimizer"},
            ),
        )


def train(trainer: PretrainTrainer, checkpoint: Path | None) -> float:
    """Trains, saves the model, and returns the validation loss of the last step."""
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if not history or history[-1]["step"] != trainer.state.global_step:
        history.append(trainer.evaluate())
    trainer.save_model()
    return float(history[-1]["eval_loss"])


def leave_results(output: Path, summary: dict[str, Any]) -> None:
    """The picture of the losses and summary.json, which comes last: where it is, the run is complete."""
    plot_losses(output / MetricsFile.name, output / "loss.png")
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"validation loss {summary['validation_loss']:.4f}, {summary['tokens']:,} tokens; see {output}/")
