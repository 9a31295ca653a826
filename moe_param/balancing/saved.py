"""Injected selection biases read back from saved weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_files, get_checkpoint_shard_files

from moe_param.balancing.routing import find_routes, unwrap
from moe_param.balancing.selection import KEY, BalanceError, named_routers, place, selection_of, spellings

FILE = "selection_biases.safetensors"
"""What `LoadBalancer.save` writes into a folder; until version 0.2 the only place of injected biases."""


def load_selection_biases(model: nn.Module, folder: str | Path | None = None, *, revision: str | None = None) -> None:
    """Gives a model that `from_pretrained` loaded the selection biases it was trained with (`inject=True`).

        model = AutoModelForCausalLM.from_pretrained(folder)
        load_selection_biases(model)

    Args:
        model: a transformers model, wrapped or not.
        folder: where its weights were saved, or an id on the Hub. Default: where the model was loaded from.
        revision: of the repository on the Hub. Default: the one the config was loaded from.

    Raises:
        BalanceError: no biases there, or those of another model. The model is left as it was.
        RoutingError, StructureError: a model whose routers cannot be read.
    """
    inner = unwrap(model)
    source = str(folder or inner.config.name_or_path)
    routes = {route.name: route for route in find_routes(inner, inject=True) if route.gate is not None}
    wanted = named_routers(inner) or list(routes)
    if unknown := [name for name in wanted if name not in routes]:
        raise BalanceError(f"the config names selection biases of {unknown[0]}, which is no router of this model")
    values = read_biases(inner, source, wanted, revision or getattr(inner.config, "_commit_hash", None))
    shapes = {name: (routes[name].num_experts,) for name in wanted}
    if (found := {name: tuple(value.shape) for name, value in values.items()}) != shapes:
        raise BalanceError(f"{source} holds the biases of another model: {found}, expected {shapes}")
    gates = {name: (routes[name].module, routes[name].gate, routes[name].num_experts) for name in wanted}
    place(inner, gates)  # type: ignore[arg-type]
    for name, value in values.items():
        selection = selection_of(routes[name].module)
        assert selection is not None
        selection.bias.copy_(value)


def read_biases(
    model: PreTrainedModel, source: str, names: Collection[str], revision: str | None = None
) -> dict[str, torch.Tensor]:
    """The injected biases by name of the router, from the weights in a folder or on the Hub, or from `FILE`.

    Raises:
        BalanceError: some of them are not there.
    """
    saved: dict[str, torch.Tensor] = {}
    for path in _weights(source, revision):
        with safe_open(path, framework="pt") as file:
            saved |= {key: file.get_tensor(key) for key in file.keys() if key.endswith(KEY)}  # noqa: SIM118
    if not saved and (Path(source) / FILE).is_file():
        saved = {f"{name}.{KEY}": tensor for name, tensor in load_file(Path(source) / FILE).items()}
    values = {}
    for name in names:
        # transformers saves in the layout of the family's published weights, which may have other names.
        original = revert_weight_conversion(model, {f"{name}.{KEY}": torch.empty(0)})
        keys = [key for written in (f"{name}.{KEY}", *original) for key in spellings(model, written)]
        found = next((key for key in keys if key in saved), None)
        if found is None:
            raise BalanceError(
                f"{source} lacks the selection bias of {name}, which a model trained with injected biases needs. "
                "Give a folder that save_pretrained, the Trainer or `LoadBalancer.save` wrote, with its safetensors."
            )
        values[name] = saved[found]
    return values


def _weights(source: str, revision: str | None) -> list[str]:
    """The safetensors files of a model in a folder or on the Hub."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        found = cached_files(
            source,
            [name],
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found:
            if name == SAFE_WEIGHTS_NAME:
                return list(found)
            return list(get_checkpoint_shard_files(source, found[0], revision=revision)[0])
    return []
