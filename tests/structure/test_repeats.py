"""Deep models: what is copied for layers that were not run is what running them tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import recipes
from moe_param import StructureError, scale_config
from moe_param.structure import trace as tracing
from moe_param.structure.repeats import RUN, Repeats
from moe_param.tuned import read_tuned
from tests.models import DENSE, FAMILIES, classes, families, tiny_config
from tests.own_models import ListBlock, ListConfig, ListLM

PUBLISHED = {path.stem: path for path in sorted((Path(recipes.__file__).parent / "configs/published").glob("*.yaml"))}
OWN = ListConfig(hidden_size=24, num_attention_heads=2, head_dim=12, num_hidden_layers=14, num_experts=4)
PATTERNED = {"mixtral", "gpt_oss", "jamba", "nemotron_h", "deepseek_v3", "llama4", "gemma3_text"}
STILL = {"inkling2", "inkling2_loop", "longcat_flash", "muse_spark", "qwen4_exp"}
"""Their depth cannot be scaled."""


def both(model_class: type[Any], config: Any, run: int = RUN) -> tuple[Repeats, Any, Any]:
    """(what was stood in for, the trace with it, that of all layers)."""
    repeats = Repeats(run)
    _, short = tracing._traced(model_class, config, repeats)
    return repeats, short, tracing._traced(model_class, config, Repeats(None))[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", families(PUBLISHED, {"dbrx", "deepseek-v3", "gpt-oss-120b", "llama-4-maverick"}))
def test_published_models(name: str) -> None:
    config = read_tuned(PUBLISHED[name]).target
    if config.model_type == "dbrx" and "dbrx" not in FAMILIES:
        pytest.skip(f"dbrx of transformers {transformers.__version__} does not run by itself")
    repeats, short, full = both(tracing.model_class_for(config), config)
    assert short == full
    assert len(repeats.stood_in) >= config.get_text_config().num_hidden_layers - 40
    assert repeats.stood_in.keys() == repeats.like.keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", families(sorted((set(FAMILIES) - STILL - {"own_stacked"}) | set(DENSE)), PATTERNED))
def test_families_that_are_four_times_as_deep(family: str) -> None:
    """With fewer layers run than in earnest, so that kinds of layers that come less often are stood in for, too."""
    model_class, _ = classes(family)
    config = tiny_config(family)
    depth = 4 * config.get_text_config().num_hidden_layers
    config = scale_config(config, depth=depth, model_class=model_class)
    repeats = Repeats(2)
    try:
        _, short = tracing._traced(model_class, config, repeats)
    except StructureError as error:
        assert repeats.like and "not seen to do the same" in str(error)
        return
    assert short == tracing._traced(model_class, config, Repeats(None))[1]


def test_what_is_stood_in_for() -> None:
    repeats, short, full = both(ListLM, OWN)
    assert short == full
    assert repeats.stood_in == dict.fromkeys(range(RUN, 13), RUN - 1)
    assert not both(ListLM, tiny_config("own_list"))[0].like  # four layers


def test_a_model_is_as_it_was_afterwards() -> None:
    model, _ = tracing._traced(ListLM, OWN, Repeats(RUN))
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- layers that are not what they look like -------------------------------------------------------------------------
class SkipsAttention(ListBlock):
    """Every fourth layer has no attention, and only the forward pass says so."""

    number = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.number % 4 == 3:
            return x + self.moe(self.ln2(x))
        return super().forward(x)


class SkippingLM(ListLM):
    def __init__(self, config: ListConfig) -> None:
        super().__init__(config)
        for number, block in enumerate(self.blocks):
            block.__class__ = SkipsAttention
            block.number = number


class WiderLM(ListLM):
    """The tenth layer is of another size."""

    def __init__(self, config: ListConfig) -> None:
        super().__init__(config)
        self.blocks[9].attn = type(self.blocks[9].attn)(config.hidden_size, 2 * config.num_attention_heads, 12)


def test_layers_that_do_otherwise_by_their_number_make_the_whole_model_run() -> None:
    with pytest.raises(StructureError, match="are alike, and were not seen to do the same"):
        tracing._traced(SkippingLM, OWN, Repeats(RUN))
    tracing._recent.clear()
    trace = tracing.shared_trace(SkippingLM, OWN)[1]
    assert {a.layer for a in trace.attentions} == set(range(14)) - {3, 7, 11}
    assert trace == tracing._traced(SkippingLM, OWN, Repeats(None))[1]
    # The control: where those that are run happen to do the same, the others are taken for what they are not.
    assert tracing._traced(SkippingLM, OWN, Repeats(1))[1] != trace


def test_a_layer_of_another_size_is_run() -> None:
    repeats, short, full = both(WiderLM, OWN)
    assert short == full
    assert 9 not in repeats.like and repeats.like.keys() == {8, 10, 11, 12}


def test_an_error_is_that_of_the_model() -> None:
    class Breaks(ListLM):
        def forward(self, input_ids: Tensor, labels: Any = None, **ignored: Any) -> Any:
            super().forward(input_ids, labels)
            return torch.ones(2) @ torch.ones(3)

    with pytest.raises(StructureError, match="Breaks could not be run"):
        tracing._trace_model(Breaks, OWN)
