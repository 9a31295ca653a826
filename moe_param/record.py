"""How rules are written as plain JSON values, and held against the model they are read back for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from moe_param.scaling.rules import ParameterizationError, Rule
from moe_param.structure.laws import InitLaw
from moe_param.structure.shape import ShapeError

FORMAT = 1
"""Version of what `Parameterization.to_dict` writes."""


def check_shapes(expected: Mapping[str, tuple[int, ...]], model: PreTrainedModel, source: str) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        raise ParameterizationError(
            f"{type(model).__name__} is quantized ({type(quantizer).__name__}): parameterize the model it was made from"
        )
    actual = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = [
        f"{n}: {source} {expected[n]}, the model has {actual[n]}"
        for n in actual
        if expected.get(n, actual[n]) != actual[n]
    ]
    wrong += [f"{n}: not in what {source}" for n in actual if n not in expected]
    wrong += [f"{n}: {source} {expected[n]}, the model has no such parameter" for n in expected if n not in actual]
    if wrong:
        listing = "\n  ".join(wrong[:20]) + (f"\n  … and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise ShapeError(f"{type(model).__name__} does not match:\n  {listing}")


def encode(rule: Rule) -> dict[str, Any]:
    values = {k: v for k, v in asdict(rule).items() if k != "init"}
    values["shape"], values["folded"] = list(rule.shape), list(rule.folded)
    values["init"] = {k: v for k, v in asdict(rule.init).items() if v != 0.0}
    return values


def decode(entry: Mapping[str, Any]) -> Rule:
    values = {k: v for k, v in entry.items() if k not in ("parameter", "layers")}
    values["shape"], values["folded"] = tuple(values["shape"]), tuple(values["folded"])
    values["init"] = InitLaw(**values["init"])
    return Rule(**values)


def spans(layers: list[int]) -> list[list[int]]:
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return spans
