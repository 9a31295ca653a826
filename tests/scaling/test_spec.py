"""Tables load strictly, and what they say comes out of `plan` as the papers' numbers, worked out by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moe_param
from moe_param import ScalingSpec, SpecError
from moe_param.scaling.rules import derive_rules
from moe_param.scaling.spec import ROLES, presets
from moe_param.structure.laws import InitLaw
from moe_param.structure.roles import read_structure
from tests.models import OWN_EXPERTS, classes, tiny_config

PRESETS = {"moe-completep", "completep", "mup", "mup-moe", "kakao", "standard", "table2", "mssp"}


def table(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(ScalingSpec.load("moe-completep").to_dict()) | changes


def broken(role: str, **changes: Any) -> dict[str, Any]:
    values = table()
    values["roles"][role].update(changes)
    return values


# -- loading ---------------------------------------------------------------------------------------------------------
def test_the_presets_are_there() -> None:
    assert set(presets()) == PRESETS


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_row_of_a_preset_has_a_source_and_the_table_survives_yaml(name: str, tmp_path: Path) -> None:
    spec = ScalingSpec.load(name)
    assert spec.name == name
    assert set(spec.roles) == set(ROLES)
    assert "arXiv:" in spec.source or name == "standard"
    for role, row in spec.roles.items():
        assert "arXiv:" in row.source or name == "standard", role
        assert len(row.source) > 10, role
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(spec.to_dict()))
    for way in (path, str(path), spec.to_dict(), spec):
        assert ScalingSpec.load(way) == spec
    other = spec.to_dict()
    other["roles"]["router"]["lr"] = {"width": -0.25}
    assert ScalingSpec.load(other) != spec


@pytest.mark.parametrize(
    "values, complaint",
    [
        (table(rolse={}), r"unknown key 'rolse'.*'roles'"),
        (table(multipliers={"residual_brnch": {"depth": -1}}), r"unknown site 'residual_brnch'.*'residual_branch'"),
        (table(multipliers={"logits": {"widht": -1}}), r"multipliers\.logits: unknown dimension 'widht'.*'width'"),
        (table(fixed=["dept"]), r"unknown dimension 'dept'.*'depth'"),
        (table(init="bass"), r"init must be 'base' or 'model'"),
        (table(roles={**table()["roles"], "expert_dwn": {}}), r"unknown role 'expert_dwn'.*'expert_down'"),
        (broken("router", lrr={}), r"router: unknown key 'lrr'.*'lr'"),
        (broken("router", lr={"widht": -1}), r"router\.lr: unknown dimension 'widht'.*'width'"),
        (broken("expert_up", eps={"topk": -1}), r"expert_up\.eps: unknown dimension 'topk'.*'top_k'"),
        (broken("router", lr={"width": float("nan")}), r"router\.lr\.width must be a finite number"),
        (broken("router", init_std={"width": float("inf")}), r"router\.init_std\.width must be a finite number"),
        (broken("router", lr={"width": "-1"}), r"router\.lr\.width must be a finite number"),
        (broken("router", lr={"width": True}), r"router\.lr\.width must be a finite number"),
        (broken("router", lr=-1), r"router\.lr must map dimensions to their values"),
        (broken("router", decay=1), r"router\.decay must be true or false"),
        (table(roles=None), r"roles must map roles to their values .* found None"),
        (table(roles=["router"]), r"roles must map roles to their values .* found \['router'\]"),
        (table(roles={**table()["roles"], "router": None}), r"router must map keys to their values .* found None"),
        (table(roles={**table()["roles"], 1: {}}), r"unknown role 1 \(valid: embedding, "),
        (table(multipliers=None), r"multipliers must map sites to their values"),
        (table(multipliers={"logits": None}), r"multipliers\.logits must map dimensions to their values"),
        (table(fixed=None), r"fixed must be a list of dimensions, found None"),
        (table(fixed="depth"), r"fixed must be a list of dimensions, found 'depth'"),
        (table(fixed=[None]), r"fixed: unknown dimension None"),
        (table(fixed=["head_dim"]), r"fixed: unknown dimension 'head_dim' \(valid: width, "),
        (table(init=None), r"init must be 'base' or 'model', got None"),
        (table(name=None), r"name must be text, found None"),
        (table(source=[]), r"source must be text, found \[\]"),
        (table(extends=None), r"extends must be text, found None"),
        ({**table(), True: 1}, r"unknown key True"),
        (broken("router", lr=None), r"router\.lr must map dimensions to their values"),
        (broken("router", eps=None), r"router\.eps must map dimensions to their values"),
        (broken("router", eps="linear"), r"router: only biases can take the epsilon of their linear"),
        (broken("router", decay=None), r"router\.decay must be true or false, got None"),
        (broken("expert_up", tied="yes"), r"expert_up\.tied must be true or false, got 'yes'"),
        (broken("router", source=None), r"router: every row names its source .* source must be text, found None"),
        (broken("router", lr={None: -1}), r"router\.lr: unknown dimension None"),
        (broken("router", lr={"width": None}), r"router\.lr\.width must be a finite number, got None"),
    ],
)
def test_what_a_table_cannot_say(values: dict[str, Any], complaint: str) -> None:
    ScalingSpec.load(table())
    with pytest.raises(SpecError, match=complaint):
        ScalingSpec.load(values)


def test_rows_and_keys_that_are_missing() -> None:
    values = table()
    del values["roles"]["expert_down"], values["roles"]["bias"]
    with pytest.raises(SpecError, match=r"no row for expert_down, bias"):
        ScalingSpec.load(values)
    values = table()
    del values["roles"]["router"]["source"]
    with pytest.raises(SpecError, match=r"router.*source"):
        ScalingSpec.load(values)
    for key in ("name", "source", "roles"):
        values = table()
        del values[key]
        with pytest.raises(SpecError, match=rf"'{key}' is missing"):
            ScalingSpec.load(values)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"did you mean 'moe-completep'"):
        ScalingSpec.load("moe-complete")
    with pytest.raises(SpecError, match="give a preset or a YAML file"):
        ScalingSpec.load(tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("roles: {router: [1, 2")
    with pytest.raises(SpecError, match="is not YAML"):
        ScalingSpec.load(bad)
    bad.write_text("- a list\n")
    with pytest.raises(SpecError, match="must hold a mapping"):
        ScalingSpec.load(bad)
    bad.write_bytes("name: µP".encode("latin-1"))
    with pytest.raises(SpecError, match="is not YAML"):
        ScalingSpec.load(bad)
    bad.write_text("name: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(SpecError, match="is not YAML"):
        ScalingSpec.load(bad)


# -- extending -------------------------------------------------------------------------------------------------------
def written(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump({"name": path.stem, "source": "a test", **values}))
    return path


def test_a_child_says_only_what_it_changes(tmp_path: Path) -> None:
    parent = ScalingSpec.load("moe-completep")
    path = written(
        tmp_path / "mine.yaml",
        extends="moe-completep",
        multipliers={"logits": {}},
        roles={"router": {"init_std": {"fan_in": -0.5}, "source": "γ = 1/2"}},
    )
    mine = ScalingSpec.load(path)
    assert (mine.name, mine.source, mine.init, mine.fixed) == ("mine", "a test", "base", ())
    assert mine.multipliers == {**parent.multipliers, "logits": {}}
    assert {role for role in ROLES if mine.roles[role] != parent.roles[role]} == {"router"}
    router, before = mine.roles["router"], parent.roles["router"]
    assert router.init_std == {"fan_in": -0.5}
    assert (router.lr, router.eps, router.decay) == (before.lr, before.eps, before.decay)
    assert router.source == "γ = 1/2"
    # what is recorded needs no other file
    assert "extends" not in mine.to_dict()
    path.unlink()
    assert ScalingSpec.from_dict(mine.to_dict()) == mine


def test_a_path_is_looked_for_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    written(tmp_path / "parent.yaml", extends="kakao", init="model")
    child = ScalingSpec.load(written(tmp_path / "below" / "child.yaml", extends="../parent.yaml"))
    assert (child.init, child.fixed) == ("model", ("depth",))
    assert child.roles == ScalingSpec.load("kakao").roles
    free = ScalingSpec.load(written(tmp_path / "free.yaml", extends="below/child.yaml", fixed=[], init="base"))
    assert (free.init, free.fixed) == ("base", ())


def test_what_extending_cannot_say(tmp_path: Path) -> None:
    one = written(tmp_path / "one.yaml", extends="two.yaml")
    two = written(tmp_path / "two.yaml", extends="three.yaml")
    written(tmp_path / "three.yaml", extends="two.yaml")
    for path, circle in ((one, r"two\.yaml → three\.yaml → two\.yaml"), (two, r"two\.yaml → three\.yaml → two\.yaml")):
        with pytest.raises(SpecError, match=rf"in a circle: {circle}$"):
            ScalingSpec.load(path)
    itself = written(tmp_path / "self.yaml", extends="self.yaml")
    with pytest.raises(SpecError, match=r"in a circle: self\.yaml → self\.yaml"):
        ScalingSpec.load(itself)
    with pytest.raises(SpecError, match=r"no scaling spec 'moe-complete' \(did you mean 'moe-completep'\?\)"):
        ScalingSpec.load({"name": "mine", "source": "a test", "extends": "moe-complete"})
    with pytest.raises(SpecError, match=r"router: every row names its source .* the key 'source' is missing"):
        ScalingSpec.load({"name": "m", "source": "s", "extends": "mup", "roles": {"router": {"lr": {}}}})
    with pytest.raises(SpecError, match=r"no row for unembedding, .*extends: moe-completep"):
        ScalingSpec.load({"name": "m", "source": "s", "roles": {"embedding": {"source": "s"}}})


# -- the numbers -----------------------------------------------------------------------------------------------------
# base: width 32, 2 layers, 8 experts of 16, top 2, heads of 8. target: width ×4, depth ×2, experts (and top_k) ×3,
# expert size ×5, head_dim ×16/8. One prime per axis, so that no two products agree by chance.
BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
TARGET = {**BASE, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
TARGET["head_dim"] = 16
MIXTRAL = (
    {**BASE, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16},
    {**TARGET, "num_local_experts": 24, "num_experts_per_tok": 6, "intermediate_size": 80},
)
DOTS1 = (  # sigmoid gates that are not normalized, a shared expert, a leading dense layer; no query bias
    {**BASE, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 48},
    {**TARGET, "n_routed_experts": 24, "num_experts_per_tok": 6, "moe_intermediate_size": 80, "intermediate_size": 96},
)


def plan(family: str, sizes: tuple[dict[str, Any], dict[str, Any]], spec: str, **changes: Any) -> Any:
    base, target = (tiny_config(family, **{**s, "layer_types": None, **changes}) for s in sizes)
    return moe_param.plan(classes(family)[0], target, base, spec=spec)


def check(parameterization: Any, expected: dict[str, tuple[float, float, float, float]]) -> None:
    """name -> (init std or constant, lr, eps, forward multiplier folded in)."""
    for name, (init, lr, eps, multiplier) in expected.items():
        rule = parameterization.rules[name]
        found = (rule.constant if rule.init_std is None else rule.init_std, rule.lr, rule.eps, rule.multiplier)
        assert found == pytest.approx((init, lr, eps, multiplier), rel=1e-9), name


S = 0.02  # Mixtral's initializer_range
L0 = "model.layers.3."


def test_moe_completep_on_mixtral() -> None:
    root_half = 0.7071067811865476  # (d_base / d)^(1/2)
    p = plan("mixtral", MIXTRAL, "moe-completep")
    check(
        p,
        {
            "model.embed_tokens.weight": (S, 1, 1 / 4, 1),
            # queries of normed-free attention take the attention factor; fan-in ×4
            L0 + "self_attn.q_proj.weight": (S / 2 * root_half, 1 / 4 * root_half, 1 / 8 / root_half, root_half),
            L0 + "self_attn.k_proj.weight": (S / 2, 1 / 4, 1 / 8, 1),
            L0 + "self_attn.v_proj.weight": (S / 2, 1 / 4, 1 / 8, 1),
            # 8 heads of 16 where 4 of 8 were: fan-in ×4; branch 1/2
            L0 + "self_attn.o_proj.weight": (S / 4, 1 / 8, 1 / 4, 1 / 2),
            L0 + "mlp.gate.weight": (S / 4, 1 / 4, 1 / 6, 1),
            L0 + "mlp.experts.gate_up_proj": (S / 2, 1 / 4, 1 / 30, 1),
            # n^(1/2)/H = 2/5, LR 1/H = 1/5, eps 1/(4·2·3); branch 1/2; gates are normalized: no 1/K
            L0 + "mlp.experts.down_proj": (S / 5, 1 / 10, 1 / 12, 1 / 2),
            L0 + "input_layernorm.weight": (1, 1, 1 / 8, 1),
            L0 + "post_attention_layernorm.weight": (1, 1, 1 / 8, 1),
            "model.norm.weight": (1, 1, 1 / 4, 1),
            "lm_head.weight": (S / 4, 1 / 4, 1, 1 / 4),
        },
    )
    decayed = {n: r.weight_decay * r.lr for n, r in p.rules.items() if "norm" not in n}
    assert decayed == pytest.approx(dict.fromkeys(decayed, 1.0))
    assert {r.weight_decay for n, r in p.rules.items() if "norm" in n} == {0.0}


def test_moe_completep_with_tied_embeddings() -> None:
    p = plan("mixtral", MIXTRAL, "moe-completep", tie_word_embeddings=True)
    assert "lm_head.weight" not in p.rules
    check(
        p,
        {
            "model.embed_tokens.weight": (S, 1, 1 / 4, 1),
            "model.norm.weight": (1 / 4, 1 / 4, 1, 1 / 4),
        },
    )


def test_moe_completep_on_dots1_where_gates_are_not_normalized() -> None:
    p = plan("dots1", DOTS1, "moe-completep")
    check(
        p,
        {
            # queries pass a norm: its gain takes the attention factor, the projection does not. A gain is shared by
            # all heads, so that its gradient falls as the size of one head (×2), not as the width (×4)
            L0 + "self_attn.q_proj.weight": (S / 2, 1 / 4, 1 / 8, 1),
            L0 + "self_attn.q_norm.weight": (0.5**0.5, 0.5**0.5, 1 / 4 / 0.5**0.5, 0.5**0.5),
            L0 + "self_attn.k_norm.weight": (1, 1, 1 / 4, 1),
            L0 + "mlp.experts.down_proj": (S * 2 / 5 / 6, 1 / 5 / 6, 1 / 24 * 6, 1 / 6),
            L0 + "mlp.experts.gate_up_proj": (S / 2, 1 / 4, 1 / 30, 1),
            # every token visits the shared expert: no top_k anywhere
            L0 + "mlp.shared_experts.up_proj.weight": (S / 2, 1 / 4, 1 / 10, 1),
            L0 + "mlp.shared_experts.down_proj.weight": (S / 5, 1 / 10, 1 / 4, 1 / 2),
            # the dense MLP only doubles: 48 -> 96
            "model.layers.0.mlp.up_proj.weight": (S / 2, 1 / 4, 1 / 4, 1),
            "model.layers.0.mlp.down_proj.weight": (S * 2 / 2 / 2, 1 / 4, 1 / 4, 1 / 2),
        },
    )
    normalized = plan("dots1", DOTS1, "moe-completep", norm_topk_prob=True)
    check(normalized, {L0 + "mlp.experts.down_proj": (S / 5, 1 / 10, 1 / 12, 1 / 2)})


@pytest.mark.parametrize(
    "spec, expected",
    [
        (
            "completep",
            {
                "model.embed_tokens.weight": (S, 1, 1 / 4, 1),
                L0 + "mlp.gate.weight": (S / 2, 1 / 4, 1 / 8, 1),
                L0 + "mlp.experts.gate_up_proj": (S / 2, 1 / 4, 1 / 8, 1),
                L0 + "mlp.experts.down_proj": (S / 5**0.5 / 2, 1 / 10, 1 / 4, 1 / 2),
                "lm_head.weight": (S / 4, 1 / 4, 1, 1 / 4),
            },
        ),
        (
            "mup",
            {
                L0 + "mlp.gate.weight": (S / 2, 1 / 4, 1, 1),
                L0 + "mlp.experts.down_proj": (S / 5**0.5, 1 / 5, 1, 1),
                L0 + "self_attn.o_proj.weight": (S / 2, 1 / 4, 1, 1),
                "lm_head.weight": (S / 4, 1 / 4, 4, 1 / 4),
            },
        ),
        (
            "mup-moe",
            {
                L0 + "mlp.gate.weight": (S, 1, 1, 1),
                L0 + "mlp.experts.down_proj": (S / 5**0.5, 1 / 5, 1, 1),
                "lm_head.weight": (S / 4, 1 / 4, 4, 1 / 4),
            },
        ),
    ],
)
def test_the_other_tables_on_mixtral(spec: str, expected: dict[str, tuple[float, float, float, float]]) -> None:
    check(plan("mixtral", MIXTRAL, spec), expected)


def test_mssp_is_the_published_table() -> None:
    """arXiv:2605.14200: width n ×4, experts E, top_k and expert size H with it, gates that are divided by top_k. The
    output's learning rate is 1/n, its epsilon 1; that of all other matrices 1/fan_in, epsilons as there."""
    base = {**MIXTRAL[0], "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
    target = {**MIXTRAL[1], "num_hidden_layers": 2, "num_local_experts": 16, "num_experts_per_tok": 8}
    p = plan("mixtral", (base, {**target, "intermediate_size": 64}), "mssp")
    experts = "model.layers.1.mlp.experts."
    check(
        p,
        {
            "model.embed_tokens.weight": (S, 1, 1 / 4, 1),
            "model.layers.1.mlp.gate.weight": (S / 2, 1 / 4, 1 / 4, 1),
            experts + "gate_up_proj": (S / 2, 1 / 4, 1 / 16, 1),
            experts + "down_proj": (S / 2, 1 / 4, 1 / 16, 1),
            "lm_head.weight": (S / 4, 1 / 4, 1, 1 / 4),
        },
    )
    assert {name for name, rule in p.rules.items() if rule.init.tied} == {
        f"model.layers.{layer}.mlp.experts.{part}" for layer in (0, 1) for part in ("gate_up_proj", "down_proj")
    }


def test_experts_that_start_alike() -> None:
    cls, config = classes("mixtral")[0], tiny_config("mixtral")

    def initialized(spec: str) -> tuple[list[torch.Tensor], Any]:
        model = cls(config)
        p = moe_param.apply(model, config, spec=spec, seed=3)
        return [layer.mlp.experts.down_proj.detach() for layer in model.model.layers], p

    alike, p = initialized("mssp")
    assert all(torch.equal(stack, stack[:1].expand_as(stack)) for stack in alike)
    assert not torch.equal(alike[0], alike[1]) and alike[0][0].std() > 0
    assert moe_param.Parameterization.from_dict(p.to_dict()).rules == p.rules
    apart, _ = initialized("moe-completep")
    assert not any(torch.equal(stack[0], stack[1]) for stack in apart)
    torch.testing.assert_close(apart[0][0], alike[0][0])  # the first expert is the same one


@pytest.mark.parametrize("family", list(OWN_EXPERTS)[:1])
def test_experts_that_cannot_start_alike(family: str) -> None:
    cls, config = classes(family)[0], tiny_config(family)
    with pytest.raises(moe_param.ParameterizationError, match=r"is no stack of them .* leave 'tied' out of the row"):
        moe_param.plan(cls, config, config, spec="mssp")


def test_experts_that_the_model_draws_itself_cannot_start_alike() -> None:
    structure = read_structure(classes("mixtral")[0], tiny_config("mixtral"))
    name = "model.layers.0.mlp.experts.down_proj"
    own = replace(structure.parameters[name], law=InitLaw("special"))
    structure = replace(structure, parameters={**structure.parameters, name: own})
    assert derive_rules(ScalingSpec.load("moe-completep"), structure, structure, None, {})
    with pytest.raises(moe_param.ParameterizationError, match="initialized by the model's own code"):
        derive_rules(ScalingSpec.load("mssp"), structure, structure, None, {})


def test_what_a_model_multiplies_itself_is_no_gap() -> None:
    """Branches that no parameter can scale cannot be made deeper, but for those that have their 1/L already."""
    cls = classes("mixtral")[0]
    configs = [tiny_config("mixtral", num_hidden_layers=depth) for depth in (2, 4)]
    base, target = (replace(read_structure(cls, config), gaps={"residual_branch": "why"}) for config in configs)
    spec = ScalingSpec.load("moe-completep")
    with pytest.raises(moe_param.ParameterizationError, match="no parameter to fold that into: why"):
        derive_rules(spec, base, target, None, {})
    own = {"residual_branch": {"depth": -1.0}}
    parameters = {name: replace(info, own_multipliers=own) for name, info in target.parameters.items()}
    assert derive_rules(spec, base, replace(target, parameters=parameters), None, {})


def test_standard_is_what_transformers_does() -> None:
    p = plan("mixtral", MIXTRAL, "standard")
    assert {(r.lr, r.eps, r.multiplier) for r in p.rules.values()} == {(1.0, 1.0, 1.0)}
    assert {r.init_std for r in p.rules.values()} == {S, None}


def test_kakao_has_no_rule_for_depth() -> None:
    with pytest.raises(moe_param.ParameterizationError, match="does not scale depth"):
        plan("mixtral", MIXTRAL, "kakao")
    same_depth = (MIXTRAL[0], {**MIXTRAL[1], "num_hidden_layers": 2})
    layer = "model.layers.1."
    check(
        plan("mixtral", same_depth, "kakao"),
        {
            layer + "mlp.experts.gate_up_proj": (S / 2, 1 / 4, 1, 1),
            layer + "mlp.experts.down_proj": (S / 5**0.5, 1, 1, 1),
            "lm_head.weight": (S, 1, 1, 1),
        },
    )


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    values = table(name="mine")
    values["roles"]["router"]["init_std"] = {"width": -0.5}  # γ = 1/2
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    check(plan("mixtral", MIXTRAL, str(path)), {L0 + "mlp.gate.weight": (S / 2, 1 / 4, 1 / 6, 1)})


def test_a_finer_role_takes_the_row_of_the_coarser_one_unless_a_table_gives_it_its_own() -> None:
    """Values are attention_in where a table knows no better: also in a table that extends one."""
    own = {"lr": {"width": -0.5}, "source": "γ = 1/2"}
    coarse = ScalingSpec.load({"name": "m", "source": "s", "extends": "mup", "roles": {"attention_in": own}})
    assert coarse.roles["attention_value"] == coarse.roles["attention_in"] != ScalingSpec.load("mup").roles["router"]
    fine = ScalingSpec.load({"name": "m", "source": "s", "extends": "mup", "roles": {"attention_value": own}})
    assert fine.roles["attention_value"].lr == {"width": -0.5} != fine.roles["attention_in"].lr
    assert ScalingSpec.from_dict(fine.to_dict()).roles == fine.roles
