"""`LoadBalancingCallback`: balancing in a `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_param.balancing.balancer import LoadBalancer, Rate, check_settings
from moe_param.balancing.routing import unwrap
from moe_param.balancing.saved import FILE, load_selection_biases
from moe_param.balancing.selection import named_routers


class LoadBalancingCallback(TrainerCallback):
    """`LoadBalancer` in a `Trainer`: steps after each optimizer step, logs as `moe/…`.

    The biases are among the weights that the Trainer saves. After training nothing is counted any more, and the biases,
    injected ones too, stay in the model, so that it evaluates as it was trained; `callback.balancer.remove()` takes
    injected ones off.

    Args:
        rate, rule, inject, recentre, strict: see `LoadBalancer`.
        load_from: folder of saved biases to start from. A resumed run finds those of its checkpoint by itself in
            `output_dir`; give the folder where the checkpoint lies elsewhere.

    Raises:
        BalanceError: a rate or a rule that is none.

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
        check_settings(rate, rule)
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
            self.balancer.stop()
        folder = self.load_from
        if state.global_step and folder is None:
            given = args.resume_from_checkpoint
            written = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            folder = given if isinstance(given, str) and Path(given).is_dir() else written
        if folder is not None and named_routers(unwrap(kwargs["model"])):
            load_selection_biases(kwargs["model"], folder)
        self.balancer = balancer = LoadBalancer(kwargs["model"], **self.settings)
        injected = any(route.gate is not None for route in balancer.routes)
        needed = self.load_from is not None or injected or balancer.needs_file
        if folder is not None and (needed or (Path(folder) / FILE).is_file()):
            balancer.load(folder)  # otherwise native float32 biases came with the weights
        balancer.steps = state.global_step

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
        if self.balancer is not None and self.balancer.needs_file and state.is_world_process_zero:
            self.balancer.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.balancer is None:
            return
        self.balancer.stop()
        injected = any(route.gate is not None for route in self.balancer.routes)
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best and injected and not args.fsdp:  # whose checkpoints have the model's own names
            load_selection_biases(kwargs["model"], best)
