"""`Shape` and `scale_config` against config attributes and real tensors, family by family."""

from __future__ import annotations

import copy
import re
from fractions import Fraction
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from moe_param import Shape, ShapeError, scale_config
from moe_param.structure.dispatch import find_layers, is_experts
from tests.models import CORE, build, classes, tiny_config, tokens

# What a family calls its sizes, from its configuration file: experts, top_k, expert size, then what scales with width
# besides hidden_size and the two head counts, what scales with expert size besides itself, and the head dimension.
MLA = {"q_lora_rank", "kv_lora_rank"}
FINE = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", {"intermediate_size"}, set())
COARSE = ("num_local_experts", "num_experts_per_tok", "intermediate_size", set(), set())
NAMES: dict[str, tuple[str, str, str, set[str], set[str]]] = {
    "mixtral": COARSE,
    "qwen2_moe": (
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        *({"intermediate_size"}, {"shared_expert_intermediate_size"}),
    ),
    "qwen3_moe": ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size", {"intermediate_size"}, set()),
    "olmoe": ("num_experts", "num_experts_per_tok", "intermediate_size", set(), set()),
    "flex_olmo": ("num_experts", "num_experts_per_tok", "intermediate_size", set(), set()),
    "deepseek_v2": (*FINE[:3], {"intermediate_size", *MLA}, set()),
    "deepseek_v3": (*FINE[:3], {"intermediate_size", *MLA}, set()),
    "glm4_moe": FINE,
    "dots1": FINE,
    "ernie4_5_moe": ("moe_num_experts", "moe_k", "moe_intermediate_size", {"intermediate_size"}, set()),
    "gpt_oss": COARSE,
    "granitemoe": COARSE,
    "minimax_m2": COARSE,
    "hunyuan_v1_moe": ("num_experts", "moe_topk", "intermediate_size", set(), set()),
    "nemotron_h": (*FINE[:3], {"intermediate_size", "mamba_num_heads"}, {"moe_shared_expert_intermediate_size"}),
    "jamba": ("num_experts", "num_experts_per_tok", "intermediate_size", {"mamba_dt_rank"}, set()),
}


def head_dim(config: Any) -> int:
    if hasattr(config, "qk_nope_head_dim"):
        return int(config.qk_nope_head_dim + config.qk_rope_head_dim)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def depth(config: Any) -> int:
    return len(config.layers_block_type) if config.model_type == "nemotron_h" else int(config.num_hidden_layers)


def by_hand(config: Any, family: str) -> Shape:
    experts, top_k, size, _, _ = NAMES[family]
    return Shape(
        width=config.hidden_size,
        depth=depth(config),
        num_experts=getattr(config, experts),
        top_k=getattr(config, top_k),
        expert_size=getattr(config, size),
        head_dim=head_dim(config),
    )


def plain(config: Any) -> dict[str, Any]:
    return copy.deepcopy({k: v for k, v in config.to_dict().items() if k != "transformers_version"})


# -- reading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", CORE)
def test_the_shape_of_a_config(family: str) -> None:
    experts, top_k, size, _, _ = NAMES[family]
    config = tiny_config(family)
    assert Shape.from_config(config) == by_hand(config, family)
    odd = tiny_config(family, hidden_size=96, **{experts: 12, top_k: 3, size: 56})
    assert Shape.from_config(odd) == by_hand(odd, family) != by_hand(config, family)


def test_impossible_shapes() -> None:
    sizes = {"width": 64, "depth": 2, "num_experts": 8, "top_k": 2, "expert_size": 32}
    assert Shape(**sizes).sparsity == Fraction(1, 4)
    for name, value in (
        *(("width", 0), ("depth", -1), ("num_experts", 2.5), ("expert_size", 32.0), ("top_k", True)),
        *(("width", "64"), ("width", None), ("head_dim", 0)),
    ):
        with pytest.raises(ShapeError, match=name):
            Shape(**{**sizes, name: value})  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="top_k = 9 exceeds num_experts = 8"):
        Shape(**{**sizes, "top_k": 9})


def test_shapes_without_experts() -> None:
    config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    shape = Shape.from_config(config)
    assert shape == Shape(width=32, depth=1, head_dim=16)
    assert shape.dense
    assert shape.sparsity is None
    assert shape.axes == ("width", "depth")
    assert shape.sizes == {"width": 32, "depth": 1}
    assert shape.along("width", 4) == Shape(width=128, depth=1, head_dim=16)
    for axis in ("num_experts", "expert_size"):
        with pytest.raises(ShapeError, match=f"axis '{axis}' is of experts, .*: it has width, depth"):
            shape.along(axis, 2)
    with pytest.raises(ShapeError, match=r"unknown axis 'dept' \(did you mean 'depth'"):
        shape.along("dept", 2)
    with pytest.raises(ShapeError, match="size 'top_k' is of experts"):
        scale_config(config, top_k=2)
    with pytest.raises(ShapeError, match="without top_k and expert_size"):
        Shape(width=32, depth=1, num_experts=8)


# -- scaling ---------------------------------------------------------------------------------------------------------
AXES = ("width", "depth", "num_experts", "expert_size")


@pytest.mark.parametrize("family", CORE)
def test_every_axis_doubles_and_halves(family: str) -> None:
    config = tiny_config(family)
    before, shape = plain(config), by_hand(config, family)
    experts, top_k, size, with_width, with_size = NAMES[family]
    heads = {"hidden_size", "num_attention_heads", "num_key_value_heads"}
    expected = {
        "width": heads | with_width,
        "num_experts": {experts, top_k},
        "expert_size": {size} | with_size,
    }
    for axis in AXES:
        scaled = scale_config(config, **{axis: 2 * getattr(shape, axis)})
        assert plain(config) == before
        assert type(scaled) is type(config)
        after = plain(scaled)
        changed = {key for key in before | after if before.get(key) != after.get(key)}
        if axis == "depth":
            assert depth(scaled) == 2 * depth(config)
            assert changed <= {"num_hidden_layers", "layer_types", "layers_block_type", "moe_layer_end_index"}
        else:
            assert changed == expected[axis], axis
            assert all(after[key] == 2 * before[key] for key in changed)
        assert head_dim(scaled) == head_dim(config)
        back = scale_config(scaled, **{axis: getattr(shape, axis)})
        assert plain(back) == before, axis


@pytest.mark.parametrize("family", CORE)
def test_a_scaled_config_builds_a_model_with_those_tensors(family: str) -> None:
    config = tiny_config(family)
    shape = by_hand(config, family)
    sizes = {"width": 192, "depth": 2 * shape.depth, "num_experts": 16, "expert_size": 2 * shape.expert_size}
    scaled = scale_config(config, **sizes)
    assert Shape.from_config(scaled) == by_hand(scaled, family)
    model = build(family, scaled).eval()
    small = dict(build(family, config).named_parameters())
    down = next(p for n, p in model.named_parameters() if n.endswith("experts.down_proj"))
    assert down.shape[0] == 16
    assert sorted(down.shape[1:]) == sorted((192, sizes["expert_size"]))
    assert model.get_input_embeddings().weight.shape == (128, 192)  # type: ignore[union-attr]
    assert {".".join(n.split(".")[3:]) for n, _ in model.named_parameters() if ".layers." in n} == {
        ".".join(n.split(".")[3:]) for n in small if ".layers." in n
    }
    seen: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[1].shape[-1]))
    with torch.no_grad():
        assert model(tokens()).logits.isfinite().all()
    assert set(seen) == {4}  # top_k followed the experts


def test_all_axes_at_once_and_top_k_by_hand() -> None:
    config = tiny_config("mixtral")
    scaled = scale_config(config, width=96, depth=6, num_experts=24, top_k=3, expert_size=24)
    assert Shape.from_config(scaled) == Shape(width=96, depth=6, num_experts=24, top_k=3, expert_size=24, head_dim=16)
    assert (scaled.num_attention_heads, scaled.num_key_value_heads) == (6, 3)
    same = scale_config(config)
    assert same is not config
    assert plain(same) == plain(config)


def test_what_a_family_keeps() -> None:
    """Groups of experts keep their number, leading dense layers theirs, heads their size."""
    config = tiny_config("deepseek_v3")
    scaled = scale_config(config, width=128, depth=12, num_experts=32)
    assert (scaled.n_group, scaled.topk_group, scaled.first_k_dense_replace) == (2, 1, 1)
    assert (scaled.qk_nope_head_dim, scaled.qk_rope_head_dim, scaled.v_head_dim) == (16, 8, 20)
    assert scaled.n_shared_experts == 1
    assert scaled.vocab_size == config.vocab_size


@pytest.mark.parametrize(
    "pattern, length, expected",
    [
        ("sfsf", 6, "sfsfsf"),
        ("sfsf", 3, "sfs"),
        ("ssssf" * 2, 12, "ssssfssssfss"),
        ("ffff", 7, "fffffff"),
        ("fsss", 6, "fsssss"),
        ("sssf", 8, "sssfsssf"),
    ],
)
def test_layer_patterns_go_on(pattern: str, length: int, expected: str) -> None:
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    config = tiny_config("gpt_oss", num_hidden_layers=len(pattern), layer_types=[kinds[c] for c in pattern])
    scaled = scale_config(config, depth=length)
    assert scaled.layer_types == [kinds[c] for c in expected]
    assert scaled.num_hidden_layers == length


def test_a_pattern_without_a_period_is_refused() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = tiny_config("gpt_oss", num_hidden_layers=5, layer_types=kinds)
    before = plain(config)
    with pytest.raises(ShapeError, match=r"layer_types.*no period"):
        scale_config(config, depth=7)
    assert plain(config) == before
    assert scale_config(config, depth=10).layer_types == kinds * 2


# -- refusing --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "family, sizes, complaint",
    [
        ("mixtral", {"width": 72}, r"width.*num_attention_heads = 4 into 4\.5"),
        ("mixtral", {"width": 96}, None),  # 6 heads over 3
        ("mixtral", {"width": 0}, r"Shape\.width must be a positive integer"),
        ("mixtral", {"depth": 0}, r"Shape\.depth must be a positive integer"),
        ("mixtral", {"depth": -4}, r"Shape\.depth must be a positive integer"),
        ("mixtral", {"expert_size": 1.5}, r"Shape\.expert_size must be a positive integer"),
        ("mixtral", {"num_experts": 10}, r"top_k"),  # 2.5 experts per token
        ("mixtral", {"num_experts": 4, "top_k": 5}, r"top_k = 5 exceeds num_experts = 4"),
        ("deepseek_v3", {"width": 72}, r"width × 9/8 makes"),
        ("deepseek_v3", {"num_experts": 12}, None),  # two groups of six: possible
        ("deepseek_v3", {"num_experts": 9, "top_k": 2}, r"num_experts = 9 does not divide into n_group = 2"),
        ("qwen2_moe", {"expert_size": 50}, r"shared_expert_intermediate_size = 40 into 41\.6"),
        ("jamba", {"width": 80}, r"num_key_value_heads = 2 into 2\.5"),
    ],
)
def test_what_does_not_divide(family: str, sizes: dict[str, Any], complaint: str | None) -> None:
    config = tiny_config(family)
    before = plain(config)
    if complaint is None:
        scaled = Shape.from_config(scale_config(config, **sizes))
        assert all(getattr(scaled, axis) == size for axis, size in sizes.items())
    else:
        with pytest.raises(ShapeError, match=complaint):
            scale_config(config, **sizes)
    assert plain(config) == before


@pytest.mark.parametrize(
    "family, axis, size, nearest",
    [
        ("mixtral", "width", 72, (64, 96)),  # 4 heads over 2
        ("mixtral", "width", 8, (32,)),  # nothing below
        ("deepseek_v3", "width", 72, (64, 80)),
        ("mixtral", "num_experts", 10, (8, 12)),  # 2 of 8
        ("qwen2_moe", "expert_size", 50, None),
        ("gpt_oss", "width", 100, None),
        ("nemotron_h", "depth", 7, (6, 12)),  # its pattern has no period
    ],
)
def test_the_nearest_sizes_that_divide(family: str, axis: str, size: int, nearest: tuple[int, ...] | None) -> None:
    """What an error names can be built, and nothing between it and what was asked for can."""
    config = tiny_config(family)
    with pytest.raises(ShapeError) as error:
        scale_config(config, **{axis: size})
    found = tuple(int(n) for n in re.findall(r"\d+", str(error.value).split("the nearest that divide")[1]))
    assert nearest is None or found == nearest
    for near in found:
        assert getattr(Shape.from_config(scale_config(config, **{axis: near})), axis) == near
    low = found[0] + 1 if len(found) == 2 else 1
    for between in range(max(low, size - 3), min(found[-1], size + 4)):
        with pytest.raises(ShapeError):
            scale_config(config, **{axis: between})


def test_sizes_of_the_wrong_type() -> None:
    for axis in ("width", "depth", "num_experts", "top_k", "expert_size"):
        with pytest.raises(ShapeError, match=rf"Shape\.{axis} must be a positive integer, got 1\.5"):
            scale_config(tiny_config("mixtral"), **{axis: 1.5})


def test_depth_does_not_turn_moe_layers_into_dense_ones() -> None:
    """ernie4_5_moe records the last MoE layer as a number: it moves with the depth."""
    config = tiny_config("ernie4_5_moe")
    deeper = scale_config(config, depth=16)
    model = build("ernie4_5_moe", deeper)
    assert sum(any(is_experts(m) for m in layer.modules()) for layer in find_layers(model)[1]) == 15
    config.moe_layer_end_index = 2  # an end that is not the last layer: nobody can tell where it should move
    with pytest.raises(ShapeError, match="without experts"):
        scale_config(config, depth=16)


def test_along_moves_what_the_paper_moves() -> None:
    """Its α = expert_size/width and its sparsity are fixed on the axes of width and expert count."""
    base = Shape(width=64, depth=2, num_experts=8, top_k=2, expert_size=32, head_dim=16)
    assert base.along("width", 4) == Shape(width=256, depth=2, num_experts=8, top_k=2, expert_size=128, head_dim=16)
    assert base.along("depth", 1.5) == Shape(width=64, depth=3, num_experts=8, top_k=2, expert_size=32, head_dim=16)
    assert base.along("num_experts", 4).sparsity == base.sparsity
    assert base.along("expert_size", 0.5) == Shape(
        width=64, depth=2, num_experts=8, top_k=2, expert_size=16, head_dim=16
    )
    with pytest.raises(ShapeError, match=r"top_k would be 2\.5"):
        base.along("num_experts", 1.25)
    with pytest.raises(ShapeError, match="width × inf: width would be inf"):
        base.along("width", float("inf"))
    with pytest.raises(ShapeError, match="unknown axis 'top_k'"):
        base.along("top_k", 2)


# -- families whose sizes stand where others do not have them ----------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "sizes", "expected"),
    [
        ("dbrx", {"num_experts": 16}, {"ffn_config": {"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 40}}),
        (
            "dbrx",
            {"width": 144},
            {"n_heads": 12, "attn_config": {"kv_n_heads": 6}},
        ),
        ("llama4", {"depth": 8}, {"moe_layers": [1, 3, 5, 7], "no_rope_layers": [1, 1, 1, 0] * 2}),
        ("llama4", {"expert_size": 80}, {"intermediate_size": 80, "intermediate_size_mlp": 88}),
        ("llama4", {"width": 144}, {"intermediate_size": 40, "intermediate_size_mlp": 176}),
        ("longcat_flash", {"num_experts": 16}, {"zero_expert_num": 8, "moe_topk": 4}),
        ("step3p7", {"width": 144}, {"num_sliding_attention_heads": 18, "share_expert_dim": 56}),
        ("step3p7", {"expert_size": 80}, {"share_expert_dim": 112, "intermediate_size": 88}),
    ],
)
def test_sizes_in_places_of_their_own(family: str, sizes: dict[str, int], expected: dict[str, Any]) -> None:
    model_class, _ = classes(family)
    found = scale_config(tiny_config(family), **sizes, model_class=model_class).to_dict()
    for key, value in expected.items():
        assert (found[key] if not isinstance(value, dict) else {k: found[key][k] for k in value}) == value
    if family == "step3p7":  # heads of single layers, an attribute inside an attribute
        heads = {layer["num_attention_heads"] for layer in found["per_layer_config"].values()}
        assert heads == {found["num_sliding_attention_heads"]}


def test_irregular_layer_numbers_are_not_continued() -> None:
    config = tiny_config("qwen3_moe", num_hidden_layers=5, mlp_only_layers=[0, 3])
    with pytest.raises(ShapeError, match=r"mlp_only_layers = .* has no period"):
        scale_config(config, depth=8)
    assert scale_config(tiny_config("qwen3_moe", mlp_only_layers=[0]), depth=8).mlp_only_layers == [0]
