"""Models with other towers beside the text: vision, audio and what projects them into the text."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

import moe_param
from moe_param import Parameterization, ParameterizationError, RoleError, scale_config
from moe_param.optim.clipping import clip_grad_norm_
from moe_param.structure.roles import LEFT_ALONE, read_structure
from moe_param.structure.scaling_config import _TOWER_OUT
from moe_param.structure.trace import model_class_for
from tests.models import DENSE, FAMILIES, entry_of

IMAGE = 3
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
GLM_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "out_hidden_size": 64,
}
LLAMA_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vision_output_dim": 40,
    "projector_input_dim": 40,
    "projector_output_dim": 40,
    "image_size": 16,
    "patch_size": 4,
}
TINY: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "qwen3_vl_moe": (
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "vision_config": QWEN_VISION,
            "image_token_id": IMAGE,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "vision_end_token_id": 6,
        },
    ),
    "glm4v_moe": (
        "glm4v_moe",
        "Glm4vMoeForConditionalGeneration",
        "Glm4vMoeConfig",
        {
            "vision_config": GLM_VISION,
            "image_token_id": IMAGE,
            "video_token_id": 4,
            "image_start_token_id": 5,
            "image_end_token_id": 6,
            "video_start_token_id": 7,
            "video_end_token_id": 8,
        },
    ),
    "llama4": (
        "llama4",
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {"vision_config": LLAMA_VISION, "image_token_index": IMAGE},
    ),
}
"""family -> (of its text, class, config class, what its config has beside the text)."""


def config_of(family: str) -> PretrainedConfig:
    """Skips the test where the installed transformers has no such model, or one whose own forward pass fails, as 5.24
    for llama4."""
    text = TINY[family][0]
    if text not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has another {text}, or none")
    if broken(family):
        pytest.skip(f"{TINY[family][1]} of transformers {transformers.__version__}: {broken(family)}")
    return _config(family)


@functools.cache
def broken(family: str) -> str | None:
    """What the model itself, without any of ours, says to a batch."""
    try:
        getattr(transformers, TINY[family][1])(_config(family))(**batch(family))
    except AttributeError as error:
        return str(error)
    return None


def _config(family: str) -> PretrainedConfig:
    text, _, config_class, rest = TINY[family]
    divides = {"llama4": {"intermediate_size_mlp": 96}}.get(text, {})  # at a third of the width, too
    return getattr(transformers, config_class)(text_config={**entry_of(text)["tiny_config"], **divides}, **rest)


def build(family: str, config: PretrainedConfig | None = None) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, TINY[family][1])(config or config_of(family))


def narrow(config: PretrainedConfig) -> PretrainedConfig:
    """A base with a smaller text part."""
    sizes = {"llama4": {"width": 24}}.get(config.model_type, {"width": 32, "depth": 2})
    return scale_config(config, **sizes, model_class=class_of(config))


def class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    return next(getattr(transformers, c) for _, c, of, _ in TINY.values() if of == type(config).__name__)


def batch(family: str) -> dict[str, torch.Tensor]:
    """16 tokens, four of which an image takes the place of."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 100, (1, 16), generator=generator)
    ids[0, 4:8] = IMAGE
    inputs = {"input_ids": ids, "labels": ids}
    if family == "llama4":
        return inputs | {"pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}
    ids[0, 3], ids[0, 8] = 5, 6
    return inputs | {
        "pixel_values": torch.randn(16, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def towers(model: PreTrainedModel) -> set[str]:
    """By name, not by what moe_param says."""
    return {n for n, _ in model.named_parameters() if "visual" in n or "vision" in n or "projector" in n}


# -- only="text" -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", TINY)
def test_other_towers_stay_as_they_are(family: str) -> None:
    model = build(family)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:  # pretrained: nothing is as it was built
        if "vis" in name or "projector" in name:
            tensor.data = torch.rand_like(tensor) if tensor.is_floating_point() else tensor
            tensor._is_hf_initialized = True
    before = {name: tensor.detach().clone() for name, tensor in tensors}
    rules = moe_param.apply(model, narrow(model.config), seed=1, only="text").rules
    alone = {name for name, rule in rules.items() if rule.role == LEFT_ALONE}
    assert alone == towers(model) != set()
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(torch.equal(after[n], before[n]) for n in before if "vis" in n or "projector" in n)
    assert not torch.equal(after[layer_weight(model)], before[layer_weight(model)])


def layer_weight(model: PreTrainedModel) -> str:
    return next(
        n for n, _ in model.named_parameters() if n.endswith("layers.1.self_attn.q_proj.weight") and "vis" not in n
    )


@pytest.mark.parametrize("family", TINY)
def test_the_text_has_the_rules_it_has_alone(family: str) -> None:
    """Those of its own class, from the same base; and a base of the text alone is as good."""
    config = config_of(family)
    text = config.get_text_config()
    base = narrow(config)
    whole = moe_param.plan(class_of(config), config, base, only="text")
    alone = moe_param.plan(model_class_for(text), text, base.get_text_config())
    prefix = {"llama4": "language_model."}.get(family, "model.language_model.")
    layers = {f"{prefix}{name}": rule for name, rule in alone.rules.items() if "layers." in name}
    assert layers and layers.items() <= whole.rules.items()
    assert whole.shape == alone.shape
    assert moe_param.plan(class_of(config), config, base.get_text_config(), only="text").rules == whole.rules
    assert moe_param.plan(class_of(config), config, whole.base_shape, only="text").rules == whole.rules


@pytest.mark.parametrize("family", TINY)
def test_a_step_with_pixels_and_a_checkpoint(family: str, tmp_path: Path) -> None:
    model = build(family)
    parameterization = moe_param.apply(model, narrow(model.config), seed=1, only="text")
    optimizer = parameterization.optimizer(model, lr=1e-2, eps=1e-8, weight_decay=0.1)
    rates = {name: group for group in optimizer.param_groups for name in group["names"]}
    for name in towers(model):
        assert (rates[name]["lr"], rates[name]["eps"]) == (1e-2, 1e-8)
        assert rates[name]["weight_decay"] == (0.1 if rates[name] and model.get_parameter(name).dim() > 1 else 0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**batch(family)).loss
        loss.backward()
        norm = clip_grad_norm_(parameterization, model, 1e3)
        assert norm.isfinite()
        assert norm >= torch.linalg.vector_norm(model.get_parameter(sorted(towers(model))[-1]).grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved & towers(model)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert Parameterization.from_model(again).rules == parameterization.rules
    assert torch.equal(again(**batch(family)).logits, model(**batch(family)).logits)
    fresh = build(family, again.config)
    with pytest.raises(ParameterizationError, match="weights that transformers has just built"):
        Parameterization.from_model(fresh)


def test_the_table_says_so() -> None:
    config = config_of("llama4")
    table = str(moe_param.plan(class_of(config), config, narrow(config), only="text"))
    line = next(line for line in table.splitlines() if "multi_modal_projector" in line)
    assert line.split()[0] == LEFT_ALONE and "as it is" in line


def test_frozen_towers_are_no_part_of_the_optimizer() -> None:
    model = build("llama4")
    model.vision_model.requires_grad_(False)
    optimizer = moe_param.apply(model, narrow(model.config), only="text").optimizer(model, lr=1e-2)
    names = {name for group in optimizer.param_groups for name in group["names"]}
    assert names & towers(model) == {"multi_modal_projector.linear_1.weight"}


# -- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", TINY)
def test_without_it_towers_are_an_error_that_names_it(family: str) -> None:
    model = build(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RoleError, match=r"(?s)cannot be told:.*vis.*only=\"text\""):
        moe_param.apply(model, narrow(model.config))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert getattr(model.config, "moe_param", None) is None


def test_only_is_checked() -> None:
    config = config_of("llama4")
    with pytest.raises(RoleError, match=r"'vision'.*text"):
        moe_param.plan(class_of(config), config, narrow(config), only="vision")
    text = config.get_text_config()
    with pytest.raises(RoleError, match="no parts beside the text, so leave it out"):
        moe_param.plan(transformers.Llama4ForCausalLM, text, text, only="text")


# -- every family ----------------------------------------------------------------------------------------------------
def composite_families() -> dict[str, type[Any]]:
    found = {}
    for name in (*FAMILIES, *DENSE):
        entry = entry_of(name)
        module = importlib.import_module(entry["module"])
        for class_name in dir(module):
            model_class = getattr(module, class_name)
            config_class = getattr(model_class, "config_class", None)
            own = getattr(model_class, "__module__", "") == module.__name__
            if own and class_name.endswith("ForConditionalGeneration") and "text_config" in config_class.sub_configs:
                found[name] = model_class
    return found


@pytest.mark.parametrize("family", sorted(composite_families()))
def test_every_family_with_towers_can_be_planned(family: str) -> None:
    """Towers of their default size, on fake tensors: all that text does not reach is left alone, and nothing else."""
    model_class = composite_families()[family]
    if family in TINY and broken(family):
        pytest.skip(f"{model_class.__name__} of transformers {transformers.__version__}: {broken(family)}")
    tiny = dict(entry_of(family)["tiny_config"])
    towers: dict[str, dict[str, Any]] = {n: {} for n in model_class.config_class.sub_configs if n != "text_config"}
    try:
        config = model_class.config_class(text_config=tiny, **towers)
    except Exception:  # what they hand to the text is checked against its width
        for name, tower in towers.items():
            default = getattr(model_class.config_class(), name)
            tower |= {key: tiny["hidden_size"] for key in vars(default) if re.fullmatch(_TOWER_OUT, key)}
            tower |= {"model_type": default.model_type}
        config = model_class.config_class(text_config=tiny, **towers)
    structure = read_structure(model_class, config, "text")
    alone = {name for name, info in structure.parameters.items() if info.role == LEFT_ALONE}
    text = {name for name in structure.parameters if name not in alone}
    parts = {name.partition("layers.")[0].partition("blocks.")[0] for name in text}
    assert alone and not any(part in name for name in parts for part in ("vis", "audio", "projector", "resampler"))
    assert not any("language_model" in name for name in alone)
