"""`LoadBalancingCallback`: balancing in a `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_param.balancing.balancer import FILE, LoadBalancer, Rate


class LoadBalancingCallback(TrainerCallback):
    """`LoadBalancer` in a `Trainer`: steps after each optimizer step, logs as `moe/…`, saves with each checkpoint.

    Args:
        rate, rule, inject, recentre, strict: see `LoadBalancer`.
        load_from: folder of saved biases to start from. A resumed run finds those of its checkpoint by itself in
            `output_dir`; give the folder where the checkpoint lies elsewhere.

    The numbers go into `state.log_history` and to the callbacks after this one; those that `report_to` names run
    before it.
    """

    def __init__(
        self,
        rate: Rate,
        rule: Literal["proportional", "sign"] = "proportional",
        inject: bool = False,
        *,
        recentre: bool = False,
        strict: bool = False,
        load_from: str | Path | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {
            "rate": rate,
            "rule": rule,
            "inject": inject,
            "recentre": recentre,
            "strict": strict,
        }
        self.load_from = load_from
        self.balancer: LoadBalancer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.balancer is not None:
            self.balancer.remove()
        self.balancer = LoadBalancer(kwargs["model"], **self.settings)
        folder = self.load_from
        if state.global_step and folder is None:
            given = args.resume_from_checkpoint
            written = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            folder = given if isinstance(given, str) and Path(given).is_dir() else written
            if not self.balancer.needs_file and not (Path(folder) / FILE).is_file():
                folder = None  # native float32 biases came with the weights
        if folder is not None:
            self.balancer.load(folder)
        self.balancer.steps = state.global_step

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.balancer is not None
        # A step with overflowing float16 gradients moves no weights, and no biases.
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            self.balancer.discard()
        else:
            self.balancer.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.balancer is not None and logs is not None and "loss" in logs:
            numbers = {f"moe/{name}": value for name, value in self.balancer.metrics().items()}
            logs.update(numbers)
            state.log_history[-1].update(numbers)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.balancer is not None and state.is_world_process_zero:
            self.balancer.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
