"""Who sends tokens to which experts: the decoder stack, experts modules and routers.

transformers' own experts interface says where experts are. Without it structure does: a router chooses some of N, and
beside it stand N copies of something, as the members of a `ModuleList` or stacked in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_param.structure.flow import Origin
from moe_param.structure.observations import Choice, Router, StructureError, Trace
from moe_param.structure.operations import ONE

# What the decorator `transformers.integrations.use_experts_implementation` leaves on every experts module.
EXPERTS_MARKS = ("has_gate", "is_transposed", "has_bias", "is_concatenated", "num_experts")


def is_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches this module through its experts interface."""
    return all(hasattr(module, mark) for mark in EXPERTS_MARKS)


def find_layers(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """Name and members of the decoder stack: the outermost `ModuleList` that holds the experts modules.

    Without any it is, of the outermost `ModuleList`s beside the embedding of the tokens, the largest.

    Raises:
        StructureError: no `ModuleList` of layers, or experts outside one common `ModuleList`.
    """
    text = text_part(model)
    experts = [name for name, module in model.named_modules() if is_experts(module)]
    experts = [name for name in experts if name.startswith(text)] or experts  # other towers may have some too
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if experts:
        holding = [name for name in stacks if all(e.startswith(name + ".") for e in experts)]
        where = f"a `ModuleList` that holds all its experts modules ({', '.join(experts)})"
    else:
        outermost = [s for s in stacks if s.startswith(text) and not any(s.startswith(t + ".") for t in stacks)]
        holding = sorted(outermost, key=lambda s: -sum(p.numel() for p in stacks[s].parameters()))[:1]
        where = "a `ModuleList` of layers in the module that embeds the tokens"
    if not holding:
        raise StructureError(f"{type(model).__name__} has no decoder stack: it was expected to be {where}")
    name = min(holding, key=len)
    return name, list(stacks[name])


def text_part(model: PreTrainedModel) -> str:
    """Prefix of the names in the innermost `PreTrainedModel` that embeds the tokens."""
    embedding: Any = model.get_input_embeddings()
    holding = [
        name + "." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and any(m is embedding for m in module.modules())
    ]
    return max(holding, key=len, default="")


def check_stack(model: PreTrainedModel, trace: Trace, entered: Collection[int]) -> None:
    """Refuses a model whose layers are not those of its decoder stack, called one by one.

    Raises:
        StructureError: layers that were never called as modules, or attention outside of the stack.
    """
    stack, layers = find_layers(model)
    never = sorted(set(range(len(layers))) - set(entered))
    if never:
        raise StructureError(
            f"{type(model).__name__} never calls the layers {never} of its decoder stack {stack}: call each as a "
            "module (layer(hidden_states)), which is where the residual stream is seen"
        )
    outside = [a.module for a in trace.attentions if a.module and not f"{a.module}.".startswith(stack + ".")]
    if outside:
        raise StructureError(
            f"{type(model).__name__} has attention in {outside[0]}, outside of its decoder stack {stack}: a Shape has "
            "one depth, of one stack of layers. Put all layers into one ModuleList"
        )


@dataclass(frozen=True)
class Sent:
    """A call of an experts module: in which layer, who made the indices it was given (the innermost module), how many
    experts each token goes to, and where the gates came from."""

    experts: str
    layer: int
    producer: str | None
    top_k: int
    gates: Origin


def find_routers(model: PreTrainedModel, trace: Trace, sent: Iterable[Sent]) -> list[Router]:
    """The routers of all layers, from what was seen while the model ran.

    Raises:
        StructureError: an experts module to which no module handed indices, choices without experts.
    """
    routers = [_declared(model, trace, call) for call in sent] or list(_structural(model, trace))
    unread = [choice for choice in trace.choices if choice.layer >= 0]
    if unread and not routers:
        last = max(unread, key=lambda choice: choice.among)
        among, module = last.among, last.module
        raise StructureError(
            f"{type(model).__name__} chooses {last.count} of {among} in {module}, as routers do, and no {among} "
            f"copies of anything stand beside it (a `ModuleList` of {among} members, weights stacked as ({among}, …, "
            "…)): it can neither be read as dense nor as a mixture of experts"
        )
    _check_copies(model, trace, routers)
    return routers


def _check_copies(model: PreTrainedModel, trace: Trace, routers: list[Router]) -> None:
    """Refuses copies in a layer without a router beside which tokens are picked by a mask: something else sends them.

    Raises:
        StructureError: the first list of such copies.
    """
    stack, _ = find_layers(model)
    routed = tuple(f"{router.experts}." for router in routers)
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not name.startswith(stack + "."):
            continue
        layer = ".".join(name.split(".")[: stack.count(".") + 2]) + "."
        if any(experts.startswith(layer) for experts in routed):
            continue
        copies = {
            n[len(name) + 1 :].partition(".")[0]
            for n, shape in trace.shapes.items()
            if len(shape) > 1 and n.startswith(f"{name}.")
        }
        if len(copies) > 1 and any(f"{name}.".startswith(f"{picker}.") for picker in trace.pickers if picker):
            raise StructureError(
                f"{type(model).__name__} sends tokens to the {len(copies)} members of {name} by masks, "
                "and no router chose: a table of token ids (hash routing) is no router, and there is no rule for it. "
                "Route by a choice among scores of the hidden states (topk)"
            )


# -- with the experts interface --------------------------------------------------------------------------------------
def _declared(model: PreTrainedModel, trace: Trace, call: Sent) -> Router:
    module = call.producer
    if module is None:  # the block chooses experts itself: its router is the linear that the gates come from
        block = call.experts.rpartition(".")[0] + "."
        owners = sorted(name.rpartition(".")[0] for name in call.gates.weights if name.startswith(block))
        if not owners:
            raise StructureError(f"no module hands its indices to the experts {call.experts}: no router was found")
        module = owners[0]
    members = [name for name in trace.shapes if name.startswith(call.experts + ".")]
    num_experts = int(model.get_submodule(call.experts).num_experts)  # type: ignore[arg-type]
    choice = Choice(call.layer, module, call.gates.weights, num_experts, call.top_k)
    return _router(trace, call.experts, choice, call.gates, num_experts, members)


def _router(
    trace: Trace,
    experts: str,
    choice: Choice,
    gates: Origin,
    num_experts: int,
    members: list[str],
) -> Router:
    matrices = [name for name in members if name in trace.fan_in]
    feeding = {name for matrix in matrices for name in trace.feeds.get(matrix, ())}
    up = tuple(name for name in matrices if name in feeding)
    down = tuple(name for name in matrices if name not in feeding)
    sizes = {trace.fan_in[name] for name in down}
    if not up or len(sizes) != 1:
        raise StructureError(
            f"the experts {experts} are not MLPs of one size: {len(up)} of their matrices feed others, the rest sum "
            f"over {sorted(sizes)}"
        )
    normalized = not {"_softmax", "sum"}.isdisjoint(gates.passed)
    queries = {name for attention in trace.attentions for name in attention.query}
    return Router(
        experts=experts,
        module=choice.module,
        weights=gates.weights,
        num_experts=num_experts,
        among=choice.among,
        top_k=choice.count,
        size=sizes.pop(),
        up=up,
        down=down,
        normalized=normalized,
        constant=ONE in gates.passed,
        mixes="mlp" if queries.isdisjoint(up) else "attention",
    )


# -- by structure ----------------------------------------------------------------------------------------------------
def _structural(model: PreTrainedModel, trace: Trace) -> Iterator[Router]:
    """Of every layer, the choices beside which stand as many copies of something as there were candidates."""
    stack, _ = find_layers(model)
    for choice in trace.choices:
        layer = f"{stack}.{choice.layer}"
        for block in _upwards(choice.module, layer):
            found = _copies(trace, block, choice)
            if found is not None:
                experts, num_experts, members = found
                chosen = replace(choice, module=_child_with(block, choice))
                passed = (o.passed for o in trace.factors if o.weights & choice.weights)
                gates = Origin(choice.weights, frozenset().union(*passed))
                yield _router(trace, experts, chosen, gates, num_experts, members)
                break


def _upwards(module: str, layer: str) -> Iterator[str]:
    while module.startswith(layer + "."):
        yield module
        module = module.rpartition(".")[0]
    yield layer


def _copies(trace: Trace, block: str, choice: Choice) -> tuple[str, int, list[str]] | None:
    """(where they are, how many, names of their parameters) of what there are `choice.among` of inside a block."""
    inside = [n for n in trace.fan_in if n.startswith(block + ".") and n not in choice.weights]
    listed: dict[str, dict[int, list[str]]] = {}
    for name in inside:
        for match in re.finditer(r"\.(\d+)\.", name[len(block) :]):
            owner = name[: len(block) + match.start()]
            listed.setdefault(owner, {}).setdefault(int(match.group(1)), []).append(name)
    for owner, members in listed.items():
        if sorted(members) == list(range(choice.among)):
            return owner, choice.among, [name for names in members.values() for name in names]
    stacked = {name: trace.stacked.get(name, trace.shapes[name][0]) for name in inside}
    stacked = {n: size for n, size in stacked.items() if n in trace.stacked or len(trace.shapes[n]) == 3}
    # Beside real experts some routers have candidates that compute nothing: then there are fewer experts than
    # candidates, in some of their stacks, and still more than a token visits.
    counts = sorted({n for n in stacked.values() if n == choice.among or choice.count < n < choice.among})
    if not counts:
        return None
    members_of = [name for name, size in stacked.items() if size in counts]
    return _common(members_of), counts[0], members_of


def _common(names: list[str]) -> str:
    """The innermost module that holds all of these parameters."""
    first, last = min(names).split(".")[:-1], max(names).split(".")[:-1]
    same = [a for a, b in zip(first, last, strict=False) if a == b]
    return ".".join(same[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(same))])


def _child_with(block: str, choice: Choice) -> str:
    """The router: the module that chose, or, where the block itself did, the one below it whose weights it used."""
    if choice.module != block and choice.module.startswith(block + "."):
        return choice.module
    owners = sorted(n.rpartition(".")[0] for n in choice.weights if n.startswith(block + "."))
    return owners[0] if owners else choice.module
