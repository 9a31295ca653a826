"""The "megablocks" experts implementation: no dropped tokens, no padding, sorted tokens through grouped matmuls.

Registered with transformers by `import moe_param`; takes every layout that its `use_experts_implementation` knows.
Tokens are permuted by MegaBlocks' Triton kernels (Gale et al., arXiv:2211.15841): a gather that copies each token once
per chosen expert, a scatter that weights and sums, and their gradients. Between them stands a grouped matrix
multiplication by one of two providers: "torch" (`torch.nn.functional.grouped_mm`) or "grouped_gemm" (MegaBlocks' own).

All of it are custom operators with fake and autograd implementations, closed under differentiation, so compiling,
checkpointing, autocast and sharding see ordinary operators. Below: T tokens, k experts each, S = T·k rows, H wide.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

GMM_PROVIDERS = ("torch", "grouped_gemm")

FASTEST: dict[tuple[int, int], str] = {}
"""Compute capability -> fastest provider. Empty: not measured yet (`python -m recipes.bench.experts` does)."""

DEFAULT = "torch"
"""Where nothing was measured. Reasoned, not measured: on Hopper and Blackwell torch has one kernel per multiplication
and never waits for the GPU. grouped_gemm's cuBLAS build reads the group sizes back to the host and starts one call per
expert; its CUTLASS build does neither, but its kernels are of an older generation."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_choice = os.environ.get("MOE_PARAM_GMM") or "auto"


# -- what is installed, what is chosen -------------------------------------------------------------------------------
def check_available() -> None:
    """Raises ImportError, with what to run, where MegaBlocks' Triton kernels cannot be loaded."""
    missing = [package for package in ("triton", "megablocks") if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"experts_implementation='megablocks' needs {' and '.join(missing)}, not installed here. Run "
            "`moe-param install-kernels`, or by hand `pip install triton` and `pip install --no-deps "
            "--no-build-isolation megablocks==0.10.0` (its pins refuse current torch; its CUDA operators are not "
            "needed). On a CPU use experts_implementation='grouped_mm'."
        )
    _load_kernels()


def is_available(device: torch.device | str | None = None) -> bool:
    """Whether the kernels can be loaded, and, if a device is given, run there."""
    try:
        check_available()
    except ImportError:
        return False
    return device is None or torch.device(device).type == "cuda" or _load_kernels().INTERPRETED


def use_gmm(provider: str) -> str:
    """Chooses who multiplies from now on, "torch", "grouped_gemm" or "auto", and returns the choice before.

    It overrides the environment's MOE_PARAM_GMM; "auto" is the fastest one measured on the device.
    """
    global _choice
    before, _choice = _choice, _checked(provider, "use_gmm")
    return before


@torch.compiler.assume_constant_result  # what it looks up is the same at every call
def gmm_provider(device: torch.device, dtype: torch.dtype, choice: str | None = None) -> str:
    """The provider that multiplies `dtype` on `device`; `choice` instead of what `use_gmm` or MOE_PARAM_GMM chose."""
    choice = _choice if choice is None else choice
    if _checked(choice, "MOE_PARAM_GMM") == "grouped_gemm":
        if device.type != "cuda" or dtype != torch.bfloat16:
            raise ValueError(
                f"grouped_gemm multiplies bfloat16 on CUDA only, not {_name(dtype)} on {device.type}: choose 'torch' "
                "or 'auto' (MOE_PARAM_GMM, moe_param.experts.megablocks.use_gmm), or train in bfloat16"
            )
        if importlib.util.find_spec("grouped_gemm") is None:
            raise ImportError(
                "MOE_PARAM_GMM=grouped_gemm needs the grouped_gemm package, not installed here: run `moe-param "
                "install-kernels`, or choose 'torch'"
            )
        return choice
    if choice == "auto" and device.type == "cuda" and dtype == torch.bfloat16:
        fastest = FASTEST.get(torch.cuda.get_device_capability(device), DEFAULT)
        return fastest if fastest == "torch" or importlib.util.find_spec("grouped_gemm") is not None else "torch"
    return "torch"


def _checked(choice: str, source: str) -> str:
    if choice not in ("auto", *GMM_PROVIDERS):
        raise ValueError(f"{source}: unknown provider {choice!r} (valid: auto, {', '.join(GMM_PROVIDERS)})")
    return choice


_kernels: ModuleType | None = None


def _load_kernels() -> ModuleType:
    global _kernels
    if _kernels is None:
        from moe_param.experts import kernels

        _kernels = kernels
    return _kernels


def _kernels_for(x: Tensor, rows: int) -> ModuleType:
    """The kernels, if they can work on `rows` rows like those of x."""
    if _kernels is None:
        check_available()
    kernels = _load_kernels()
    if x.device.type != "cuda" and not kernels.INTERPRETED:
        raise RuntimeError(
            f"experts_implementation='megablocks' runs on CUDA, the hidden states are on {x.device.type}: use "
            "experts_implementation='grouped_mm' there"
        )
    if rows * x.shape[1] >= 2**31:
        raise ValueError(
            f"experts_implementation='megablocks': tokens·top_k·width = {rows}·{x.shape[1]} does not fit the 32-bit "
            "indices of MegaBlocks' kernels (2^31): pass fewer tokens at once"
        )
    return kernels


# -- permutations ----------------------------------------------------------------------------------------------------
_PERMUTATION = "Tensor indices, Tensor bin_ids, Tensor? weights, Tensor bins, int top_k"


@torch.library.custom_op("moe_param::gather", mutates_args=(), schema=f"(Tensor x, {_PERMUTATION}) -> Tensor")
def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """(T, H) to (S, H), sorted by expert: row s is row indices[s] // k of x, times weights[indices[s]]."""
    kernels = _kernels_for(x, indices.shape[0])
    if x.numel() == 0:
        return x.new_empty(indices.shape[0], x.shape[1])
    return kernels.gather(x.contiguous(), indices, bin_ids, _contiguous(weights), bins, top_k)


@torch.library.custom_op("moe_param::scatter", mutates_args=(), schema=f"(Tensor x, {_PERMUTATION}) -> Tensor")
def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """(S, H) to (T, H), the transpose of gather: the rows of each token, times their weights, summed."""
    kernels = _kernels_for(x, indices.shape[0])
    if x.numel() == 0:
        return x.new_empty(indices.shape[0] // top_k, x.shape[1])
    return kernels.scatter(x.contiguous(), indices, bin_ids, _contiguous(weights), bins, top_k)


@torch.library.custom_op(
    "moe_param::scatter_wgrad",
    mutates_args=(),
    schema="(Tensor x, Tensor grad, Tensor indices, Tensor bin_ids, Tensor bins, int top_k, ScalarType dtype)"
    " -> Tensor",
)
def scatter_wgrad(
    x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int, dtype: torch.dtype
) -> Tensor:
    """(S, H), (T, H) to (S,): the gradient of scatter's weights, in their dtype."""
    kernels = _kernels_for(x, indices.shape[0])
    if x.numel() == 0:
        return x.new_zeros(indices.shape[0], dtype=dtype)
    return kernels.scatter_wgrad(x.contiguous(), grad.contiguous(), indices, bin_ids, bins, top_k, dtype)


def _contiguous(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.contiguous()


@gather.register_fake
def _(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    return x.new_empty(indices.shape[0], x.shape[1])


@scatter.register_fake
def _(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    return x.new_empty(indices.shape[0] // top_k, x.shape[1])


@scatter_wgrad.register_fake
def _(
    x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(indices.shape[0], dtype=dtype)


def _save_permutation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices, bin_ids, weights, bins, ctx.top_k = inputs
    # x is needed for the gradient of the weights alone
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, indices, bin_ids, weights, bins)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, indices, bin_ids, weights, bins = ctx.saved_tensors
    x_grad = weights_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = scatter(grad, indices, bin_ids, weights, bins, ctx.top_k)
    if ctx.needs_input_grad[3]:
        weights_grad = scatter_wgrad(grad, x, indices, bin_ids, bins, ctx.top_k, weights.dtype)
    return x_grad, None, None, weights_grad, None, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, indices, bin_ids, weights, bins = ctx.saved_tensors
    x_grad = weights_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = gather(grad, indices, bin_ids, weights, bins, ctx.top_k)
    if ctx.needs_input_grad[3]:
        weights_grad = scatter_wgrad(x, grad, indices, bin_ids, bins, ctx.top_k, weights.dtype)
    return x_grad, None, None, weights_grad, None, None


def _save_wgrad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.top_k, _ = inputs
    ctx.save_for_backward(*tensors)


def _scatter_wgrad_backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
    x, grad, indices, bin_ids, bins = ctx.saved_tensors
    x_grad = gather(grad, indices, bin_ids, weights, bins, ctx.top_k) if ctx.needs_input_grad[0] else None
    grad_grad = scatter(x, indices, bin_ids, weights, bins, ctx.top_k) if ctx.needs_input_grad[1] else None
    return x_grad, grad_grad, None, None, None, None, None


gather.register_autograd(_gather_backward, setup_context=_save_permutation)
scatter.register_autograd(_scatter_backward, setup_context=_save_permutation)
scatter_wgrad.register_autograd(_scatter_wgrad_backward, setup_context=_save_wgrad)


# -- grouped matrix multiplications ----------------------------------------------------------------------------------
# `ends` (int32): where each expert's rows end. `sizes` (int64): how many it has; for grouped_gemm, None means torch.
@torch.library.custom_op(
    "moe_param::grouped_mm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor ends, Tensor? sizes, bool transposed) -> Tensor",
)
def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor, sizes: Tensor | None, transposed: bool) -> Tensor:
    """Rows of each expert times its weight, (experts, out, in) or, transposed, (experts, in, out).

    Rows behind the last end are not computed: what they hold is undefined.
    """
    x, weight = x.contiguous(), weight.contiguous()
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[2 if transposed else 1])
    if sizes is not None:
        return _grouped_gemm().gmm(x, weight, sizes, trans_a=False, trans_b=not transposed)
    _check_alignment(weight)
    return _torch_grouped_mm(x, weight if transposed else weight.transpose(1, 2), ends)


@torch.library.custom_op(
    "moe_param::grouped_outer",
    mutates_args=(),
    schema="(Tensor a, Tensor b, Tensor ends, Tensor? sizes) -> Tensor",
)
def grouped_outer(a: Tensor, b: Tensor, ends: Tensor, sizes: Tensor | None) -> Tensor:
    """(S, A), (S, B) to (experts, A, B): aᵀb over the rows of each expert; exactly zero where it has none."""
    a, b = a.contiguous(), b.contiguous()
    if a.shape[0] == 0:
        return a.new_zeros(ends.shape[0], a.shape[1], b.shape[1])
    if sizes is not None:
        result = _grouped_gemm().gmm(a, b, sizes, trans_a=True, trans_b=False)
    else:
        result = _torch_grouped_mm(a.t(), b, ends)
    # Both can leave what the allocator gave: grouped_gemm built with cuBLAS (tgale96/grouped_gemm#36), and torch on
    # Blackwell (pytorch/pytorch#172439).
    return _kernels_for(a, a.shape[0]).zero_empty(result, ends)


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, sizes: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


@grouped_outer.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor, sizes: Tensor | None) -> Tensor:
    return a.new_empty(ends.shape[0], a.shape[1], b.shape[1])


def _save_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ends, sizes, ctx.transposed = inputs
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None, ends, sizes
    )


def _mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends, sizes = ctx.saved_tensors
    x_grad = weight_grad = None
    if ctx.needs_input_grad[0]:
        x_grad = grouped_mm(grad, weight, ends, sizes, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        weight_grad = grouped_outer(*((x, grad) if ctx.transposed else (grad, x)), ends, sizes)
    return x_grad, weight_grad, None, None, None


def _save_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, ends, sizes = ctx.saved_tensors
    a_grad = grouped_mm(b, grad, ends, sizes, False) if ctx.needs_input_grad[0] else None
    b_grad = grouped_mm(a, grad, ends, sizes, True) if ctx.needs_input_grad[1] else None
    return a_grad, b_grad, None, None


grouped_mm.register_autograd(_mm_backward, setup_context=_save_mm)
grouped_outer.register_autograd(_outer_backward, setup_context=_save_outer)


def _torch_grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    # public since torch 2.10
    return getattr(nn.functional, "grouped_mm", torch._grouped_mm)(a, b, offs=ends)


def _check_alignment(weight: Tensor) -> None:
    multiple = 16 // weight.element_size()
    if weight.shape[1] % multiple or weight.shape[2] % multiple:
        raise ValueError(
            f"torch's grouped_mm needs widths that are multiples of 16 bytes, {multiple} in {_name(weight.dtype)}: the "
            f"experts' weights are {tuple(weight.shape)}. Choose such a width and expert size, or another "
            "experts_implementation"
        )


def _grouped_gemm() -> ModuleType:
    from grouped_gemm import backend

    return backend


_host_sizes: bool | None = None


@torch.compiler.assume_constant_result
def _wants_host_sizes() -> bool:
    """Whether this build of grouped_gemm reads the group sizes on the host (cuBLAS) or on the GPU (CUTLASS)."""
    global _host_sizes
    if _host_sizes is None:
        x = torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda")
        try:
            _grouped_gemm().gmm(x, x[None], torch.tensor([16], device="cuda"))
            _host_sizes = False
        except RuntimeError as error:
            if "is_cpu" not in str(error):
                raise
            _host_sizes = True
    return _host_sizes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- the layer -------------------------------------------------------------------------------------------------------
def megablocks_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of an experts module's forward; the contract is its `grouped_mm`'s."""
    top_k = top_k_index.shape[-1]
    up, up_bias = ("gate_up_proj", "gate_up_proj_bias") if self.has_gate else ("up_proj", "up_proj_bias")
    # Grouped matmuls are not on autocast's list: do what it does to the matmuls of the eager implementation.
    device = hidden_states.device
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else getattr(self, up).dtype
    for what, found in ((up, dtype), ("the router's weights", top_k_weights.dtype)):
        if found not in _DTYPES:
            raise TypeError(
                f"experts_implementation='megablocks' computes in {', '.join(map(_name, _DTYPES))}; {what} of "
                f"{type(self).__name__}: {_name(found)}"
            )

    # Sorted by expert. Expert-parallel sentinels (expert number num_experts: on another rank) end up behind all bins.
    expert_ids, order = torch.sort(top_k_index.reshape(-1).int())
    experts = torch.arange(self.num_experts, dtype=torch.int32, device=device)
    ends = torch.searchsorted(expert_ids, experts, right=True, out_int32=True)
    sizes = None
    if gmm_provider(device, dtype, _choice) == "grouped_gemm":
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).long()
        sizes = sizes.cpu() if _wants_host_sizes() else sizes
    # Their rows are not computed, hence undefined, and must reach neither a sum nor a gradient.
    elsewhere = None
    if getattr(self, "_is_expert_parallel", True):  # older transformers do not say
        elsewhere = (expert_ids >= self.num_experts).unsqueeze(-1)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = grouped_mm(x, weight.to(dtype), ends, sizes, self.is_transposed)
        if bias is not None:
            rows = expert_ids if elsewhere is None else expert_ids.clamp(max=self.num_experts - 1)
            out = out.add_(bias.to(dtype)[rows])
        return out if elsewhere is None else out.masked_fill(elsewhere, 0.0)

    x = gather(hidden_states.to(dtype), order, expert_ids, None, ends, top_k)
    if elsewhere is not None:
        x = x.masked_fill(elsewhere, 0.0)  # for its gradient
    x = linear(x, getattr(self, up), getattr(self, up_bias) if self.has_bias else None)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = linear(x.to(dtype), self.down_proj, self.down_proj_bias if self.has_bias else None)
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    x = scatter(x, order, expert_ids, top_k_weights.reshape(-1), ends, top_k)
    return x.to(hidden_states.dtype)
