"""Compiles every variant of the Triton kernels that the "megablocks" experts launch, for GPUs that need not be there.

`python -m tests.experts.ahead OUT.json`: {variant: {architecture: bytes of machine code}}. The interpreter accepts what
the compiler does not (types that change in a loop or a branch), so the one is no substitute for the other.
"""

from __future__ import annotations

import sys

import transformers.integrations.moe as table  # before moe_param: it must find what is already there

assert "megablocks" not in table.ALL_EXPERTS_FUNCTIONS
import moe_param  # noqa: E402, F401

assert "megablocks" in table.ALL_EXPERTS_FUNCTIONS

import itertools  # noqa: E402
import json  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompilationError  # noqa: E402

from moe_param.experts import kernels  # noqa: E402
from moe_param.experts import megablocks as experts  # noqa: E402

ARCHITECTURES = (80, 90, 100)
DTYPES = ("bf16", "fp16", "fp32")
COLUMNS, TOP_K = 2048, 8


def compile_for(kernel: Any, arguments: dict[str, Any], architecture: int, num_warps: int) -> int:
    """Strings are types of arguments, other values constants; the size of the machine code."""
    names = kernel.arg_names
    assert set(names) == set(arguments), (names, arguments)
    signature = {n: v if isinstance(v, str) else "constexpr" for n, v in arguments.items()}
    constants = {n: v for n, v in arguments.items() if not isinstance(v, str)}
    # what a launch finds out about real tensors: they start at multiples of 16 bytes
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(kernel, {n: signature[n] for n in names}, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": num_warps})
    return len(compiled.asm["cubin"])


def copy(
    x: str, weights: str | None, gather: bool, block: int, bins: str = "*i32", top_k: int = TOP_K
) -> dict[str, Any]:
    return {
        **{"a": f"*{x}", "b": f"*{x}", "indices": "*i64", "bin_ids": "*i32", "bins": bins, "padded_bins": bins},
        "weights": f"*{weights}" if weights else None,
        **{"NUM_COLUMNS": COLUMNS, "TOP_K": top_k, "BLOCK_X": block, "A_TO_B": gather, "SCALE": weights is not None},
    }


def variants() -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """(name, kernel, arguments, warps) of everything that is launched, MegaBlocks' launch configurations included."""
    mb = kernels.permutations
    copies = [(c.kwargs["BLOCK_X"], c.num_warps) for c in mb._padded_copy.configs]
    wgrads = [(c.kwargs["BLOCK_X"], c.num_warps) for c in mb._padded_copy_wgrad.configs]
    assert len(copies) > 1 and len(wgrads) > 1

    def wgrad(x: str, weights: str, block: int) -> dict[str, Any]:
        pointers = {"x": f"*{x}", "grad": f"*{x}", "wgrad": f"*{weights}", "indices": "*i64"}
        bins = {"bin_ids": "*i32", "bins": "*i32", "padded_bins": "*i32"}
        return {**pointers, **bins, "NUM_COLUMNS": COLUMNS, "TOP_K": TOP_K, "BLOCK_X": block}

    for x in DTYPES:
        for gather, weights in itertools.product((True, False), (None, x, "fp32")):
            name = f"{'gather' if gather else 'scatter'} {x}" + (f" × {weights}" if weights else "")
            yield name, mb._padded_copy.fn, copy(x, weights, gather, *copies[2][:1]), copies[2][1]
        for weights in {x, "fp32"}:
            yield f"scatter_wgrad {x} -> {weights}", mb._padded_copy_wgrad.fn, wgrad(x, weights, wgrads[2][0]), 2
        clear = {"values": f"*{x}", "ends": "*i32", "SIZE": "i32", "BLOCK": kernels.BLOCK}
        yield f"zero_empty {x}", kernels.zero_empty_kernel, clear, 4
    yield "gather bf16, k = 1", mb._padded_copy.fn, copy("bf16", None, True, 256, top_k=1), 4
    for block, warps in copies:
        yield f"scatter bf16, {block}/{warps}", mb._padded_copy.fn, copy("bf16", "fp32", False, block), warps
    for block, warps in wgrads:
        yield f"scatter_wgrad bf16, {block}/{warps}", mb._padded_copy_wgrad.fn, wgrad("bf16", "fp32", block), warps


def main() -> None:
    assert not kernels.INTERPRETED
    sizes: dict[str, dict[str, int]] = {}
    for name, kernel, arguments, warps in variants():
        for architecture in ARCHITECTURES:
            sizes.setdefault(name, {})[f"sm_{architecture}"] = compile_for(kernel, arguments, architecture, warps)
    refusals: dict[str, str] = {}
    try:  # the control: 64-bit bins, which the interpreter takes
        compile_for(kernels.permutations._padded_copy.fn, copy("bf16", None, True, 256, bins="*i64"), 90, 4)
    except CompilationError as error:
        refusals["64-bit bins"] = str(error)
    try:
        experts.gather(torch.zeros(2, 8), torch.arange(2), torch.zeros(2).int(), None, torch.tensor([2]).int(), 1)
    except RuntimeError as error:
        refusals["CPU"] = str(error)
    provider = experts.use_gmm("auto")  # what MOE_PARAM_GMM said
    Path(sys.argv[1]).write_text(json.dumps({"sizes": sizes, "refusals": refusals, "provider": provider}))


if __name__ == "__main__":
    main()
