"""How rules are written as plain JSON values, and held against the model they are read back for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_param.optim.groups import check_adapters
from moe_param.scaling.rules import ParameterizationError, Rule
from moe_param.structure.laws import InitLaw
from moe_param.structure.matrices import Matrices
from moe_param.structure.shape import ShapeError

FORMAT = 1
"""Version of what `Parameterization.to_dict` writes."""


def check_plain(model: Any) -> None:
    """Refuses what is not a transformers model with parameters of its own and nobody else's.

    Raises:
        ParameterizationError: quantized, with adapters, or wrapped (PEFT, torch.compile, DDP).
    """
    name = type(model).__name__
    if isinstance(model, torch.nn.Module):
        check_adapters(model, ParameterizationError)
    if not isinstance(model, PreTrainedModel):
        inside = next(
            (n for n in ("_orig_mod", "module") if isinstance(getattr(model, n, None), PreTrainedModel)), None
        )
        hint = (
            f"pass the model inside (model.{inside}), before or after wrapping" if inside else "pass the model itself"
        )
        raise ParameterizationError(f"expected a transformers PreTrainedModel, got {name}: {hint}")
    compiled = next((n for n, _ in model.named_modules() if n.endswith("._orig_mod")), None)
    if compiled is not None:
        raise ParameterizationError(
            f"{name} has a part that torch.compile wrapped ({compiled.removesuffix('._orig_mod')}), which renames its "
            "parameters: compile parts in place (part.compile()), or the whole model after apply"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        raise ParameterizationError(
            f"{name} is quantized ({type(quantizer).__name__}): parameterize the model it was made from"
        )


def with_vocabulary(rules: Mapping[str, Rule], model: PreTrainedModel) -> dict[str, Rule]:
    """The rules, with the rows that embedding and unembedding have in `model`: no factor depends on the vocabulary.

    Warns where they are not the recorded ones (`resize_token_embeddings`).
    """
    tables = [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    members = {id(p) for table in tables for p in table.parameters()}
    resized = {
        name: replace(rules[name], shape=tuple(p.shape))
        for name, p in model.named_parameters()
        if id(p) in members and name in rules and rules[name].shape[1:] == tuple(p.shape[1:])
    }
    changed = [name for name, rule in resized.items() if rule.shape != rules[name].shape]
    if changed:
        name = changed[0]
        warnings.warn(
            f"the vocabulary was resized since the rules were recorded ({name}: {rules[name].shape[0]} rows, now "
            f"{resized[name].shape[0]}): the same rules hold for all of them",
            stacklevel=4,
        )
    return {**rules, **resized}


def check_shapes(expected: Mapping[str, tuple[int, ...]], model: PreTrainedModel, source: str) -> None:
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
    if rule.matrices is not None:
        values["matrices"]["parts"] = list(rule.matrices.parts)
    values["muon"] = None if rule.muon is None else list(rule.muon)
    return values


def decode(entry: Mapping[str, Any]) -> Rule:
    values = {k: v for k, v in entry.items() if k not in ("parameter", "layers")}
    values["shape"], values["folded"] = tuple(values["shape"]), tuple(values["folded"])
    values["init"] = InitLaw(**values["init"])
    if values.get("matrices") is not None:
        values["matrices"] = Matrices(**{**values["matrices"], "parts": tuple(values["matrices"]["parts"])})
    if values.get("muon") is not None:
        values["muon"] = tuple(values["muon"])
    return Rule(**values)


def spans(layers: list[int]) -> list[list[int]]:
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return spans
