"""`Parameterization`: the rules of one model, and what is written of them into `config.moe_param`."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from moe_param import explain
from moe_param.balancing.selection import BalanceError, require_selection_biases
from moe_param.fresh import departure, trained
from moe_param.optim import groups as optim
from moe_param.optim.adam import (
    ADAM_ROLES,
    OptimizerError,
    adam_class,
    adam_numbers,
    check_decoupled,
    matrix_numbers,
)
from moe_param.optim.muon import Muon
from moe_param.record import FORMAT, check_plain, check_shapes, decode, encode, spans, with_vocabulary
from moe_param.scaling.horizon import TOKENS_EXPONENT
from moe_param.scaling.rules import ParameterizationError, Rule
from moe_param.scaling.spec import ScalingSpec
from moe_param.structure.laws import InitLaw
from moe_param.structure.roles import layer_pattern
from moe_param.structure.shape import Shape
from moe_param.structure.trace import shared_trace
from moe_param.tuned import TunedNumbers

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

    from moe_param.balancing.balancer import Rate


@dataclass(frozen=True)
class Parameterization:
    """The rules of one model: made by `apply`, or read back from `model.config.moe_param` by `from_model`."""

    rules: dict[str, Rule]
    spec: ScalingSpec
    base_shape: Shape
    shape: Shape
    seed: int | None = None
    init_std: float | None = None
    constants: Mapping[str, Mapping[str, float]] | None = None
    tuned: TunedNumbers | None = None
    """What the file of the base says about the optimizer; None where the base was given as a shape or a config."""

    # -- training ----------------------------------------------------------------------------------------------
    # Numbers are the base model's; each group's follow by its rules. What is not given is the tuned one
    # (`self.tuned`), and where nothing was tuned the paper's: ε 1e-12, betas (0.9, 0.95), no weight decay.
    def param_groups(
        self,
        model: torch.nn.Module,
        *,
        lr: float | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        decay: str | None = None,
        steps: int | None = None,
        base_steps: int | None = None,
        batch_ratio: float = 1.0,
        tokens_ratio: float = 1.0,
        tokens_exponent: float = TOKENS_EXPONENT,
        betas: tuple[float, float] | None = None,
    ) -> list[dict[str, Any]]:
        """Groups for an Adam of your own over `model`, wrapped or sharded or not, wholly or partly trained.

        Args:
            model: the model that is trained. Parameters that are frozen now are left out.
            lr, eps, weight_decay, decay: the base's; left out, the tuned ones, else ε 1e-12 and no decay.
            betas: the base's; left out, the tuned ones. Where there are none, groups hold none, and the optimizer's own
                default counts, which for torch is (0.9, 0.999). `optimizer` has (0.9, 0.95) there.
            steps, base_steps, batch_ratio, tokens_ratio, tokens_exponent: see `optim.groups.param_groups`.

        Returns:
            Groups with `params`, `names` (in the same order), `lr`, `eps`, `weight_decay`, perhaps `betas`. The first
            has the base's rate.

        Raises:
            OptimizerError: no learning rate, numbers out of range, another model than the one parameterized.
            HorizonError: ratios that the square root rules do not cover.
        """
        if self._optimizer(None) == "muon":
            raise OptimizerError(
                "the numbers were tuned with muon, and these are groups for Adam: optimizer(model) has muon's"
            )
        numbers = adam_numbers(self.tuned, lr=lr, eps=eps, betas=betas, weight_decay=weight_decay, decay=decay)
        tuned_betas = self.tuned is not None and (self.tuned.adam_beta1, self.tuned.adam_beta2) != (None, None)
        return optim.param_groups(
            self.rules,
            model,
            lr=numbers.lr,
            eps=numbers.eps,
            weight_decay=numbers.weight_decay,
            decay=numbers.decay,
            steps=steps,
            base_steps=base_steps,
            batch_ratio=batch_ratio,
            tokens_ratio=tokens_ratio,
            tokens_exponent=tokens_exponent,
            betas=numbers.betas if betas is not None or tuned_betas else None,
        )

    def optimizer(
        self,
        model: torch.nn.Module,
        *,
        optimizer: str | type[torch.optim.Optimizer] | None = None,
        adam_like: bool = False,
        lr: float | None = None,
        eps: float | None = None,
        betas: tuple[float, float] | None = None,
        weight_decay: float | None = None,
        decay: str | None = None,
        steps: int | None = None,
        base_steps: int | None = None,
        batch_ratio: float = 1.0,
        tokens_ratio: float = 1.0,
        tokens_exponent: float = TOKENS_EXPONENT,
        matrix_lr_ratio: float | None = None,
        adam_roles: Collection[str] = ADAM_ROLES,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """The optimizer of `model`, for a loop of your own.

        Args:
            model: the model that is trained, wrapped or sharded or not. Parameters that are frozen now are left out.
            optimizer: "adamw", "adam", "muon" (AdamW for what is no matrix), or a class that derives from torch's AdamW
                or Adam. Left out, the tuned one, else "adamw".
            adam_like: your word that another class makes Adam's update with decoupled weight decay.
            lr, eps, betas, weight_decay, decay: the base's; left out, the tuned ones, else ε 1e-12, betas (0.9, 0.95)
                and no decay. A learning rate has no default.
            steps, base_steps, batch_ratio, tokens_ratio, tokens_exponent: see `optim.groups.param_groups`.
            matrix_lr_ratio: muon: the rate of the base's matrices, as `torch.optim.Muon` has it, over lr; left out, the
                tuned one, else 1.
            adam_roles: muon: roles whose matrices are left to Adam.
            options: what the optimizer's class takes besides (fused, momentum, …).

        Raises:
            OptimizerError: no learning rate, an optimizer that is not Adam, numbers out of range, another model than
                the one parameterized.
            HorizonError: ratios that the square root rules do not cover.
        """
        optimizer = self._optimizer(optimizer)
        optimizer_class = adam_class(optimizer, adam_like)
        matrix_lr_ratio = self._matrix_lr_ratio(optimizer_class, matrix_lr_ratio)
        numbers = adam_numbers(self.tuned, lr=lr, eps=eps, betas=betas, weight_decay=weight_decay, decay=decay)
        check_decoupled(optimizer_class, numbers.weight_decay, options)
        groups = optim.param_groups(
            self.rules,
            model,
            **asdict(numbers),
            **matrix_numbers(optimizer_class, matrix_lr_ratio, adam_roles, batch_ratio),
            steps=steps,
            base_steps=base_steps,
            batch_ratio=batch_ratio,
            tokens_ratio=tokens_ratio,
            tokens_exponent=tokens_exponent,
        )
        options.update(lr=numbers.lr, eps=numbers.eps, betas=numbers.betas, weight_decay=numbers.weight_decay)
        return optimizer_class(groups, **options)

    def _optimizer(self, given: str | type[torch.optim.Optimizer] | None) -> str | type[torch.optim.Optimizer]:
        """As given, else as tuned, else AdamW."""
        return given or (self.tuned and self.tuned.optimizer) or "adamw"

    def _matrix_lr_ratio(self, optimizer_class: type[torch.optim.Optimizer], given: float | None) -> float | None:
        """As given, else as tuned, where the optimizer is the one it was tuned with."""
        tuned = self.tuned.matrix_lr_ratio if self.tuned and issubclass(optimizer_class, Muon) else None
        return tuned if given is None else given

    def optimizer_factory(
        self, optimizer: str | type[torch.optim.Optimizer] | None = None, *, adam_like: bool = False
    ) -> type:
        """A class for `Trainer(optimizer_cls_and_kwargs=(factory, kwargs))`; kwargs are the arguments of `optimizer`.

        Trainer instantiates it and calls it with the model it trains, so this works under FSDP2, where
        `Trainer(optimizers=…)` is refused. Trainer hands it no `TrainingArguments`: learning_rate, weight_decay, betas
        and ε set there are not seen. `trainer_arguments` reads them.

        Raises:
            OptimizerError: an optimizer that is not Adam.
        """
        optimizer = self._optimizer(optimizer)
        optimizer_class = adam_class(optimizer, adam_like)

        class Factory:
            def __call__(_, model: torch.nn.Module, **numbers: Any) -> torch.optim.Optimizer:
                return self.optimizer(model, optimizer=optimizer_class, adam_like=adam_like, **numbers)

        Factory.__name__ = f"{optimizer_class.__name__}Factory"
        return Factory

    def trainer_arguments(
        self,
        args: TrainingArguments,
        *,
        optimizer: str | type[torch.optim.Optimizer] | None = None,
        clip: float | None = None,
        balance: Rate | Mapping[str, Any] | TrainerCallback | None = None,
        adam_like: bool = False,
        lr: float | None = None,
        eps: float | None = None,
        betas: tuple[float, float] | None = None,
        weight_decay: float | None = None,
        decay: str | None = None,
        steps: int | None = None,
        base_steps: int | None = None,
        batch_ratio: float = 1.0,
        tokens_ratio: float = 1.0,
        tokens_exponent: float = TOKENS_EXPONENT,
        matrix_lr_ratio: float | None = None,
        adam_roles: Collection[str] = ADAM_ROLES,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """What makes a `Trainer` train by the rules: `Trainer(model, args, …, **p.trainer_arguments(args))`.

        Learning rate, ε, betas and weight decay are the base's. Each is the one given here; else the one in `args`,
        where that is not `TrainingArguments`' own default; else the tuned one; else as in `optimizer`. They are written
        into `args`, so that the Trainer reports what it trains with. What contradicts itself is an error.

        Args:
            args: of the Trainer. max_grad_norm must be 0, optim left alone or "adamw_torch".
            optimizer, adam_like, matrix_lr_ratio, adam_roles, options: see `optimizer`.
            clip: threshold of `ScaleFreeClipping`; inf only logs the norm.
            balance: a rate, the arguments of `LoadBalancingCallback`, or a callback.
            lr, eps, betas, weight_decay, decay: of the base, see above.
            steps: for decay "ema"; left out, `args.max_steps` where that is set.
            base_steps, batch_ratio, tokens_ratio, tokens_exponent: see `optim.groups.param_groups`.
            resume_from: see `ReloadExpertsCallback`.

        Returns:
            optimizer_cls_and_kwargs and callbacks. Add your own callbacks by `trainer.add_callback`.

        Raises:
            OptimizerError: numbers that contradict each other, no learning rate, or what `args` ask and would not be
                done, or would undo the rules: another optimizer, ReduceLROnPlateau, Trainer's own clipping, DeepSpeed.
            BalanceError: a rate of balancing that is none, an unknown rule, or a dense model.
        """
        from transformers import TrainerCallback

        from moe_param.balancing.callback import LoadBalancingCallback
        from moe_param.experts.reload import ReloadExpertsCallback
        from moe_param.optim.arguments import AgreementCallback, check_arguments, choose_numbers
        from moe_param.optim.clipping import ScaleFreeClipping

        check_arguments(args)
        optimizer = self._optimizer(optimizer)
        optimizer_class = adam_class(optimizer, adam_like)
        if isinstance(balance, Mapping):
            balance = LoadBalancingCallback(**balance)
        elif balance is not None and not isinstance(balance, TrainerCallback):
            balance = LoadBalancingCallback(balance)
        if isinstance(balance, LoadBalancingCallback) and self.shape.dense:
            raise BalanceError("balance is for experts, and this model is dense: leave it out")
        clipping = None if clip is None else ScaleFreeClipping(self, clip)
        beta1, beta2 = betas or (None, None)
        given = {"learning_rate": lr, "adam_epsilon": eps, "weight_decay": weight_decay}
        taken = choose_numbers(args, self.tuned, {**given, "adam_beta1": beta1, "adam_beta2": beta2})
        decay = decay or (self.tuned and self.tuned.decay) or "independent"
        numbers: dict[str, Any] = {
            "lr": taken["learning_rate"],
            "eps": taken["adam_epsilon"],
            "betas": (taken["adam_beta1"], taken["adam_beta2"]),
            "weight_decay": taken["weight_decay"],
            "decay": decay,
            "steps": args.max_steps if steps is None and decay == "ema" and args.max_steps > 0 else steps,
            "base_steps": base_steps,
            "batch_ratio": batch_ratio,
            "tokens_ratio": tokens_ratio,
            "tokens_exponent": tokens_exponent,
        }
        check_decoupled(optimizer_class, numbers["weight_decay"], options)
        optim.check_numbers(**numbers)
        matrix_lr_ratio = self._matrix_lr_ratio(optimizer_class, matrix_lr_ratio)
        matrices = matrix_numbers(optimizer_class, matrix_lr_ratio, adam_roles, batch_ratio)
        for name, number in taken.items():  # so that what the Trainer reports is what it trains with
            setattr(args, name, number)
        fused = str(getattr(args.optim, "value", args.optim)) == "adamw_torch_fused" and isinstance(optimizer, str)
        if fused and not options.get("foreach"):
            options.setdefault("fused", True)  # as Trainer does

        def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
            return optim.param_groups(self.rules, model, **numbers, **matrices)

        callbacks = [ReloadExpertsCallback(resume_from), AgreementCallback(taken, groups), clipping, balance]
        return {
            "optimizer_cls_and_kwargs": (
                self.optimizer_factory(optimizer_class, adam_like=adam_like),
                {**numbers, "matrix_lr_ratio": matrix_lr_ratio, "adam_roles": adam_roles, **options},
            ),
            "callbacks": [callback for callback in callbacks if callback is not None],
        }

    # -- explanation -------------------------------------------------------------------------------------------
    def rows(self, full: bool = False) -> list[dict[str, Any]]:
        """One row per role and rule, or with `full` one per parameter: plain values, ready for JSON or a table."""
        return explain.rows(self, full)

    def table(self, full: bool = False) -> str:
        """The rules as text: one line per role and rule, or with `full` one per parameter."""
        return explain.table(self, full)

    def __str__(self) -> str:
        return self.table()

    # -- persistence -------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values that `from_dict` reads back exactly; what `apply` stores in `config.moe_param`."""
        entries: dict[str, dict[str, Any]] = {}
        for name, rule in self.rules.items():
            pattern, layer = layer_pattern(name)
            values = encode(rule)
            entry = entries.setdefault(json.dumps([pattern, values]), {"parameter": pattern, **values})
            if layer is not None:
                entry.setdefault("layers", []).append(layer)
        for entry in entries.values():
            if "layers" in entry:
                entry["layers"] = spans(entry["layers"])
        record = {
            "format": FORMAT,
            "spec": self.spec.to_dict(),
            "base_shape": asdict(self.base_shape),
            "shape": asdict(self.shape),
            "seed": self.seed,
            "init_std": self.init_std,
            "constants": {role: dict(c) for role, c in (self.constants or {}).items()},
            "rules": list(entries.values()),
        }
        if self.tuned is not None:
            record["tuned"] = {name: value for name, value in asdict(self.tuned).items() if value is not None}
        return record

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Parameterization:
        """Reads `to_dict` back.

        Raises:
            ParameterizationError: written by a version of moe_param this one cannot read.
        """
        if data.get("format") != FORMAT:
            raise ParameterizationError(
                f"config.moe_param has format {data.get('format')!r}, this moe_param reads format {FORMAT}: "
                "use the version of moe_param that wrote it"
            )
        rules: dict[str, Rule] = {}
        for entry in data["rules"]:
            layers = [i for a, b in entry["layers"] for i in range(a, b + 1)] if "layers" in entry else [None]
            for layer in layers:
                name = entry["parameter"] if layer is None else entry["parameter"].replace("*", str(layer), 1)
                rules[name] = decode(entry)
        return cls(
            rules=rules,
            spec=ScalingSpec.from_dict(data["spec"]),
            base_shape=Shape(**data["base_shape"]),
            shape=Shape(**data["shape"]),
            seed=data["seed"],
            init_std=data["init_std"],
            constants=data["constants"] or None,
            tuned=TunedNumbers.read(data["tuned"]) if "tuned" in data else None,
        )

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Parameterization:
        """Reads the rules from `model.config.moe_param`, for instance after `from_pretrained`. Weights are not touched.

        A vocabulary that was resized since is followed, with a warning.

        Raises:
            ParameterizationError: no record, one whose parameters or shapes are not the model's, weights that
                transformers has just built (the config of a parameterized model, but not its weights), a quantized
                model, one with adapters, or a wrapped one.
            BalanceError: the config names injected selection biases that the model lacks (`load_selection_biases`).
        """
        check_plain(model)
        require_selection_biases(model)
        record = getattr(model.config, "moe_param", None)
        if record is None:
            raise ParameterizationError(
                f"{type(model).__name__} carries no parameterization (`config.moe_param` is missing): "
                "call moe_param.apply(model, base_shape, reinit=False)"
            )
        parameterization = cls.from_dict(record)
        rules = with_vocabulary(parameterization.rules, model)
        check_shapes({name: tuple(rule.shape) for name, rule in rules.items()}, model, "config.moe_param records")
        if parameterization.seed is not None:  # a record without one says nothing of the weights
            _check_initialized(model, {name: rule.init for name, rule in rules.items()})
        return replace(parameterization, rules=rules)


def _check_initialized(model: PreTrainedModel, laws: Mapping[str, InitLaw]) -> None:
    """Refuses weights that do not follow their rules, are untrained, and do follow transformers' own laws."""
    wrong = departure(model, laws)
    kept = {name: law for name, law in laws.items() if law.kind == "kept"}
    own = shared_trace(type(model), model.config)[1].laws | kept
    if wrong and not trained(model, laws) and not departure(model, own):
        raise ParameterizationError(
            f"{type(model).__name__} has the config of a parameterized model, and weights that transformers has just "
            f"built ({wrong}): call moe_param.apply(model, base_shape) to initialize them, or load the model's own"
        )
