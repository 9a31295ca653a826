"""The structure of a model, read off one forward pass on fake tensors.

Names of modules and config attributes differ from family to family; what the forward pass does with a parameter
does not. So the model is built and run once under `FakeTensorMode` (no memory, no arithmetic) while every operation
is watched: `flow` says what a tensor can be, `operations` what each operation makes of it, `observations` what is
kept. This file builds, runs and listens.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from moe_param.structure.adapters import Adapter, adapter_for
from moe_param.structure.dispatch import Sent, check_stack, find_layers, find_routers, is_experts
from moe_param.structure.flow import Activation, Flow, Origin, Stream, Weight
from moe_param.structure.laws import InitLaw, InitWatcher
from moe_param.structure.observations import StructureError, Trace
from moe_param.structure.operations import HANDLERS, Call, UnknownOperation, result_of
from moe_param.structure.repeats import RUN, Repeats


@contextmanager
def _quiet() -> Iterator[None]:
    """Building a config's model again would repeat every warning the user has already seen."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def model_class_for(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The causal language model of a config, or its plain model where the family has none.

    Raises:
        StructureError: transformers maps this config to no model.
    """
    for auto in (AutoModelForCausalLM, AutoModel):
        found: Any = auto._model_mapping.get(type(config), None)
        if isinstance(found, type):
            return found
    raise StructureError(
        f"transformers maps {type(config).__name__} to no model: pass a model, or the config of its text part "
        "(`config.get_text_config()`)."
    )


@contextmanager
def _apart() -> Iterator[None]:
    """Keeps the caller's state and the reading from each other: the random generator (what a model computes with
    constants alone is computed for real, and noise may be among it), the default device, inference mode."""
    elsewhere = torch.get_default_device().type != "cpu"  # a device context slows down every operation
    on_cpu = torch.device("cpu") if elsewhere else nullcontext()
    with torch.random.fork_rng(devices=[]), on_cpu, torch.inference_mode(False):
        torch.default_generator.manual_seed(0)
        yield


class Watcher(TorchDispatchMode):
    """Keeps the flow of every floating-point tensor, and values of whole numbers and masks.

    Numbers that tokens decide have no value on fake tensors, and yet models branch on them (which experts were hit).
    So whole numbers and masks are computed for real where they depend on nothing fake; where they do, a choice goes
    round all candidates in turn and a mask is true everywhere, so that every part of the model runs.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter
        self.trace = Trace()
        self.layer = -1
        self.running: list[str] = [""]
        # By identity, and the tensors are kept: no weak references, no identity used twice.
        self.flows: dict[int, tuple[Any, Flow]] = {}
        # What is written in place (copies into an empty tensor) is found by the storage it is a view of.
        self.written: dict[int, tuple[Any, Flow]] = {}
        for name, parameter in model.named_parameters():
            self.set(parameter, Weight(((name, 1.0),), of=frozenset({name})))

    def flow(self, value: Any) -> Flow | None:
        """That of a tensor; None for constants, and for whole numbers and masks, which select and do not scale."""
        if not isinstance(value, torch.Tensor) or not (value.dtype.is_floating_point or value.dtype.is_complex):
            return None
        found = self.flows.get(id(value)) or self.written.get(storage(value))
        return found[1] if found else None

    def set(self, value: Any, flow: Flow) -> None:
        for tensor in tensors(value):
            self.flows[id(tensor)] = (tensor, flow)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "device":  # a question, asked for every operation
            return func(*args, **kwargs)
        if name == "nonzero" or (name == "index" and any(getattr(i, "dtype", None) == torch.bool for i in args[1])):
            self.trace.pickers.add(self.running[-1])
        if name == "index":
            args = (args[0], _positions(args[1]))
        operands = tensors((args, kwargs))
        known = [f for a in operands if (f := self.flow(a)) is not None]
        out = self.run(func, name, args, kwargs, bool(known) or any(isinstance(a, FakeTensor) for a in operands))
        in_place = name.endswith("_") and not name.endswith("__")
        op = name[:-1] if in_place else name
        if not known or op in _FACTORIES:
            return out
        for flow in known:
            self.trace.used.update(flow.names)
        if op not in HANDLERS and not any(t.is_floating_point() for t in tensors(out)):
            return out  # a comparison: what it selects is not scaled by it
        where = (self.trace, self.layer, self.running[-1], self.adapter.normed_stream)
        flow = result_of(Call(op, args, tuple(known), self.flow, *where, options=kwargs))
        self.set(out, flow)
        if in_place and not isinstance(flow, Weight):
            self.written[storage(args[0])] = (args[0], flow)
        return out

    def run(self, func: Any, name: str, args: Any, kwargs: Any, depends: bool) -> Any:
        """The operation's result, with values where it does not depend on tokens or parameters."""
        if not depends:
            if name not in _RANDOM:
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        elif name.endswith("_") and not isinstance(args[0], FakeTensor):
            return args[0]  # what is written into a constant ends its being one: `written` will say so
        elif name == "nonzero":  # of a mask that has no values
            return torch.stack(_positions([args[0]]), 1)
        out = func(*args, **kwargs)
        if all(t.is_floating_point() for t in tensors(out)):
            return out
        return tree_map(lambda result: _with_values(result, name, args), out)


_RANDOM = {"rand", "randn", "randint", "randperm", "normal", "bernoulli"}
"""Not run for real: noise has no value that a model's structure could depend on."""

_FACTORIES = {"new_empty", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "empty_like", "full_like"}
"""New tensors in the likeness of another one: they take nothing from it."""


def tensors(value: Any) -> list[torch.Tensor]:
    """Those in nested tuples, lists and mappings (for every operation: faster than torch's general tree walk)."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for each in value for tensor in tensors(each)]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _positions(indices: Any) -> list[Any]:
    """Indices with masks as the positions at which they are true; where nobody knows, they are true everywhere."""
    found: list[Any] = []
    with unset_fake_temporarily():
        for index in indices:
            if not isinstance(index, torch.Tensor) or index.dtype != torch.bool:
                found.append(index)
            else:
                mask = torch.ones(index.shape, dtype=torch.bool) if isinstance(index, FakeTensor) else index
                found.extend(mask.nonzero().unbind(1))
    return found


_CHOSEN_ALONG = {"topk": 2, "sort": 1, "argsort": 1, "max": 1, "min": 1, "argmax": 1, "argmin": 1}
"""Operations that yield positions along a dimension -> where among their arguments that dimension is."""


def _with_values(result: Any, name: str, args: Any) -> Any:
    """A mask that is true everywhere, positions that go round all there are; anything else as it is."""
    if not isinstance(result, FakeTensor):
        return result
    with unset_fake_temporarily():
        if result.dtype == torch.bool:
            return torch.full(result.shape, name not in ("isnan", "isinf"))
        if result.dtype != torch.long or name not in _CHOSEN_ALONG or not args[0].dim():
            return result
        at = _CHOSEN_ALONG[name]
        dim = args[at] if len(args) > at and isinstance(args[at], int) else -1
        if result.dim() < args[0].dim():  # the dimension is gone: one position each
            return torch.arange(result.numel()).view(result.shape) % args[0].shape[dim]
        moved = result.movedim(dim, -1).shape if result.dim() else result.shape
        return (torch.arange(result.numel()).view(moved) % args[0].shape[dim]).movedim(-1, dim)


_recent: OrderedDict[tuple[type[PreTrainedModel], str, str], tuple[PreTrainedModel, Trace]] = OrderedDict()


def trace_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> tuple[PreTrainedModel, Trace]:
    """Builds `model_class(config)` without memory, runs a few tokens through it and reports what was seen.

    Returns the fake model (for its module tree) and the trace: the caller's own, the fake tensors aside.

    Raises:
        StructureError: the model has no decoder stack or no input embedding, or cannot be built or run on fake tensors.
    """
    model, trace = shared_trace(model_class, config)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors), trace.copy()


def shared_trace(model_class: type[PreTrainedModel], config: PretrainedConfig) -> tuple[PreTrainedModel, Trace]:
    """`trace_model` for the readers of this package, who change nothing: planning asks for the same two models several
    times, so the last few results are remembered."""
    key = (model_class, config.to_json_string(use_diff=False), repr(adapter_for(config)))
    if key not in _recent:
        _recent[key] = _trace_model(model_class, config)
        if len(_recent) > 6:
            _recent.popitem(last=False)
    return _recent[key]


def _trace_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> tuple[PreTrainedModel, Trace]:
    repeats = Repeats(RUN)
    try:
        return _traced(model_class, config, repeats)
    except StructureError:
        if not repeats.like:
            raise
    return _traced(model_class, config, Repeats(None))  # layers are not what they look like, or nothing can be read


def _traced(
    model_class: type[PreTrainedModel], config: PretrainedConfig, repeats: Repeats
) -> tuple[PreTrainedModel, Trace]:
    config = copy.deepcopy(config)
    adapter = adapter_for(config)
    with _quiet(), _apart(), FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as fakes:
        inits = InitWatcher(fakes)
        with inits, _one_line(f"{model_class.__name__} could not be built on fake tensors"):
            model = model_class(config)
        model.eval()
        _check_embedding(model)
        _use_plain_implementations(model)
        watcher = Watcher(model, adapter)
        stack, layers = find_layers(model)
        trace = watcher.trace
        for name, parameter in model.named_parameters():
            trace.shapes[name] = tuple(parameter.shape)
            trace.laws[name] = inits.law(parameter) or InitLaw("special")
        trace.laws |= {name: law for name, buffer in model.named_buffers() if (law := inits.law(buffer))}
        inputs = forward_inputs(model, torch.zeros(1, adapter.tokens, dtype=torch.long))
        listener = Listener(model, layers, watcher)
        purpose = f"{model_class.__name__} could not be run on fake tensors to find the roles of its parameters"
        with (
            _one_line(purpose),
            listener,
            repeats.among(layers),
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            watcher,
        ):
            out = model(**inputs)
        if not trace.logits_from:
            last = watcher.flow(getattr(out, "last_hidden_state", None))
            trace.logits_from = last.names if last is not None else ()
        check_stack(model, trace, listener.entered)
        trace.routers = find_routers(model, trace, repeats.complete(stack, trace, listener.sent))
    return model, trace


class Listener:
    """Hooks on the modules of a model while it runs: which is running, where the stream begins, who sends where."""

    def __init__(self, model: PreTrainedModel, layers: list[nn.Module], watcher: Watcher) -> None:
        self.model, self.layers, self.watcher = model, layers, watcher
        self.sent: list[Sent] = []
        # Which module was the first to hand out a tensor of whole numbers, by its storage (kept, see `Watcher`).
        self.producers: dict[int, tuple[str, torch.Tensor]] = {}
        self.entered: set[int] = set()
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            self.handles.append(module.register_forward_pre_hook(partial(self.enter, name)))
            self.handles.append(module.register_forward_hook(partial(self.leave, name)))
            if is_experts(module):
                self.handles.append(module.register_forward_pre_hook(partial(self.send, name), with_kwargs=True))
        for index, layer in enumerate(self.layers):
            self.handles.append(layer.register_forward_pre_hook(partial(self.enter_layer, index), with_kwargs=True))
        head = self.model.get_output_embeddings()
        if head is not None:
            self.handles.append(head.register_forward_pre_hook(self.enter_head))

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.watcher.running.append(name)

    def leave(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        self.watcher.running.pop()
        for tensor in tensors(out):
            if not tensor.is_floating_point() and not is_experts(module):
                self.producers.setdefault(storage(tensor), (name, tensor))

    def enter_layer(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.watcher.layer = index
        self.entered.add(index)
        hidden = self.hidden_states(index, module, args, kwargs)
        flow = self.watcher.flow(hidden)
        if flow.scaled if isinstance(flow, Stream) else index > 0:  # scaled, or the layer before ends in a norm
            self.watcher.trace.plain_residual = False
        self.watcher.set(hidden, Stream())

    def hidden_states(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Of what a layer is called with, the first that depends on the tokens; that of transformers' name before all.

        Raises:
            StructureError: there is none.
        """
        given = [kwargs[name] for name in ("hidden_states",) if name in kwargs] + [*args, *kwargs.values()]
        for value in given:
            if any(isinstance(self.watcher.flow(tensor), Activation) for tensor in tensors(value)):
                return value
        raise StructureError(
            f"{type(self.model).__name__}: layer {index} ({type(module).__name__}) is called without hidden states, "
            "where the residual stream was expected: call layers with the stream as an argument, a tensor that depends "
            "on the tokens"
        )

    def enter_head(self, module: nn.Module, args: Any) -> None:
        flow = self.watcher.flow(args[0])
        self.watcher.trace.logits_from = flow.names if flow is not None else ()

    def send(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        """An experts module is given tokens, the experts chosen for them, and gates."""
        given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False)) | kwargs
        gates = self.watcher.flow(given["top_k_weights"])
        origin = gates.origin if isinstance(gates, Activation) else Origin()
        producer, _ = self.producers.get(storage(given["top_k_index"]), (None, None))
        self.sent.append(Sent(name, self.watcher.layer, producer, int(given["top_k_index"].shape[-1]), origin))


@contextmanager
def _one_line(doing: str) -> Iterator[None]:
    """What a model's own code raises, as a StructureError of one line."""
    try:
        yield
    except StructureError:
        raise
    except UnknownOperation as error:
        raise StructureError(f"{doing}: {error}") from None
    except (GuardOnDataDependentSymNode, DataDependentOutputException) as error:
        place = re.search(r"Caused by: \((.*?)\)", str(error))
        raise StructureError(
            f"{doing}: its code asks for a value that depends on the tokens (.item(), or an if on a tensor"
            f"{f'; {place[1]}' if place else ''}), and fake tensors have none: compute with tensors there (torch.where)"
        ) from error
    except Exception as error:
        raise StructureError(f"{doing}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _check_embedding(model: PreTrainedModel) -> None:
    """The embedding tells the width and where the residual stream begins.

    Raises:
        StructureError: `get_input_embeddings` is missing, or its module has no weight.
    """
    try:
        found = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):  # of transformers' own lookup by usual names
        found = None
    if not isinstance(found, torch.Tensor):
        raise StructureError(
            f"{type(model).__name__} does not say which module embeds the tokens: define get_input_embeddings(self) "
            "in the class, returning its nn.Embedding"
        )


def forward_inputs(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """What the forward pass is called with, for token ids (batch, length).

    Raises:
        StructureError: tokens alone are not enough.
    """
    if model.config.is_encoder_decoder:
        raise StructureError(
            f"{type(model).__name__} is an encoder-decoder: its two stacks may differ in depth and size, and a Shape "
            "has one of each; moe_param reads decoders"
        )
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name != "input_ids"
    ]
    if missing or ("input_ids" not in parameters and not open_ended):
        raise StructureError(
            f"{type(model).__name__}.forward cannot be called with input_ids alone (it needs "
            f"{', '.join(missing or ['other inputs'])}): give what it needs beyond the tokens a default"
        )
    inputs: dict[str, Any] = {"input_ids": ids}
    return inputs | ({"use_cache": False} if open_ended or "use_cache" in parameters else {})


def _use_plain_implementations(model: nn.Module) -> None:
    """Attention with a softmax to see, and experts that run on fake tensors.

    Set where modules read it: transformers' setters do nothing for classes defined outside its own files.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config._attn_implementation_internal = "eager"
            config._experts_implementation_internal = "batched_mm"
