"""The Triton kernels of the "megablocks" experts: MegaBlocks' permutations, and one that zeroes empty experts.

Loaded on first use: importing this module needs triton and MegaBlocks. Of MegaBlocks it takes the one file that holds
the permutations, because the package itself cannot be imported without its CUDA operators, which are not needed here.
"""

import importlib.util
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType

import torch
import triton
import triton.language as tl

BLOCK = 8192
"""Elements that one program of `zero_empty_kernel` clears."""


def find_permutations() -> Path | None:
    """MegaBlocks' file of permutation kernels; nothing is executed."""
    spec = importlib.util.find_spec("megablocks")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "backend" / "kernels.py"
        if path.is_file():
            return path
    return None


def _load_permutations() -> ModuleType:
    path = find_permutations()
    if path is None:
        raise ImportError("megablocks/backend/kernels.py is not installed")
    spec = importlib.util.spec_from_file_location("moe_param._megablocks", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [n for n in ("gather", "scatter", "_padded_copy", "_padded_copy_wgrad") if not hasattr(module, n)]
    if missing:
        raise ImportError(f"{path} has no {', '.join(missing)}: megablocks 0.10.0 is what is supported")
    sys.modules[spec.name] = module
    return module


@triton.jit
def zero_empty_kernel(values, ends, SIZE, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    expert = tl.program_id(1)
    end = tl.load(ends + expert)
    start = 0
    if expert > 0:
        start = tl.load(ends + expert - 1)
    if start == end:
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), dtype=values.dtype.element_ty)
        tl.store(values + expert.to(tl.int64) * SIZE + offsets, zeros, mask=offsets < SIZE)


INTERPRETED = not isinstance(zero_empty_kernel, triton.JITFunction)
"""Whether Triton runs its kernels in Python (TRITON_INTERPRET=1): slow, but on the CPU."""

permutations = _load_permutations()
if INTERPRETED:  # it cannot time, and has no use for, the launch configurations
    for kernel in (permutations._padded_copy, permutations._padded_copy_wgrad):
        kernel.configs = kernel.configs[:1]


def gather(
    x: torch.Tensor,
    indices: torch.Tensor,
    bin_ids: torch.Tensor,
    weights: torch.Tensor | None,
    bins: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Row s of the result is row `indices[s] // top_k` of x, times `weights[indices[s]]`."""
    with _on(x.device):
        return permutations.gather(x, indices, bin_ids, weights, bins, top_k)


def scatter(
    x: torch.Tensor,
    indices: torch.Tensor,
    bin_ids: torch.Tensor,
    weights: torch.Tensor | None,
    bins: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """The transpose of `gather`: the rows of each token, times their weights, summed."""
    with _on(x.device):
        return permutations.scatter(x, indices, bin_ids, weights, bins, top_k)


def scatter_wgrad(
    x: torch.Tensor,
    grad: torch.Tensor,
    indices: torch.Tensor,
    bin_ids: torch.Tensor,
    bins: torch.Tensor,
    top_k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weights' gradient, in `dtype`: summed in float32, and MegaBlocks' own launch would round it to x's dtype."""
    wgrad = torch.empty(indices.shape[0], dtype=dtype, device=x.device)
    with _on(x.device):
        permutations._padded_copy_wgrad[(indices.shape[0],)](
            x, grad, wgrad, indices, bin_ids, bins, bins, NUM_COLUMNS=x.shape[1], TOP_K=top_k
        )
    return wgrad


def zero_empty(values: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`values` (experts first), in place zero for experts without tokens; the others are not even read."""
    size = values[0].numel()
    with _on(values.device):
        zero_empty_kernel[(triton.cdiv(size, BLOCK), values.shape[0])](values, ends, size, BLOCK=BLOCK)
    return values


def _on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
