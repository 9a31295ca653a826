"""Pre-train a Mixture-of-Experts model from scratch, parameterized from a base shape.

    python -m moe_param.training.pretrain --config recipes/configs/tiny.yaml --output_dir out --learning_rate 2e-3
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m moe_param.training.pretrain --config … \\
        --output_dir out

A YAML file holds any of the arguments; the command line overrides it. Everything but the model's initialization, the
optimizer's groups, the order of the data and the form of checkpoints is transformers' own Trainer. See pretrain.md.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments

import moe_param
from moe_param.errors import InputError
from moe_param.training.arguments import ModelArguments, PretrainArguments, build_configs, parse, set_horizon
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
from moe_param.training.data.loading import load_data
from moe_param.training.data.text import DataArguments, HFTokenizer
from moe_param.training.nonfinite import NonFiniteError
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
    "USER_ERRORS",
    "DataArguments",
    "MoETrainer",
    "ModelArguments",
    "PretrainArguments",
    "build_configs",
    "main",
    "parse",
]

logger = logging.getLogger(__name__)

# What a wrong input raises: told in one line, without a traceback.
USER_ERRORS = (
    CheckpointError,
    InputError,
    NonFiniteError,
    moe_param.BalanceError,
    moe_param.HorizonError,
    moe_param.OptimizerError,
    moe_param.ParameterizationError,
    moe_param.RoleError,
    moe_param.RoutingError,
    moe_param.ShapeError,
    moe_param.SpecError,
    moe_param.StructureError,
    moe_param.TunedError,
    moe_param.WeightsError,
)


def agreed(decide: Callable[[], Any], processes: int, process: int) -> Any:
    """What process 0 finds, on every process; its error too."""
    found: list[Any] = [None]
    if process == 0:
        try:
            found = [decide()]
        except USER_ERRORS as error:
            found = [error]
    if processes > 1:
        found = broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


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


def eval_batch_size(blocks: int, most: int) -> int:
    """The largest that leaves no short batch: the mean over batches is then that over blocks, on any number of
    processes."""
    return max(n for n in range(1, min(blocks, most) + 1) if blocks % n == 0)


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


def main(argv: list[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args = parse(sys.argv[1:] if argv is None else argv)
    check(args)
    horizon = set_horizon(args, data_args.seq_len)
    checkpoint = agreed(lambda: checkpoint_to_resume(args), args.world_size, args.process_index)
    seed = args.seed if args.data_seed is None else args.data_seed
    base, target = build_configs(model_args)
    data = load_data(data_args, seed=seed)
    batches = Batches(data.train, horizon, seed, processes=args.world_size)
    if checkpoint:
        agreed(lambda: check_progress(checkpoint, batches.facts), args.world_size, args.process_index)
    if data.tokenizer.vocab_size > target.vocab_size:
        raise InputError(
            f"tokenizer {data_args.tokenizer!r} has {data.tokenizer.vocab_size} ids, "
            f"the model {target.vocab_size}: set overrides.vocab_size"
        )
    args.per_device_eval_batch_size = eval_batch_size(len(data.validation), args.per_device_eval_batch_size)

    transformers.set_seed(args.seed)
    if args.disable_tqdm:
        transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(target)
    if args.device.type == "cuda" and not sharded(args) and args.expert_parallel == 1:  # where it will train
        model.to(args.device)
    parameterization = moe_param.apply(
        model,
        base,
        spec=model_args.spec,
        init_std=model_args.init_std,
        constants=model_args.constants or None,
        seed=args.seed,
        experts=model_args.experts_implementation,
        allow_sparsity_change=model_args.allow_sparsity_change,
    )
    if args.expert_parallel > 1:
        model = spread_experts(model, args, checkpoint)
    total, active = active_parameters(parameterization)
    if args.should_log:
        print(parameterization)
        print(
            f"{data.description}\n{target.model_type}: {total:,} parameters, {active:,} active per token\n"
            f"{horizon.steps:,} steps of {horizon.tokens_per_step:,} tokens ({horizon.batch} blocks: "
            f"{horizon.micro} at a time × {args.gradient_accumulation_steps} × {args.world_size} processes)"
        )

    peak = args.peak_tflops * 1e12 if args.peak_tflops else None
    if peak is None and args.device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name())
    tied = bool(getattr(target.get_text_config(), "tie_word_embeddings", False))
    flops = flops_per_token(parameterization, data_args.seq_len, tied)
    with tensorboard_in(Path(str(args.output_dir)) / "tensorboard"):
        trainer = PretrainTrainer(
            model,
            args,
            batches=batches,
            speed=Speed(horizon.tokens_per_step, flops, args.world_size, peak),
            eval_dataset=data.validation,
            processing_class=data.tokenizer.hf if isinstance(data.tokenizer, HFTokenizer) else None,
            clipping=None if args.clip is None else Clipping(parameterization, args.clip),
            callbacks=[MetricsFile(Path(str(args.output_dir)), horizon.tokens_per_step)],
            optimizer_cls_and_kwargs=(
                parameterization.optimizer_factory(torch.optim.AdamW),
                {
                    "lr": args.learning_rate,
                    "eps": args.adam_epsilon,
                    "betas": (args.adam_beta1, args.adam_beta2),
                    "weight_decay": args.weight_decay,
                    "decay": args.decay,
                    "batch_ratio": args.batch_ratio,
                    "tokens_ratio": args.tokens_ratio,
                    "base_steps": args.base_steps,
                    "steps": horizon.steps if args.decay == "ema" else None,
                },
            ),
        )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if not history or history[-1]["step"] != trainer.state.global_step:
        history.append(trainer.evaluate())
    trainer.save_model()

    summary = {
        "validation_loss": history[-1]["eval_loss"],
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
    if trainer.is_world_process_zero():
        output = Path(str(args.output_dir))
        plot_losses(output / MetricsFile.name, output / "loss.png")
        (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"validation loss {summary['validation_loss']:.4f}, {summary['tokens']:,} tokens; see {output}/")
    return summary


def run(argv: list[str] | None = None) -> None:
    """`main` for a shell: what the user got wrong is one line, from one process."""
    try:
        main(argv)
    except USER_ERRORS as error:
        line = f"pretrain: {error}"
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        line = f"pretrain: {reason(error)}: {error.filename or 'output_dir'} could not be written; --resume goes on"
    else:
        return
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        sys.exit(1)
    sys.exit(line)


if __name__ == "__main__":
    run()
