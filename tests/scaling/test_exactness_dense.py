"""Folded training of dense models equals training with explicit multipliers in the forward pass, on unfolded weights.

Initialization, rates, ε and multipliers are those of `tests/reference/by_hand_dense.py`; here is only where the
multipliers stand, by name."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch

import moe_param
from tests.models import KeepDouble, classes, tokens
from tests.reference.by_hand_dense import D_OLMOE, DENSE_CASES, D, L, N
from tests.reference.test_by_hand import line_of

LR, EPS, DECAY, STEPS = 3e-3, 1e-3, 0.1, 5

# family: {the weights a multiplier is folded into: the multiplier}, {the modules whose output takes it: the same}, and
# the factor on attention logits (in `scaling`, on top of the model's own).
PLACES: dict[str, tuple[dict[str, float], dict[str, float], float]] = {
    "llama": (
        {r".*\.(o_proj|down_proj)\.weight": 1 / L, r".*\.q_proj\.weight": D**-0.5, r"lm_head\.weight": 1 / N},
        {r".*\.(self_attn|mlp)": 1 / L, "lm_head": 1 / N},
        D**-0.5,
    ),
    "olmo2": (
        {
            **{r".*\.post_(attention|feedforward)_layernorm\.weight": 1 / L},
            **{r".*\.q_norm\.weight": D_OLMOE**-0.5, r"lm_head\.weight": 1 / N},
        },
        {r".*\.post_(attention|feedforward)_layernorm": 1 / L, "lm_head": 1 / N},
        D_OLMOE**-0.5,
    ),
    "gpt2": (
        {r".*\.c_proj\.(weight|bias)": 1 / L, r".*\.ln_f\.(weight|bias)": 1 / N},
        {r"transformer\.h\.\d+\.(attn|mlp)": 1 / L, "lm_head": 1 / N},
        1.0,
    ),
    "gpt_neox": (
        {r".*\.(dense|dense_4h_to_h)\.(weight|bias)": 1 / L, r"(lm_head|embed_out)\.weight": 1 / N},
        {r".*\.layers\.\d+\.(attention|mlp)": 1 / L, "lm_head|embed_out": 1 / N},
        1.0,
    ),
}


def factor(places: dict[str, float], name: str) -> float:
    return next((value for pattern, value in places.items() if re.fullmatch(pattern, name)), 1.0)


def add_multipliers(model: Any, places: dict[str, float], on_scores: float) -> None:
    def times(value: float) -> Any:
        def hook(module: Any, args: Any, out: Any) -> Any:
            return (out[0] * value, *out[1:]) if isinstance(out, tuple) else out * value

        return hook

    for name, module in model.named_modules():
        if (value := factor(places, name)) != 1.0:
            module.register_forward_hook(times(value))
        if on_scores != 1.0 and isinstance(getattr(module, "scaling", None), float):
            module.scaling *= on_scores


def train(model: Any, groups: list[dict[str, Any]]) -> list[float]:
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = []
    with KeepDouble():
        for step in range(STEPS):
            batch = tokens(100, batch=2, length=12, seed=step % 2)
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("family", "spec"), [*((family, "moe-completep") for family in PLACES), ("llama", "mup"), ("gpt2", "standard")]
)
def test_folded_training_equals_explicit_multipliers(family: str, spec: str) -> None:
    case, (weights, outputs, on_scores) = DENSE_CASES[family], PLACES[family]
    model_class, config_class = classes(family)
    folded = model_class(config_class(**case.target)).double().eval()
    plan = moe_param.apply(folded, config_class(**case.base), seed=1, spec=spec)
    with torch.no_grad():  # leave the special points 0 and 1, where a wrong factor could hide
        for name, p in sorted(folded.named_parameters()):
            if p.dim() < 2:
                noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
                p.add_(0.1 * p.abs().mean().clamp(min=0.01) * noise)
    twin = copy.deepcopy(folded)
    groups = []
    with torch.no_grad():
        for name, p in twin.named_parameters():
            line, m = line_of(case, name)[1], factor(weights, name)
            p.div_(m)
            rate = LR * line.lr / m
            decay = DECAY * LR / rate if line.decay else 0.0
            groups.append({"params": [p], "lr": rate, "eps": EPS * line.eps * m, "weight_decay": decay})
    add_multipliers(twin, outputs, on_scores)
    ours = train(folded, plan.param_groups(folded, lr=LR, eps=EPS, weight_decay=DECAY))
    theirs = train(twin, groups)
    if spec != "moe-completep":
        assert ours != pytest.approx(theirs, rel=1e-6)
        return
    assert ours[0] - ours[-1] > 0.05, "the run must go somewhere for the comparison to mean anything"
    assert ours == pytest.approx(theirs, rel=1e-9)
