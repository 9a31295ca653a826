"""What tests/families_ahead.json says of each family, held against the family itself.

facts: stack (the module list of layers), sizes, experts (pattern of parameters: what their dimensions are, fan_in and
fan_out), router, selection_bias, shared, gates (sum: the chosen sum to a constant; softmax: over all experts, not
normalized over the chosen; sigmoid: neither), how, dispatch (from top k to the experts), odd. In a pattern `*` is a
number and `{expert}` the number of an expert. Nothing here asks moe_param.
"""

from __future__ import annotations

import copy
import math
import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.models import AHEAD, ALL_FAMILIES, build, entry_of, runs, tiny_config, tokens


def present(section: str) -> list[str]:
    """The families of a section that the installed transformers has, and that run in it."""
    names = [name for name, entry in AHEAD[section].items() if _found(ALL_FAMILIES.get(name, entry)["module"])]
    return [name for name in names if runs({**ALL_FAMILIES.get(name, {}), **AHEAD[section][name]})]


def _found(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


NAMES = [name for section in AHEAD for name in present(section)]


def facts_of(family: str) -> dict[str, Any]:
    facts: dict[str, Any] = entry_of(family)["facts"]
    return facts


def matches(pattern: str, name: str) -> bool:
    digits = re.escape(pattern).replace(r"\*", r"\d+").replace(r"\{expert\}", r"\d+")
    return re.fullmatch(digits, name) is not None


def named(model: Any, pattern: str) -> dict[str, torch.Tensor]:
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor for name, tensor in tensors if matches(pattern, name)}


def output(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden state of a text model without a head."""
    given = {"decoder_input_ids": batch} if model.config.is_encoder_decoder else {}
    out = model(input_ids=batch, **given)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("family", NAMES)
def test_it_trains(family: str) -> None:
    model = build(family).train()
    batch, sizes = tokens(100), facts_of(family)["sizes"]
    head = torch.randn(sizes["width"], 128, generator=torch.Generator().manual_seed(1)) / 8
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        logits = output(model, batch)
        logits = logits if logits.shape[-1] == 128 else logits @ head
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] < 1.5 * math.log(128)


@pytest.mark.parametrize("family", NAMES)
def test_the_facts_are_those_of_its_tensors(family: str) -> None:
    facts, model = facts_of(family), build(family)
    sizes = facts["sizes"]
    main = [sizes[s] for s in ("width", "depth", "num_experts", "top_k", "expert_size", "head_dim")] + [128]
    assert len(set(main)) == len(main), "sizes that coincide would hide a mix-up"
    assert len(model.get_submodule(facts["stack"])) == sizes["depth"]
    assert model.get_input_embeddings().weight.shape == (128, sizes["width"])
    dims = {pattern: entry["dims"] for pattern, entry in facts["experts"].items()} | facts["router"]
    for pattern, expected in dims.items():
        found = named(model, pattern)
        assert found, pattern
        for name, tensor in found.items():
            assert tuple(tensor.shape) == tuple(eval(size, {}, sizes) for size in expected), name
    for entry in facts["experts"].values():
        assert {entry["fan_in"], entry["fan_out"]} <= set(sizes)
    for pattern in [*facts["shared"], *([facts["selection_bias"]] if facts["selection_bias"] else [])]:
        assert named(model, pattern), pattern
    routers = [name for pattern in facts["router"] for name in named(model, pattern)]
    biases = named(model, facts["selection_bias"] or "none")
    assert len(biases) in (0, len(routers))


@pytest.mark.parametrize("family", NAMES)
def test_gates_are_normalized_as_said(family: str) -> None:
    """With all experts of a layer alike, what it puts out is Σ gates times one expert's output: it does not depend on
    the router where, and only where, the gates of the chosen sum to a constant."""
    facts, model = facts_of(family), build(family).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for pattern, entry in facts["experts"].items():
            alike: dict[str, torch.Tensor] = {}
            for name, tensor in named(model, pattern).items():
                if "{expert}" in pattern:
                    layer = re.sub(r"(expert_|experts\.)\d+", "", name)
                    one = alike.setdefault(layer, 0.3 * torch.randn(tensor.shape, generator=generator))
                    tensor.copy_(one)
                else:
                    stack = tensor.view(eval(entry["dims"][0].replace("* expert_size", ""), {}, facts["sizes"]), -1)
                    stack.copy_(0.3 * torch.randn(stack.shape[1:], generator=generator).expand_as(stack))
        batch = tokens(100, 2, 12)
        before = output(model, batch)
        other = copy.deepcopy(model)
        for pattern in facts["router"]:
            for tensor in named(other, pattern).values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        change = (output(other, batch) - before).abs().max() / before.abs().max()
    if facts["gates"] == "sum":
        assert change < 1e-4
    else:
        assert change > 1e-2


def test_sections_do_not_overlap_with_known_families() -> None:
    names = [name for entries in AHEAD.values() for name in entries]
    assert len(names) == len(set(names))
    for name in set(NAMES):
        assert tiny_config(name).to_dict()
