"""`apply` as a whole: nothing half done, clear refusals, and rules that survive a checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moe_param
from moe_param import (
    Parameterization,
    ParameterizationError,
    RoleError,
    ScalingSpec,
    Shape,
    ShapeError,
    SpecError,
    scale_config,
)
from tests.models import build, classes, initialized, tiny_config, tokens
from tests.structure.test_roles import WithProbes

BASE = Shape(width=32, depth=2, num_experts=16, top_k=4, expert_size=48)
"""A base for the tiny mixtral, which is 64 wide, 4 deep, with 2 of 8 experts of 96."""


def snapshot(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: t if t.is_meta else t.detach().clone() for name, t in tensors.items()}
    found = getattr(getattr(model, "module", model), "config", None)  # a wrapper's is inside
    config = copy.deepcopy(found.to_dict()) if found is not None else {}
    config["experts"] = found._experts_implementation if found is not None else None
    return values, config


def assert_untouched(model: Any, before: tuple[dict[str, Any], dict[str, Any]]) -> None:
    values, config = snapshot(model)
    assert config == before[1]
    assert values.keys() == before[0].keys()
    for name, tensor in values.items():
        assert tensor is before[0][name] if tensor.is_meta else torch.equal(tensor, before[0][name]), name


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# -- bad input -------------------------------------------------------------------------------------------------------
def dense() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=128)
    )


def meta_in_part() -> Any:
    model = build("mixtral")
    model.lm_head.to("meta")
    return model


def quantized() -> Any:
    model = build("mixtral")
    model.hf_quantizer = object()
    return model


def resized() -> Any:
    model: Any = build("mixtral")
    model.lm_head = torch.nn.Linear(64, 130, bias=False)
    return model


def extended() -> Any:
    model = build("mixtral")
    model.model.layers[0].adapter = torch.nn.Linear(64, 64)
    return model


def adapters() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def with_adapters() -> Any:
    model = build("mixtral")
    model.add_adapter(adapters())
    return model


def peft_of(model: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, adapters())


def wrapped_by_peft() -> Any:
    return peft_of(build("mixtral"))


def refusing() -> Any:
    """As transformers refuses to leave "deepgemm_megamoe", but at the worst moment."""
    model: Any = build("mixtral")

    def set_experts_implementation(name: str) -> None:
        model.config._experts_implementation_internal = name
        raise RuntimeError(f"cannot switch to {name}")

    model.set_experts_implementation = set_experts_implementation
    return model


def nemotron(init_weights: Callable[[Any, Any], None]) -> Any:
    """A model whose inner part initializes what is special about it in its own way."""
    model = build("nemotron_h")
    inner = type(model.model)
    model.model.__class__ = type("Inner", (inner,), {"_init_weights": init_weights})
    return model


def failing_at_last() -> Any:
    """The special values of its last mixer cannot be computed: those before it must not have been written."""

    def init_weights(inner: Any, module: Any) -> None:
        if hasattr(module, "dt_bias") and module.layer_idx == mixers[-1]:
            raise RuntimeError("no decay for this layer")
        super(type(inner), inner)._init_weights(module)

    model = nemotron(init_weights)
    mixers = [m.layer_idx for m in model.modules() if hasattr(m, "dt_bias")]
    assert len(mixers) > 1
    return model


def forgetful() -> Any:
    def init_weights(inner: Any, module: Any) -> None:
        if not hasattr(module, "dt_bias"):
            super(type(inner), inner)._init_weights(module)

    return nemotron(init_weights)


def reload() -> Any:
    model = build("mixtral")
    moe_param.apply(model, BASE, seed=1, experts=None)
    return model


def odd(**changes: Any) -> Shape:
    return dataclasses.replace(BASE, **changes)


def rows(**changes: Any) -> dict[str, Any]:
    table = copy.deepcopy(ScalingSpec.load("moe-completep").to_dict())
    table["roles"].update(changes)
    return table


def mixtral() -> Any:
    return build("mixtral")


BAD: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "no experts": (dense, {}, ParameterizationError, "the target is dense and the base has experts"),
    "parameters without a role": (
        lambda: WithProbes(tiny_config("mixtral")),
        {},
        RoleError,
        r"2 parameters(?s:.*)probe \(3,\)(?s:.*)other_probe \(2, 5\)",
    ),
    "target_shape of another model": (
        mixtral,
        {"target_shape": odd(width=128, top_k=2, num_experts=8)},
        ShapeError,
        r"target_shape .*width=128.* is not the model's shape .*width=64",
    ),
    "heads that do not divide": (
        mixtral,
        {"base_shape": odd(width=40)},
        ShapeError,
        "num_attention_heads = 4 into 2.5",
    ),
    "another head_dim in a Shape": (mixtral, {"base_shape": odd(head_dim=8)}, ShapeError, "head_dim = 8"),
    "another sparsity": (mixtral, {"base_shape": odd(top_k=2)}, ParameterizationError, "activates 2 of 8 .* 2 of 16"),
    "unknown spec": (mixtral, {"spec": "moe-complete"}, SpecError, "'moe-completep'"),
    "spec with an unknown role": (mixtral, {"spec": rows(expert_dwn={})}, SpecError, "'expert_dwn'.*'expert_down'"),
    "spec that does not scale depth": (mixtral, {"spec": "kakao"}, ParameterizationError, "does not scale depth"),
    "base that is no shape": (mixtral, {"base_shape": {"width": 32}}, ParameterizationError, "got dict"),
    "base of another architecture": (
        mixtral,
        {"base_shape": tiny_config("olmoe")},
        ParameterizationError,
        "different architectures: olmoe and mixtral",
    ),
    "base without a layer of that kind": (
        lambda: build("qwen2_moe"),
        {"base_shape": tiny_config("qwen2_moe", mlp_only_layers=[])},
        ParameterizationError,
        "layer 0 of the target .* has no counterpart in the base",
    ),
    "init_std NaN": (
        mixtral,
        {"init_std": math.nan},
        ParameterizationError,
        "init_std must be a positive number, got nan",
    ),
    "init_std negative": (mixtral, {"init_std": -0.02}, ParameterizationError, "init_std must be a positive number"),
    "init_std zero": (mixtral, {"init_std": 0.0}, ParameterizationError, "init_std must be a positive number"),
    "constant NaN": (
        mixtral,
        {"constants": {"router": {"lr": math.nan}}},
        ParameterizationError,
        r"constants\.router\.lr must be a positive number, got nan",
    ),
    "constant negative": (
        mixtral,
        {"constants": {"router": {"init": -1}}},
        ParameterizationError,
        r"constants\.router\.init must be a positive number, got -1",
    ),
    "init_std as text": (mixtral, {"init_std": "0.02"}, ParameterizationError, "init_std must be a positive number"),
    "constants without a kind": (
        mixtral,
        {"constants": {"router": 2.0}},
        ParameterizationError,
        r"constants\.router must be a mapping",
    ),
    "constants as a list": (mixtral, {"constants": ["router"]}, ParameterizationError, "constants must map roles"),
    "target_shape that is no shape": (
        mixtral,
        {"target_shape": {"width": 64}},
        ParameterizationError,
        "target_shape must be a Shape, got dict",
    ),
    "constant for an unknown role": (
        mixtral,
        {"constants": {"ruoter": {"lr": 1}}},
        ParameterizationError,
        "unknown role 'ruoter'",
    ),
    "constant of an unknown kind": (
        mixtral,
        {"constants": {"router": {"eps": 1}}},
        ParameterizationError,
        r"constants\.router: unknown key 'eps'",
    ),
    "already parameterized": (reload, {}, ParameterizationError, "already parameterized"),
    "one weight on meta": (meta_in_part, {}, ValueError, r"1 parameters are on the meta device, lm_head\.weight"),
    "quantized": (quantized, {}, ParameterizationError, "MixtralForCausalLM is quantized"),
    "quantized, rates only": (quantized, {"reinit": False}, ParameterizationError, "MixtralForCausalLM is quantized"),
    "weights its config does not build": (resized, {}, ShapeError, r"lm_head\.weight.*\(128, 64\).*\(130, 64\)"),
    "modules its config does not build": (extended, {}, ShapeError, r"adapter\.weight: not in what its config builds"),
    "compiled": (
        lambda: torch.compile(build("mixtral")),
        {},
        ParameterizationError,
        r"pass the model inside \(model\._orig_mod\)",
    ),
    "wrapped": (
        lambda: torch.nn.DataParallel(build("mixtral")),
        {},
        ParameterizationError,
        r"got DataParallel: .*model\.module",
    ),
    "no model": (
        lambda: torch.nn.Linear(2, 2),
        {},
        ParameterizationError,
        "expected a transformers PreTrainedModel, got Linear",
    ),
    "with adapters": (
        with_adapters,
        {},
        ParameterizationError,
        "MixtralForCausalLM has PEFT adapters.*before it is wrapped",
    ),
    "wrapped by PEFT": (
        wrapped_by_peft,
        {},
        ParameterizationError,
        "PeftModel.* has PEFT adapters.*freezes the base.*base model before",
    ),
    "folds of weights to be written": (mixtral, {"folds": False}, ParameterizationError, "pass reinit=False"),
    "experts that transformers refuses": (
        refusing,
        {"experts": "batched_mm"},
        ParameterizationError,
        "transformers cannot set the experts implementation 'batched_mm': cannot switch",
    ),
    "an initializer that fails at last": (
        failing_at_last,
        {"base_shape": partial(tiny_config, "nemotron_h")},  # not every transformers has it
        RuntimeError,
        "no decay for this layer",
    ),
    "a parameter nobody initializes": (
        forgetful,
        {"base_shape": partial(tiny_config, "nemotron_h")},  # not every transformers has it
        moe_param.WeightsError,
        r"Inner\._init_weights leaves model\..* unwritten.*let it initialize the \w+ of NemotronHMamba2Mixer",
    ),
    "an implementation for experts that are not transformers'": (
        partial(build, "own_list"),
        {"base_shape": partial(tiny_config, "own_list"), "experts": "megablocks"},
        ParameterizationError,
        "ListLM has no experts of transformers' experts interface, which 'megablocks' needs",
    ),
    "unknown experts implementation": (mixtral, {"experts": "megablock"}, ParameterizationError, "'megablock'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_and_the_model_is_untouched(case: str) -> None:
    make, changes, error, message = BAD[case]
    model = make()
    before = snapshot(model)
    arguments: dict[str, Any] = {"base_shape": BASE, "seed": 1, "experts": None} | changes
    arguments = {name: value() if isinstance(value, partial) else value for name, value in arguments.items()}
    with pytest.raises(error, match=message):
        moe_param.apply(model, **arguments)
    assert_untouched(model, before)
    if make is mixtral:  # and nothing is left behind that would stop the right call
        moe_param.apply(model, BASE, seed=1, experts=None)
        with pytest.raises(AssertionError):
            assert_untouched(model, before)


@pytest.mark.parametrize("size", ["width", "depth", "num_experts", "top_k", "expert_size"])
def test_sizes_must_be_whole_and_positive(size: str) -> None:
    for value in (0, -1, 1.5, 32.0, "32"):
        with pytest.raises(ShapeError, match=rf"Shape\.{size} must be a positive integer"):
            odd(**{size: value})


def test_a_model_on_meta_gets_rates_but_no_values() -> None:
    with torch.device("meta"):
        model = classes("mixtral")[0](tiny_config("mixtral"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="materialize the model"):
        moe_param.apply(model, BASE, seed=1, experts=None)
    assert_untouched(model, before)
    rates = moe_param.apply(model, BASE, reinit=False, experts=None)
    assert rates.rules == moe_param.apply(mixtral(), BASE, seed=1, experts=None).rules


# -- what is allowed -------------------------------------------------------------------------------------------------
def test_another_sparsity_when_asked_for_is_a_warning() -> None:
    model = mixtral()
    with pytest.warns(UserWarning, match=r"2 of 8 .* degrade slowly .*Figure 11"):
        p = moe_param.apply(model, odd(top_k=2), seed=1, experts=None, allow_sparsity_change=True)
    assert p.base_shape.sparsity != p.shape.sparsity
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe_param.apply(mixtral(), BASE, seed=1, experts=None, allow_sparsity_change=True)


def test_a_base_larger_than_the_target() -> None:
    small, large = tiny_config("mixtral"), scale_config(tiny_config("mixtral"), width=128, depth=8, num_experts=16)
    down = moe_param.apply(build("mixtral", small), large, seed=1, experts=None)
    up = moe_param.apply(build("mixtral", large), small, seed=1, experts=None)
    layer = "model.layers.0."
    for name in (layer + "mlp.experts.gate_up_proj", layer + "mlp.gate.weight", "lm_head.weight"):
        assert down.rules[name].lr * up.rules[name].lr == pytest.approx(1.0)
        assert down.rules[name].lr == pytest.approx(2.0)
    model = build("mixtral", small)
    moe_param.apply(model, large, seed=1, experts=None)
    with torch.no_grad():
        assert model(tokens()).logits.isfinite().all()


def test_a_shape_and_a_config_are_the_same_base() -> None:
    base_config = scale_config(tiny_config("mixtral"), **{k: v for k, v in dataclasses.asdict(BASE).items() if v})
    by_shape = moe_param.apply(one := mixtral(), BASE, seed=1, experts=None)
    by_config = moe_param.apply(two := mixtral(), base_config, seed=1, experts=None)
    assert by_shape == by_config
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(two).values(), strict=True))
    target = Shape(width=64, depth=4, num_experts=8, top_k=2, expert_size=96)
    assert moe_param.apply(mixtral(), BASE, target, seed=1, experts=None) == by_shape
    exact = dataclasses.replace(target, head_dim=16)
    assert moe_param.apply(mixtral(), BASE, exact, seed=1, experts=None) == by_shape


def test_rates_only_leave_the_weights_alone() -> None:
    model, other = mixtral(), mixtral()
    before = weights(model)
    with pytest.warns(UserWarning, match=r"o_proj\.weight: 0\.5\)\. Pass folds=False"):
        rates = moe_param.apply(model, BASE, reinit=False, experts=None)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert rates.rules == moe_param.apply(other, BASE, seed=1, experts=None).rules
    assert not any(torch.equal(p, before[name]) for name, p in other.named_parameters() if "embed" in name)
    assert Parameterization.from_model(model) == rates
    # an already parameterized model can change its base, keeping its weights
    before = weights(other)
    again = moe_param.apply(other, odd(depth=1, expert_size=24), reinit=False, experts=None)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    assert (again.base_shape.depth, again.base_shape.expert_size) == (1, 24)
    assert Parameterization.from_model(other) == again


def test_the_experts_backend_is_set_where_one_is_named() -> None:
    model = mixtral()
    before = model.config._experts_implementation
    moe_param.apply(model, BASE, seed=1)  # a parameterization does not choose kernels
    assert model.config._experts_implementation == before
    for name in ("eager", "batched_mm"):
        moe_param.apply(model, BASE, experts=name, reinit=False)
        assert model.config._experts_implementation == name
    moe_param.apply(model, BASE, experts="auto", reinit=False)  # on a CPU: transformers' choice stays
    assert model.config._experts_implementation == "batched_mm"


# -- weights that were not trained under the rules -------------------------------------------------------------------
def test_only_weights_without_folds_are_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    for folds in (False, True):  # it was said
        moe_param.apply(mixtral(), BASE, reinit=False, folds=folds)
    moe_param.apply(mixtral(), tiny_config("mixtral"), reinit=False)  # at the base nothing is folded
    model = mixtral()
    ours = moe_param.apply(model, BASE, seed=1)  # its weights carry the folds
    assert moe_param.apply(model, BASE, reinit=False).rules == ours.rules
    assert not recwarn.list
    model = mixtral()
    bare = moe_param.apply(model, BASE, reinit=False, folds=False)
    assert Parameterization.from_model(model) == bare and {r.multiplier for r in bare.rules.values()} == {1.0}
    with pytest.warns(UserWarning, match="folds=False"):  # a record, but of weights without
        moe_param.apply(model, BASE, reinit=False)


# -- the forward pass is not touched ---------------------------------------------------------------------------------
def test_the_model_is_still_plain_transformers() -> None:
    model = mixtral()
    moe_param.apply(model, BASE, seed=1, experts=None)
    plain = build("mixtral", seed=9)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, plain(tokens()).logits)


# -- persistence -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "deepseek_v3", "ernie4_5_moe", "gpt_oss", "nemotron_h", "jamba"]
)
def test_rules_survive_a_checkpoint(family: str, tmp_path: Path) -> None:
    base = tiny_config(initialized(family))
    shape = Shape.from_config(base)
    config = scale_config(base, width=128, depth=2 * shape.depth, num_experts=16, expert_size=2 * shape.expert_size)
    model = build(family, config)
    constants = {"expert_down": {"init": 0.25, "lr": 0.0625}}
    ours = moe_param.apply(model, base, seed=5, init_std=0.03, constants=constants, experts=None)
    assert Parameterization.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours
    with torch.no_grad():  # as if trained
        for p in model.parameters():
            p.add_(0.01)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = snapshot(loaded)
    theirs = Parameterization.from_model(loaded)
    assert theirs == ours
    assert theirs.rules.keys() == dict(loaded.named_parameters()).keys()
    assert theirs.table() == ours.table()
    assert_untouched(loaded, before)
    assert all(torch.equal(p, before[0][name]) for name, p in model.named_parameters())
    a, b = (p.param_groups(m, lr=1e-3, weight_decay=0.1) for p, m in ((ours, model), (theirs, loaded)))
    assert [(g["names"], g["lr"], g["eps"], g["weight_decay"]) for g in a] == [
        (g["names"], g["lr"], g["eps"], g["weight_decay"]) for g in b
    ]
    with pytest.raises(ParameterizationError, match="already parameterized"):
        moe_param.apply(loaded, base, experts=None)
    assert_untouched(loaded, before)


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> Any:
    """A parameterized checkpoint whose config.json was changed by hand afterwards."""
    model = mixtral()
    moe_param.apply(model, BASE, seed=1, experts=None)
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["moe_param"])
    path.write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(folder)


def wrong_shape(record: dict[str, Any]) -> None:
    entry = next(e for e in record["rules"] if e["parameter"].endswith("experts.gate_up_proj"))
    entry["shape"] = [8, 192, 32]


def fewer_layers(record: dict[str, Any]) -> None:
    for entry in record["rules"]:
        if "layers" in entry:
            entry["layers"] = [[0, 2]]


def no_head(record: dict[str, Any]) -> None:
    record["rules"] = [e for e in record["rules"] if e["parameter"] != "lm_head.weight"]


def newer(record: dict[str, Any]) -> None:
    record["format"] = 99


def misspelt(record: dict[str, Any]) -> None:
    record["spec"]["roles"]["ruoter"] = record["spec"]["roles"].pop("router")


@pytest.mark.parametrize(
    "change, error, message",
    [
        (wrong_shape, ShapeError, r"gate_up_proj.* records \(8, 192, 32\), the model has \(8, 192, 64\)"),
        (fewer_layers, ShapeError, r"layers\.3\..*: not in what config\.moe_param records"),
        (no_head, ShapeError, r"lm_head\.weight: not in what config\.moe_param records"),
        (newer, ParameterizationError, r"format 99, this moe_param reads format 1"),
        (misspelt, SpecError, r"unknown role 'ruoter'.*'router'"),
    ],
)
def test_a_checkpoint_whose_record_is_not_its_own(
    change: Callable[[dict[str, Any]], None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    loaded = edited(tmp_path, change)
    before = snapshot(loaded)
    with pytest.raises(error, match=message):
        Parameterization.from_model(loaded)
    assert_untouched(loaded, before)
    assert Parameterization.from_model(edited(tmp_path, lambda record: None)).base_shape.width == 32


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_keeps_its_rules(tied: bool, tmp_path: Path) -> None:
    model = build("mixtral", tie_word_embeddings=tied)
    ours = moe_param.apply(model, BASE, seed=1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.resize_token_embeddings(140)
    with pytest.warns(UserWarning, match=r"vocabulary was resized .*128 rows, now 140"):
        theirs = Parameterization.from_model(loaded)
    for name, rule in theirs.rules.items():
        rows: dict[str, Any] = {"shape": (140, 64)} if rule.role in ("embedding", "unembedding") else {}
        assert rule == dataclasses.replace(ours.rules[name], **rows)
    groups = theirs.param_groups(loaded, lr=1e-3)
    assert sum(len(g["names"]) for g in groups) == len(theirs.rules)
    loaded.model.layers[0].mlp.experts.down_proj.data = torch.zeros(9, 64, 96)  # other rows are no vocabulary
    with pytest.warns(UserWarning), pytest.raises(ShapeError, match="down_proj"):
        Parameterization.from_model(loaded)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel, peft_of], ids=["compile", "dp", "peft"])
def test_rules_are_read_from_the_model_inside(wrap: Callable[[Any], Any]) -> None:
    model = mixtral()
    ours = moe_param.apply(model, BASE, seed=1)
    wrapped = wrap(model)
    with pytest.raises(ParameterizationError, match=r"model inside|PEFT adapters"):
        Parameterization.from_model(wrapped)
    if not hasattr(wrapped, "peft_config"):
        assert Parameterization.from_model(model) == ours


def test_a_model_without_a_record_says_so() -> None:
    with pytest.raises(ParameterizationError, match=r"MixtralForCausalLM carries no parameterization"):
        Parameterization.from_model(mixtral())


def test_the_record_is_small_and_plain() -> None:
    """One entry per role and layer kind, not per parameter: a config.json stays readable."""
    model = mixtral()
    ours = moe_param.apply(model, BASE, seed=1, experts=None)
    record = model.config.moe_param
    assert record == ours.to_dict() == json.loads(json.dumps(record))
    assert len(record["rules"]) == 12 < len(ours.rules)
