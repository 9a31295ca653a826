"""Name-seeded initialization: a value depends on (seed, parameter name, block of rows) and on nothing else."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from moe_param.errors import MoeParamError
from moe_param.structure.laws import InitLaw

BLOCK = 2**20
"""Numbers drawn per seed, at most: whole rows of dim 0, so that a shard or another thread draws only what it needs."""

RANDOM = ("normal", "uniform", "trunc_normal")
"""Laws that are drawn here; constants are written, and "special" ones are transformers' own code."""


class WeightsError(MoeParamError):
    """Weights that cannot be written: on the meta device, quantized, or sharded in a way that is not understood."""


def check_writable(model: PreTrainedModel) -> None:
    """Raises WeightsError where a parameter has no values to write, naming the first."""
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta:
        raise WeightsError(
            f"{len(meta)} parameters are on the meta device, {meta[0]} first: materialize the model "
            "(model.to_empty(device=…); model.init_weights()) before moe_param.apply, or pass reinit=False for the "
            "rates alone"
        )
    strange = [name for name, p in model.named_parameters() if not p.is_floating_point() and p.requires_grad]
    if strange:
        raise WeightsError(f"parameters that are not floating point cannot be initialized: {strange}")


@torch.no_grad()
def prepare(model: PreTrainedModel, laws: Mapping[str, tuple[InitLaw, int | None]], seed: int) -> Callable[[], None]:
    """Does all that can fail in initializing `model`; what it returns then writes every parameter in place.

    Args:
        model: real weights, on any device, plain or sharded (DTensor).
        laws: parameter name -> (law, padding row of an embedding or None).
        seed: of the whole initialization.

    Raises:
        WeightsError: meta tensors, shards that are not understood, a parameter that transformers never initializes.
    """
    check_writable(model)
    places = {name: local_part(p.detach()) for name, p in model.named_parameters()}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    special = {
        name: _special(model, name, law, places[name], seed) for name, (law, _) in laws.items() if law.kind == "special"
    }
    return lambda: _write(laws, places, shapes, special, seed)


@torch.no_grad()
def _write(
    laws: Mapping[str, tuple[InitLaw, int | None]],
    places: Mapping[str, tuple[torch.Tensor, tuple[int, ...]]],
    shapes: Mapping[str, torch.Size],
    special: Mapping[str, torch.Tensor],
    seed: int,
) -> None:
    """Threads share the work: blocks are independent, so their order does not matter."""
    threads = max(1, min(torch.get_num_threads(), os.cpu_count() or 1))
    jobs: list[tuple[Any, ...]] = []
    for name, (law, _) in laws.items():
        local, offset = places[name]
        if law.kind == "constant":
            local.fill_(law.value)
        elif law.kind == "special":
            local.copy_(special[name])
        elif law.kind in RANDOM:
            shape = shapes[name]
            jobs.extend((name, law, local, shape, offset, rows) for rows in _blocks(shape, local, offset))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread a block: the pool is the parallelism
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda job: _write_block(seed, *job), jobs))
    finally:
        torch.set_num_threads(before)
    for name, (law, padding) in laws.items():
        if padding is not None and law.kind in RANDOM:
            local, offset = places[name]
            if 0 <= padding - offset[0] < local.shape[0]:
                local[padding - offset[0]] = 0.0


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This process's part of a tensor and where it starts."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * max(tensor.dim(), 1)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    if tuple(local.shape) != tuple(shape):
        raise WeightsError(f"a shard has shape {tuple(local.shape)}, its placements {tensor.placements} say {shape}")
    return local, tuple(offset)


def _rows_per_block(shape: torch.Size) -> int:
    if len(shape) >= 3:
        return 1  # one expert
    return max(1, BLOCK // max(1, math.prod(shape[1:])))


def _blocks(shape: torch.Size, local: torch.Tensor, offset: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    if local.numel() == 0:
        return
    rows = shape[0] if shape else 1
    step = _rows_per_block(shape)
    first, last = offset[0], offset[0] + (local.shape[0] if shape else 1)
    for start in range(first - first % step, last, step):
        yield start, min(start + step, rows)


def _write_block(
    seed: int,
    name: str,
    law: InitLaw,
    local: torch.Tensor,
    shape: torch.Size,
    offset: tuple[int, ...],
    rows: tuple[int, int],
) -> None:
    start, stop = rows
    block_shape = (stop - start, *shape[1:]) if shape else ()
    inside = tuple(local.shape[1:]) == tuple(shape[1:]) and start >= offset[0]
    inside = inside and (not shape or stop <= offset[0] + local.shape[0])
    target = (local[start - offset[0] : stop - offset[0]] if shape else local) if inside else None
    generator = torch.Generator().manual_seed(derive(seed, name, 0 if law.tied else start))
    with torch.no_grad():
        direct = target is not None and target.device.type == "cpu" and target.dtype == torch.float32
        block = target if direct and target is not None and target.is_contiguous() else torch.empty(block_shape)
        _draw(block, law, generator)
        if block is target:
            return
        if target is None:  # a shard that cuts the block: keep its part
            low, high = max(start, offset[0]), min(stop, offset[0] + local.shape[0])
            target = local[low - offset[0] : high - offset[0]]
            block = block[low - start : high - start]
            for dim in range(1, len(shape)):
                block = block.narrow(dim, offset[dim], local.shape[dim])
        target.copy_(block)


def _draw(block: torch.Tensor, law: InitLaw, generator: torch.Generator) -> None:
    if law.kind == "normal":
        block.normal_(0.0, law.std, generator=generator)
    elif law.kind == "uniform":
        half = law.std * math.sqrt(3)
        block.uniform_(-half, half, generator=generator)
    else:
        torch.nn.init.trunc_normal_(block, std=law.std, a=-law.bound, b=law.bound, generator=generator)


def derive(seed: int, name: str, start: int) -> int:
    """A 63-bit seed for the block of parameter `name` that starts at row `start`."""
    digest = hashlib.sha256(f"{seed}:{name}:{start}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _special(
    model: PreTrainedModel, name: str, law: InitLaw, place: tuple[torch.Tensor, tuple[int, ...]], seed: int
) -> torch.Tensor:
    """This process's part of a parameter with an initialization of its own (decays, time steps), seeded by name.

    Asked of the innermost `PreTrainedModel` that owns it, as transformers does, on a copy of its module on the CPU, so
    that neither order nor device decides the values, and nothing else is written (some rescale parts of the module).

    Raises:
        WeightsError: transformers leaves some of it unwritten.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    twin = _shell(module, leaf)
    part: torch.nn.Module = model
    initializer = model
    for step in filter(None, owner.split(".")):
        part = getattr(part, step)
        initializer = part if isinstance(part, PreTrainedModel) else initializer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, name, 0))
        initializer._init_weights(twin)
    values = getattr(twin, leaf).detach()
    if values.isnan().any():
        raise WeightsError(
            f"{type(initializer).__name__}._init_weights leaves {name} unwritten, so it has no initialization: let it "
            f"initialize the {leaf} of {type(module).__name__}"
        )
    local, offset = place
    for dim in range(values.dim()):
        values = values.narrow(dim, offset[dim], local.shape[dim])
    return values if law.std in (0.0, 1.0) else values * law.std


def _shell(module: torch.nn.Module, wanted: str | None = None) -> Any:
    """A copy that an initializer may write into without touching the model, down to the parts of its parts.

    The wanted parameter has memory on the CPU, full of NaN; others have only a size. None is marked as initialized.
    """
    shell: Any = object.__new__(type(module))  # copy.copy would run __init__ on modules that fully_shard took over
    shell.__dict__.update(module.__dict__)
    shell._parameters = {
        name: None
        if p is None
        else torch.nn.Parameter(
            torch.full(p.shape, math.nan, dtype=p.dtype, device="cpu" if name == wanted else "meta"), p.requires_grad
        )
        for name, p in module._parameters.items()
    }
    shell._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    shell._modules = {name: None if m is None else _shell(m) for name, m in module._modules.items()}
    return shell
