"""Layers of a deep model that do what earlier ones did: they are not run again, what was seen of those is copied.

Layers are of one kind when their modules are the same: classes, sizes and attributes, their number aside. Of each kind
the first few and the last are run. Where these all left the same behind, those between are taken to leave it, too;
where they did not (what a layer does may depend on its number in ways its modules do not show), all layers are run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_param.structure.observations import StructureError, Trace

RUN = 8
"""So many of a kind are run before others are stood in for: what comes every few layers shows among them."""


def alike(layers: list[nn.Module]) -> list[list[int]]:
    """The layers of each kind."""
    kinds: dict[Any, list[int]] = defaultdict(list)
    for index, kind in enumerate(_kinds(layers)):
        kinds[kind].append(index)
    return list(kinds.values())


def _kinds(layers: list[nn.Module]) -> list[Any]:
    """What each layer is made of, as values that compare."""
    seen = [_parts(layer) for layer in layers]
    numbers = {  # attributes that count the layers
        key
        for key in set().union(*seen)
        if len({value - i if type(value := parts.get(key)) is int else None for i, parts in enumerate(seen)}) == 1
        and type(seen[0].get(key)) is int
    }
    return [frozenset((key, repr(value)) for key, value in parts.items() if key not in numbers) for parts in seen]


def _parts(layer: nn.Module) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for name, module in layer.named_modules():
        found[name, ""] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, tuple, list, type(None))) and not key.startswith("_"):
                found[name, key] = value
            elif callable(value):
                found[name, key] = getattr(value, "__qualname__", type(value))
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            found[name, key] = None if tensor is None else tuple(tensor.shape)
    return found


class Repeats:
    """While this is entered, layers that need not be run return what the layer they are like returned.

    run: so many of a kind are, and the last; None for all.
    """

    def __init__(self, run: int | None) -> None:
        self.run = run
        self.layers: list[nn.Module] = []
        self.like: dict[int, int] = {}
        self.returned: dict[int, Any] = {}
        self.stood_in: dict[int, int] = {}
        self.handles: list[RemovableHandle] = []

    def among(self, layers: list[nn.Module]) -> Repeats:
        """For the layers of a model, which is about to be run."""
        self.layers = layers
        if self.run is not None:
            sources = ((kind[self.run - 1], index) for kind in alike(layers) for index in kind[self.run : -1])
            self.like = {index: source for source, index in sources if "forward" not in vars(layers[index])}
        return self

    def __enter__(self) -> None:
        for source in set(self.like.values()):
            self.handles.append(self.layers[source].register_forward_hook(self._keep(source)))
        for index, source in self.like.items():
            self.layers[index].forward = self._instead(index, source)

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()
        for index in self.like:
            del self.layers[index].forward

    def _keep(self, source: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, out: Any) -> None:
            self.returned[source] = out

        return keep

    def _instead(self, index: int, source: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.stood_in[index] = source
            return self.returned[source]

        return forward

    def complete(self, stack: str, trace: Trace, sent: list[Any]) -> list[Any]:
        """Adds what was not run to the trace; returns the calls of experts, those that were not made among them.

        Raises:
            StructureError: layers of one kind did not leave the same behind.
        """
        if not self.stood_in:
            return sent
        left = {i: _left(trace, sent, stack, i) for i in range(len(self.layers)) if i not in self.stood_in}
        for kind in alike(self.layers):
            first, *others = [left[i] for i in kind if i in left]
            if any(each != first for each in others):
                raise StructureError(f"layers {kind} of {stack} are alike, and were not seen to do the same")
        for index, source in self.stood_in.items():
            _add(trace, sent, stack, index, left[source])
        for observed in (trace.branches, trace.attentions, trace.choices, sent):
            observed.sort(key=lambda each: each.layer)
        return sent


_OF_NAMES = (
    "fan_in",
    "fan_out",
    "embeddings",
    "gains",
    "offset_gains",
    "used",
    "pickers",
    "stacked",
    "feeds",
    "pieces",
)
"""What a trace keeps by the name of a parameter or a module."""

_OF_LAYERS = ("branches", "attentions", "choices")
"""What it keeps in lists, each with the number of its layer."""

ANY = "*."
"""In front of a name within a layer, whichever."""


def _left(trace: Trace, sent: list[Any], stack: str, index: int) -> dict[str, Any]:
    """What was seen of a layer, without its number."""
    prefix = f"{stack}.{index}."
    found: dict[str, Any] = {}
    for kept in _OF_NAMES:
        values = getattr(trace, kept)
        names = [n for n in values if f"{n}.".startswith(prefix)]
        own = {n: values[n] if isinstance(values, dict) else None for n in names}
        found[kept] = {_renamed(n, prefix, ANY): _renamed(value, prefix, ANY) for n, value in own.items()}
    for kept, observed in (*((kept, getattr(trace, kept)) for kept in _OF_LAYERS), ("sent", sent)):
        found[kept] = [replace(_renamed(each, prefix, ANY), layer=0) for each in observed if each.layer == index]
    own_factors = [f for f in trace.factors if any(n.startswith(prefix) for n in f.weights)]
    return found | {"factors": {_renamed(f, prefix, ANY) for f in own_factors}}


def _add(trace: Trace, sent: list[Any], stack: str, index: int, left: dict[str, Any]) -> None:
    """To a trace what was left by a layer, as that of another number."""
    prefix = f"{stack}.{index}."
    for kept in _OF_NAMES:
        values, own = getattr(trace, kept), left[kept]
        renamed = {_renamed(n, ANY, prefix): _renamed(value, ANY, prefix) for n, value in own.items()}
        values.update(renamed)  # a set takes the names alone
    for kept, observed in (*((kept, getattr(trace, kept)) for kept in _OF_LAYERS), ("sent", sent)):
        observed.extend(replace(_renamed(each, ANY, prefix), layer=index) for each in left[kept])
    trace.factors.update(_renamed(f, ANY, prefix) for f in left["factors"])


def _renamed(value: Any, before: str, after: str) -> Any:
    """The same with the names within one layer, and its own, as those of another."""
    if isinstance(value, str):
        if value.startswith(before):
            return after + value[len(before) :]
        return after[:-1] if value == before[:-1] else value
    if isinstance(value, (tuple, frozenset)):
        return type(value)(_renamed(each, before, after) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _renamed(getattr(value, f.name), before, after) for f in fields(value)})
    return value
