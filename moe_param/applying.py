"""`apply`: writes a parameterization into a model. `plan`: the same rules from configs alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from moe_param.balancing.selection import Selection, require_selection_biases
from moe_param.fresh import departure, loaded
from moe_param.init import prepare
from moe_param.naming import check_known
from moe_param.parameterization import Parameterization
from moe_param.record import check_plain, check_shapes
from moe_param.scaling.rules import ParameterizationError, Rule, derive_rules
from moe_param.scaling.spec import DEFAULT_SPEC, ROLES, ScalingSpec
from moe_param.structure.dispatch import is_experts, text_part
from moe_param.structure.known import say_once
from moe_param.structure.roles import LEFT_ALONE, check_routers, read_structure
from moe_param.structure.scaling_config import scale_config, with_text
from moe_param.structure.shape import Shape, ShapeError
from moe_param.structure.trace import shared_trace
from moe_param.tuned import Tuned, read_tuned


def plan(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    base_shape: Shape | PretrainedConfig | str | Path,
    target_shape: Shape | None = None,
    *,
    spec: str | Path | Mapping[str, Any] | ScalingSpec | None = None,
    init_std: float | None = None,
    constants: Mapping[str, Mapping[str, float]] | None = None,
    seed: int | None = None,
    allow_sparsity_change: bool = False,
    only: str | None = None,
) -> Parameterization:
    """The rules `apply` would write, from configs alone: nothing is built in memory. Arguments are those of `apply`.

    Raises:
        ParameterizationError, ShapeError, SpecError, StructureError, RoleError: as `apply`.
    """
    numbers = None
    if isinstance(base_shape, str | Path):
        tuned = _tuned(base_shape, spec=spec, init_std=init_std, constants=constants)
        base_shape, numbers = tuned.base, tuned.numbers
        spec, init_std, constants = tuned.spec, tuned.init_std, tuned.constants
    if not issubclass(model_class, PreTrainedModel):
        raise ParameterizationError(
            f"expected a transformers model class, got {model_class.__name__}: give the class of the model inside, "
            "before adapters or wrappers (PEFT's adapters have no rule and train with learning rates of PEFT's own)"
        )
    table = ScalingSpec.load(DEFAULT_SPEC if spec is None else spec)
    _check_numbers(init_std, constants)
    target = read_structure(model_class, config, only)
    if isinstance(base_shape, Shape):
        _check_kind(base_shape, target.shape)
        base_config = scale_config(config, **base_shape.sizes, model_class=model_class)
    elif isinstance(base_shape, PretrainedConfig):
        base_config = base_shape
        if base_config.model_type == config.get_text_config().model_type:  # found on the text part alone
            base_config = with_text(config, base_config)
        if base_config.model_type != config.model_type:
            raise ParameterizationError(
                f"base and target are different architectures: {base_config.model_type} and {config.model_type}"
            )
    else:
        raise ParameterizationError(
            "base_shape must be a Shape, a PretrainedConfig or the path of a YAML file, "
            f"got {type(base_shape).__name__}"
        )
    base = read_structure(model_class, base_config, only)
    _check_kind(base.shape, target.shape)
    if isinstance(base_shape, Shape) and base_shape.head_dim not in (None, base.shape.head_dim):
        raise ShapeError(
            f"base_shape.head_dim = {base_shape.head_dim}, but heads are scaled at the model's head_dim "
            f"{base.shape.head_dim}: for another head_dim at the base pass the base config instead of a Shape"
        )
    if target_shape is not None and not isinstance(target_shape, Shape):
        raise ParameterizationError(f"target_shape must be a Shape, got {type(target_shape).__name__}")
    if target_shape is not None:
        given = target_shape if target_shape.head_dim else replace(target_shape, head_dim=target.shape.head_dim)
        if given != target.shape:
            raise ShapeError(f"target_shape {given} is not the model's shape {target.shape}")
    check_routers(base, "the base")  # first: where numbers are searched, it is the target too
    check_routers(target, "the target")
    _check_sparsity(base.shape, target.shape, allow_sparsity_change)
    rules = derive_rules(table, base, target, init_std, constants or {})
    return Parameterization(rules, table, base.shape, target.shape, seed, init_std, constants, numbers)


def apply(
    model: PreTrainedModel,
    base_shape: Shape | PretrainedConfig | str | Path,
    target_shape: Shape | None = None,
    *,
    spec: str | Path | Mapping[str, Any] | ScalingSpec | None = None,
    init_std: float | None = None,
    constants: Mapping[str, Mapping[str, float]] | None = None,
    seed: int | None = None,
    reinit: bool | None = None,
    folds: bool | None = None,
    experts: str | None = None,
    allow_sparsity_change: bool = False,
    only: str | None = None,
) -> Parameterization:
    """Rewrites the initialization of `model` in place and returns the rules of its parameters.

    The forward pass is not touched: multipliers are folded into init, learning rate and epsilon (the abc-symmetry of
    Adam; arXiv:2601.20205, D.1). At `base_shape` everything is as transformers has it, with one learning rate.

    Args:
        model: any Hugging Face decoder with real weights, dense or a mixture of experts.
        base_shape: the shape the numbers were tuned at, or the base config, or the path of the YAML file that
            `moe-param tune` wrote (`read_tuned`): base, spec, init_std and constants are then the file's, and its
            learning rate, betas, epsilon and decay are in the result's `tuned`.
        target_shape: checked against the model; the model's own shape by default.
        spec: a preset (`moe-completep`, `completep`, `mup`, `mup-moe`, `kakao`, `standard`, `table2`, `mssp`), a YAML
            path, a mapping; by default the file's, or `moe-completep`.
        init_std: σ of every randomly initialized parameter of the base; by default transformers' own.
        constants: {role: {"init": c, "lr": c}}, constant factors found on the base (arXiv:2601.20205, D.1).
        seed: of the initialization; with the parameter's name it decides every value, whatever the order, the device
            or the sharding. Default: drawn from torch's global generator (give one where ranks must agree).
        reinit: True writes new weights, and sets selection biases back. False leaves all as it is (continued training)
            and gives only the rates. By default new weights are written where the model was just built; one that was
            loaded or trained is an error, and so is one initialized by other code. What tells them is in
            `moe_param.fresh`, with its limits.
        folds: for reinit=False. The rates are for weights that carry the folded multipliers, as those do that were
            initialized by the rules. Weights that do not are 1/a times larger than the rules think, where a multiplier
            a was folded. False gives rates for those: the learning rate is divided by a, so that a step has the size
            relative to the weights that the rules mean, weight decay is multiplied by a, and epsilon stays, because
            gradients do not depend on the size of the weights they are for. No theory says how such a run transfers.
            True takes the folded rates; the default does too, with a warning where the model has no record of folds.
        experts: an implementation for transformers' experts interface; "auto" takes "megablocks" where it is usable
            on the model's device and otherwise leaves transformers' choice, as None does. Experts of another make
            compute themselves, and naming an implementation is an error.
        allow_sparsity_change: warn instead of raising where top_k / num_experts differs from the base.
        only: "text" leaves the other towers of a model alone (vision, audio, their projectors): their weights and
            buffers stay, pretrained or not, and the optimizer gets them with the base's learning rate, epsilon and (on
            matrices) weight decay. Their role is "left_alone". The base may be the config of the text part alone.

    Returns:
        The `Parameterization`, also recorded as plain JSON in `model.config.moe_param`.

    Raises:
        StructureError: no decoder stack, or a forward pass that cannot be read.
        RoleError: parameters without a role, all of them listed; an `only` that is unknown or leaves nothing alone.
        ShapeError: sizes that contradict the model or do not divide.
        SpecError: an invalid scaling table.
        WeightsError: meta weights, or a parameter that transformers itself never initializes.
        BalanceError: a model loaded without the selection biases its config names (`load_selection_biases`).
        ParameterizationError: a model already parameterized, loaded, quantized, compiled or wrapped, another
            architecture than the base, experts in one of the two alone, another sparsity, a multiplier without a place
            to go, NaN or negative constants, numbers that contradict a file, an unknown experts implementation.
        TunedError: a file of tuned numbers that cannot be read or is not for its base.
        In every case the model is left as it was: all that can fail happens before the first weight is written.
    """
    check_plain(model)
    require_selection_biases(model)
    parameterization = plan(
        type(model),
        model.config,
        base_shape,
        target_shape,
        spec=spec,
        init_std=init_std,
        constants=constants,
        seed=seed,
        allow_sparsity_change=allow_sparsity_change,
        only=only,
    )
    shapes = {name: rule.shape for name, rule in parameterization.rules.items()}
    check_shapes(shapes, model, "its config builds")
    write = _reinit(model, reinit, parameterization.rules)
    if write and folds is not None:
        raise ParameterizationError(f"folds={folds} chooses the rates of weights that are kept: pass reinit=False")
    if write:
        seed = int(torch.randint(2**31, (), device="cpu").item()) if seed is None else seed
        parameterization = replace(parameterization, seed=seed)
    else:
        parameterization = replace(parameterization, seed=None, rules=_rates(model, parameterization.rules, folds))
    record, rules = parameterization.to_dict(), parameterization.rules
    backend = None if experts == "auto" and parameterization.shape.dense else _choose_experts(model, experts)
    initialize = None
    if write:
        assert seed is not None
        starts = _starts(model, only)
        initialize = prepare(model, {name: (rule.init, rule.padding) for name, rule in rules.items()}, seed)
    if backend is not None:
        _set_experts(model, backend)
    if initialize is not None:
        initialize()
        for buffer, value in starts:
            buffer.fill_(value)
    model.config.moe_param = record
    model._moe_param = True  # type: ignore[assignment]
    say_once(model.config, stacklevel=2)
    return parameterization


def _reinit(model: PreTrainedModel, reinit: bool | None, rules: Mapping[str, Rule]) -> bool:
    """Whether weights are to be written; where it was not said, only over those that were just built.

    Those that are left alone do not count. A record in the config does not tell by itself: models built from one config
    object share it.
    """
    if reinit is not None:
        return reinit
    kept = {name: rule.init for name, rule in rules.items() if rule.role == LEFT_ALONE}
    name, recorded = loaded(model, kept), getattr(model.config, "moe_param", None) is not None
    if getattr(model, "_moe_param", False) or (recorded and name):
        found = "is already parameterized (config.moe_param is set; Parameterization.from_model reads its rules)"
    elif name:
        found = f"holds loaded weights ({name} is from a checkpoint)"
    elif departs := departure(model, shared_trace(type(model), model.config)[1].laws | kept):
        found = f"holds weights that are not as transformers builds them ({departs})"
    else:
        return True
    raise ParameterizationError(
        f"{type(model).__name__} {found}: pass reinit=False to keep its weights and take the rates, or reinit=True to "
        "write new weights over them"
    )


def _starts(model: PreTrainedModel, only: str | None) -> list[tuple[torch.Tensor, float]]:
    """Buffers that start at a constant, with it: selection biases, and what else construction fills. Injected: 0."""
    laws, text = shared_trace(type(model), model.config)[1].laws, text_part(model) if only else ""
    buffers = [(n, b) for n, b in model.named_buffers() if n in laws and n.startswith(text)]
    own = [(b, laws[n].value) for n, b in buffers if laws[n].kind == "constant"]
    return own + [(module.bias, 0.0) for module in model.modules() if isinstance(module, Selection)]


def _rates(model: PreTrainedModel, rules: dict[str, Rule], folds: bool | None) -> dict[str, Rule]:
    """The rules for weights that are kept; without folds where those are not wanted."""
    if folds is False:
        return {
            name: replace(
                rule,
                lr=rule.lr / rule.multiplier,
                weight_decay=rule.weight_decay * rule.multiplier,
                multiplier=1.0,
                folded=(),
            )
            for name, rule in rules.items()
        }
    folded = next((name for name, rule in rules.items() if rule.folded), None)
    carried = any(entry["folded"] for entry in (getattr(model.config, "moe_param", None) or {}).get("rules", ()))
    empty = any(p.is_meta for p in model.parameters())  # whatever comes to stand there
    if folds is None and folded and not carried and not empty:
        warnings.warn(
            f"nothing says that the weights of {type(model).__name__} were trained under the parameterization: its "
            f"rates are for weights that carry the folded multipliers ({folded}: {rules[folded].multiplier:.3g}). Pass "
            "folds=False for the rates without them, or folds=True where the weights do carry them.",
            stacklevel=3,
        )
    return rules


def _tuned(path: str | Path, **given: Any) -> Tuned:
    """The file's numbers; what is given beside the file must be the file's."""
    tuned = read_tuned(path)
    for name, value in given.items():
        if value is not None and not _same(name, value, getattr(tuned, name)):
            raise ParameterizationError(
                f"{name} is {value!r} here and {getattr(tuned, name)!r} in {path}: leave it to the file, or give "
                "base_shape as a Shape"
            )
    return tuned


def _same(name: str, given: Any, recorded: Any) -> bool:
    return ScalingSpec.load(given) == ScalingSpec.load(recorded) if name == "spec" else given == recorded


def _choose_experts(model: PreTrainedModel, experts: str | None) -> str | None:
    """The implementation to set, None for none; only looks."""
    if experts is None:
        return None
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from moe_param.experts.megablocks import is_available

    interface = any(is_experts(module) for module in model.modules())
    if experts == "auto":
        return "megablocks" if interface and model.device.type == "cuda" and is_available() else None
    if experts not in ("eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()):
        valid = ", ".join(["eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())])
        raise ParameterizationError(f"unknown experts implementation {experts!r} (valid: {valid}, auto)")
    if experts != "eager" and not interface:
        raise ParameterizationError(
            f"{type(model).__name__} has no experts of transformers' experts interface, which {experts!r} needs: leave "
            "experts=None, or give the class of its experts transformers' decorator `use_experts_implementation`"
        )
    return experts if interface else None


def _set_experts(model: PreTrainedModel, backend: str) -> None:
    """transformers may refuse an implementation it knows; then every part has the one it had."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    before = [(config, config._experts_implementation_internal) for config in configs]
    try:
        model.set_experts_implementation(backend)
    except Exception as error:
        for config, implementation in before:
            config._experts_implementation_internal = implementation
        raise ParameterizationError(
            f"transformers cannot set the experts implementation {backend!r}: {str(error).splitlines()[0]}"
        ) from error


def _check_kind(base: Shape, target: Shape) -> None:
    if base.dense != target.dense:
        first, second = ("the base is dense", "the target") if base.dense else ("the target is dense", "the base")
        raise ParameterizationError(
            f"{first} and {second} has experts: what is found at the one says nothing of the other. Tune a base of the "
            "target's own architecture (moe_param.suggest_base finds one)"
        )


def _check_sparsity(base: Shape, target: Shape, allowed: bool) -> None:
    if base.sparsity == target.sparsity:
        return
    message = (
        f"the target activates {target.top_k} of {target.num_experts} experts, the base {base.top_k} of "
        f"{base.num_experts}: the rules hold at fixed sparsity top_k / num_experts (arXiv:2601.20205, Section 3.2)."
    )
    if not allowed:
        raise ParameterizationError(message + " Scale top_k with num_experts, or pass allow_sparsity_change=True.")
    warnings.warn(
        message + " The paper saw the transferred optimum degrade slowly when sparsity changes (Figure 11).",
        stacklevel=4,
    )


def _check_numbers(init_std: float | None, constants: Mapping[str, Mapping[str, float]] | None) -> None:
    if init_std is not None and not _positive(init_std):
        raise ParameterizationError(f"init_std must be a positive number, got {init_std!r}")
    if constants is not None and not isinstance(constants, Mapping):
        raise ParameterizationError(f"constants must map roles to {{'init': c, 'lr': c}}, got {constants!r}")
    check_known(constants or (), ROLES, "role", "constants", ParameterizationError)
    for role, values in (constants or {}).items():
        if not isinstance(values, Mapping):
            raise ParameterizationError(f"constants.{role} must be a mapping like {{'lr': 0.5}}, got {values!r}")
        check_known(values, ("init", "lr"), "key", f"constants.{role}", ParameterizationError)
        for key, value in values.items():
            if not _positive(value):
                raise ParameterizationError(f"constants.{role}.{key} must be a positive number, got {value!r}")


def _positive(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0
