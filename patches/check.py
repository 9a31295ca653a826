"""Checks what `install.py` installed: one check a process, one line each.

    python patches/check.py triton               # the names of the checks of a level
    python patches/check.py triton permutations  # run one: exit status 0, and "ok …" or "not run …" on the last line

Without a GPU the Triton kernels run interpreted, and what only a GPU can run is said to be not run.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def imports() -> str:
    """What the Triton level needs can be loaded."""
    import torch

    assert hasattr(torch.nn.functional, "grouped_mm") or hasattr(torch, "_grouped_mm"), "torch has no grouped_mm"
    _kernels()
    names = ("torch", "triton", "stanford-stk", "megablocks")
    return "ok: " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def permutations() -> str:
    """MegaBlocks' Triton gather, scatter and the gradient of its weights, against torch's indexing."""
    if _interpreted() and (reason := cannot_interpret()):
        return f"not run: MegaBlocks' permutation kernels. {reason}"
    import torch

    kernels, device = _kernels(), _device()
    tokens, top_k, experts, width = 6, 2, 4, 40
    x, grad = torch.randn(tokens, width, device=device), torch.randn(tokens, width, device=device)
    weights = torch.rand(tokens * top_k, device=device)
    chosen = torch.tensor([0, 1, 1, 3, 3, 0, 1, 0, 3, 1, 0, 3], device=device)  # none for expert 2
    bin_ids, indices = torch.sort(chosen)
    bins = torch.bincount(chosen, minlength=experts).cumsum(0)
    arguments = [tensor.int() for tensor in (indices, bin_ids, bins)]
    order, bin_ids, bins = arguments

    rows = kernels.gather(x, order, bin_ids, None, bins, top_k)
    torch.testing.assert_close(rows, x[indices // top_k])
    out = kernels.scatter(rows, order, bin_ids, weights, bins, top_k)
    torch.testing.assert_close(out, x * weights.view(tokens, top_k).sum(1, keepdim=True))
    weights_grad = kernels.scatter_wgrad(rows, grad, order, bin_ids, bins, top_k)
    torch.testing.assert_close(weights_grad, (x * grad).sum(1).repeat_interleave(top_k))
    return f"ok: MegaBlocks' permutation kernels, forward and backward, {_where()}"


def grouped_mm() -> str:
    """torch's grouped GEMM, forward and backward, with an expert that gets no token."""
    import torch

    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    empty = _grouped(lambda x, weight, sizes: function(x, weight, offs=sizes.cumsum(0).int()))
    return f"ok: torch's grouped_mm, forward and backward, on {_device()}; {empty}"


def layer(provider: str = "torch") -> str:
    """`experts_implementation="megablocks"` against transformers' eager experts, forward and all gradients."""
    sys.path.append(str(Path(__file__).resolve().parent.parent))  # a checkout; last, so that an installed one counts
    if missing := [name for name in ("transformers", "moe_param") if importlib.util.find_spec(name) is None]:
        return f"not run: the layer, {' and '.join(missing)} not installed"
    if _interpreted() and (reason := cannot_interpret()):
        return f"not run: the layer. {reason}"
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    from moe_param.experts import megablocks as experts

    device = _device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = MixtralConfig(hidden_size=32, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    module = MixtralExperts(config).to(device, dtype)
    inputs = torch.randn(12, 32, device=device, dtype=dtype).requires_grad_()
    index = torch.tensor([[0, 1], [3, 1], [0, 3]], device=device).repeat(4, 1)  # none for expert 2
    weights = torch.rand(12, 2, device=device, dtype=dtype).requires_grad_()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    variables = [inputs, weights, *module.parameters()]

    def run(implementation: str) -> list[torch.Tensor]:
        config._experts_implementation = implementation
        _poison()
        out = module(inputs, index, weights)
        return [out.detach(), *torch.autograd.grad(out, variables, torch.ones_like(out))]

    before = experts.use_gmm(provider)
    ours, eager = run("megablocks"), run("eager")
    experts.use_gmm(before)
    for a, b in zip(ours, eager):
        _close(a, b)
    for gradient in ours[-2:]:
        assert gradient[2].abs().max() == 0, "the gradient of an expert without tokens is not zero"
    return f"ok: experts_implementation='megablocks' with {provider} against eager, {_where()}; empty expert: zero"


def extensions() -> str:
    """What was compiled can be loaded, and MegaBlocks as a whole imports."""
    import torch  # noqa: F401 - before the extensions, which need its libraries

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Grouped GEMM not available" is one
        import grouped_gemm_backend
        import megablocks_ops

        warnings.simplefilter("default")
        import megablocks

    assert hasattr(grouped_gemm_backend, "gmm") and hasattr(megablocks_ops, "inclusive_cumsum")
    assert hasattr(megablocks, "dMoE")
    version = importlib.metadata.version("grouped_gemm")
    return f"ok: megablocks_ops and grouped_gemm_backend (grouped_gemm {version}) load, import megablocks works"


def cumsum() -> str:
    """The two functions that cub_debug_synchronous.h is about."""
    import torch

    if not torch.cuda.is_available():
        return "not run: MegaBlocks' cumulative sums, no GPU"
    from megablocks import ops

    x = torch.arange(1, 9, device="cuda", dtype=torch.int32)
    assert torch.equal(ops.inclusive_cumsum(x, 0), x.cumsum(0).int())
    assert torch.equal(ops.exclusive_cumsum(x, 0), x.cumsum(0).int() - x)
    return "ok: MegaBlocks' cumulative sums"


def grouped_gemm() -> str:
    import torch

    if not torch.cuda.is_available():
        return "not run: grouped_gemm forward and backward, no GPU"
    from grouped_gemm import ops

    try:
        empty, build = _grouped(lambda x, weight, sizes: ops.gmm(x, weight, sizes)), "CUTLASS"
    except RuntimeError as error:  # the cuBLAS build reads the group sizes on the host
        if "is_cpu" not in str(error):
            raise
        empty, build = _grouped(lambda x, weight, sizes: ops.gmm(x, weight, sizes.cpu())), "cuBLAS"
    return f"ok: grouped_gemm ({build}) forward and backward, on cuda; {empty}"


def layer_grouped_gemm() -> str:
    import torch

    if not torch.cuda.is_available():
        return "not run: experts_implementation='megablocks' with grouped_gemm, no GPU"
    return layer("grouped_gemm")


LEVELS: dict[str, tuple[Callable[[], str], ...]] = {"triton": (imports, permutations, grouped_mm, layer)}
LEVELS["cuda"] = (*LEVELS["triton"], extensions, cumsum, grouped_gemm, layer_grouped_gemm)


# -- parts of checks -------------------------------------------------------------------------------------------------
def _grouped(multiply: Callable[[Any, Any, Any], Any]) -> str:
    """Checks a grouped GEMM against one product per expert; says what an expert without tokens gets."""
    import torch

    sizes = torch.tensor([16, 32, 0, 16], device=_device())
    x = torch.randn(64, 32, device=_device(), dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(4, 32, 48, device=_device(), dtype=torch.bfloat16).requires_grad_()
    _poison()
    out = multiply(x, weight, sizes)
    ours = [out, *torch.autograd.grad(out, (x, weight), torch.ones_like(out))]
    expected = torch.cat([part @ w for part, w in zip(x.split(sizes.tolist()), weight)])
    theirs = [expected, *torch.autograd.grad(expected, (x, weight), torch.ones_like(out))]
    used = sizes > 0
    for a, b in zip(ours[:2], theirs[:2]):
        _close(a, b)
    _close(ours[2][used], theirs[2][used])
    zero = bool((ours[2][~used] == 0).all())
    return "empty expert: zero" if zero else "empty expert: NOT zero, moe_param clears it (grouped_gemm#36)"


def _close(a: Any, b: Any) -> None:
    """In the norm: single elements of bfloat16 sums may be off by more than they are large."""
    error = ((a - b).double().norm() / b.double().norm()).item()
    assert error < (2e-2 if a.element_size() == 2 else 1e-5), f"off by {error:.1e} of the expected norm"


def _poison() -> None:
    """Leaves memory full of NaN with the allocator: what is never written then shows."""
    import torch

    if torch.cuda.is_available():
        blocks = [torch.full((2**n,), float("nan"), device="cuda") for n in range(6, 20) for _ in range(4)]
        del blocks
        torch.cuda.synchronize()


def _kernels() -> ModuleType:
    """megablocks/backend/kernels.py, by path: the package itself does not import without its extension."""
    package = importlib.util.find_spec("megablocks")
    assert package is not None and package.submodule_search_locations, "megablocks is not installed"
    path = Path(next(iter(package.submodule_search_locations))) / "backend/kernels.py"
    spec = importlib.util.spec_from_file_location("megablocks_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if _interpreted():  # the interpreter cannot time the configurations
        for kernel in (module._padded_copy, module._padded_copy_wgrad):
            kernel.configs = kernel.configs[:1]
    return module


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def cannot_interpret() -> str | None:
    """Why Triton's interpreter does not run here, if so: until 3.7 it takes an array of one element for a number."""
    try:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError:
        return None
    if _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return None
    return (
        f"The interpreter of Triton {triton} does not work with numpy {numpy}: on a machine without a GPU install "
        "numpy<2.4 or triton>=3.7.1. On a GPU nothing is interpreted"
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _where() -> str:
    return "interpreted (no GPU)" if _interpreted() else "on the GPU"


def main(level: str, name: str | None = None) -> None:
    checks = {check.__name__: check for check in LEVELS[level]}
    if name is None:
        print(*checks)
        return
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    torch.manual_seed(0)
    print(checks[name]())


if __name__ == "__main__":
    main(*sys.argv[1:])
