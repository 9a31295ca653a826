"""The "megablocks" experts with MegaBlocks' real Triton kernels, run by Triton's interpreter on the CPU.

`TRITON_INTERPRET=1 python -m tests.experts.interpreted OUT.json [CHECK …]` runs the checks;
tests/experts/test_experts.py does, and asks for the results. In a process of its own, because Triton decides on
import whether it interprets. Interpreting costs some 20 ms per row (token and expert), hence the sizes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import moe_param
from moe_param.experts import megablocks as experts

T, H, I, E, K = 4, 16, 8, 5, 2
TOLERANCE = 1e-6  # relative to the largest element, float32

NUMBERS: dict[str, float] = {}
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


# -- two ways to compute the same thing ------------------------------------------------------------------------------
class Eager(nn.Module):
    """Experts in plain loops: the reference for the layouts that no family has."""

    has_post_expert_norm = False

    def __init__(self, config: Any):
        super().__init__()
        self.num_experts, self.width, self.size = config.sizes
        self.act_fn = nn.functional.silu

    def build(self) -> Eager:
        experts, up_size = self.num_experts, 2 * self.size if self.has_gate else self.size

        def weight(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(experts, *((columns, rows) if self.is_transposed else (rows, columns))))

        up = "gate_up_proj" if self.has_gate else "up_proj"
        setattr(self, up, weight(up_size, self.width))
        self.down_proj = weight(self.width, self.size)
        if self.has_bias:
            setattr(self, f"{up}_bias", nn.Parameter(torch.empty(experts, up_size)))
            self.down_proj_bias = nn.Parameter(torch.empty(experts, self.width))
        if self.has_post_expert_norm:
            self.post_expert_norm = nn.RMSNorm(self.width)
        return randomize(self)

    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1) if self.is_concatenated else (x[..., ::2], x[..., 1::2])
        return self.act_fn(gate) * up

    def forward(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        up = "gate_up_proj" if self.has_gate else "up_proj"
        rows = []
        for token, chosen, shares in zip(x, indices.tolist(), weights):
            row = torch.zeros_like(token)
            for expert, share in zip(chosen, shares):
                if expert < self.num_experts:
                    y = self.linear(token, up, expert)
                    y = self.linear(self._apply_gate(y) if self.has_gate else self.act_fn(y), "down_proj", expert)
                    row = row + share * (self.post_expert_norm(y) if self.has_post_expert_norm else y)
            rows.append(row)
        return torch.stack(rows)

    def linear(self, x: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        weight = getattr(self, name)[expert]
        y = x @ weight if self.is_transposed else weight @ x
        return y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y


def randomize(module: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.dim() < 3 else p.shape[2] ** -0.5))
    return module


def synthetic(sizes: tuple[int, int, int] = (E, H, I), **layout: bool) -> Any:
    """Experts of a layout, as far as the installed transformers has it; sizes: experts, width, expert size."""
    known = inspect.signature(use_experts_implementation).parameters
    layout = {name: value for name, value in layout.items() if name in known}
    cls = use_experts_implementation(type("Experts", (Eager,), {}), **layout)
    return cls(SimpleNamespace(_experts_implementation="eager", sizes=sizes)).build()


def inputs(
    module: Any, tokens: int = T, top_k: int = K, seed: int = 0, width: int = H, free: tuple[int, ...] = (1,)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens and routing, with no token for the experts in `free`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    scores = torch.rand(tokens, module.num_experts, generator=generator)
    scores[:, list(free)] = -1
    weights, indices = scores.topk(top_k)
    return x, indices, weights


def run(
    module: Any,
    implementation: str,
    x: Any,
    indices: Any,
    weights: Any,
    call: Callable[..., torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The output and every gradient, of `call` if that is not the module itself."""
    module.config._experts_implementation = implementation
    module.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = (module if call is None else call)(x, indices, weights)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out))
    return {
        "output": out.detach(),
        "hidden states": x.grad,
        "router weights": weights.grad,
        **{n: full(p.grad).clone() for n, p in module.named_parameters()},
    }


def full(grad: Any) -> torch.Tensor:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        scale = value.double().abs().max().clamp_min(1e-30)
        worst = max(worst, ((found[name].double() - value.double()).abs().max() / scale).item())
        assert math.isfinite(worst), name
    return worst


def compare(what: str, module: Any, *batch: Any, tolerance: float = TOLERANCE) -> dict[str, torch.Tensor]:
    found = run(module, "megablocks", *batch)
    worst = difference(found, run(module, "eager", *batch))
    NUMBERS[what] = max(NUMBERS.get(what, 0.0), worst)
    assert worst <= tolerance, f"{what}: {worst}"
    return found


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Everything that the grouped matmuls of a GPU leave undefined is NaN."""
    real = experts._torch_grouped_mm

    def poisoned(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        out = real(a, b, ends)
        if out.dim() == 2:
            out[ends[-1] :] = math.nan
        else:
            out[torch.diff(ends, prepend=ends.new_zeros(1)) == 0] = math.nan
        return out

    experts._torch_grouped_mm = poisoned  # type: ignore[assignment]
    try:
        yield
    finally:
        experts._torch_grouped_mm = real


# -- the checks ------------------------------------------------------------------------------------------------------
@check
def every_layout() -> None:
    """Gated or not, transposed or not, biases, interleaved, norms: all 32."""
    names = ("has_gate", "is_transposed", "has_bias", "is_concatenated", "has_post_expert_norm")
    for flags in itertools.product((True, False), repeat=5):
        module = synthetic(**dict(zip(names, flags)))
        with poison():
            found = compare("32 layouts", module, *inputs(module, 3))
        for name, grad in found.items():
            if name not in ("output", "hidden states", "router weights", "post_expert_norm.weight"):
                assert not grad[1].any() and grad[0].any(), name  # nobody chose expert 1


@check
def every_family() -> None:
    """The experts classes of transformers against their own eager forward."""
    from tests.models import INTERFACE, tiny_config

    arguments = {"ernie4_5_vl_moe": (24,)}  # one of two expert groups: its size is an argument
    for family, entry in INTERFACE.items():
        modeling = importlib.import_module(entry["module"])
        config = tiny_config(family).get_text_config()
        classes = [c for c in vars(modeling).values() if inspect.isclass(c) and hasattr(c, "_apply_gate")]
        assert classes, family
        for cls in classes:
            module = randomize(cls(config, *arguments.get(family, ())))
            weight = module.down_proj
            x, indices, weights = inputs(module, 2, width=weight.shape[2 if module.is_transposed else 1])
            compare("experts of all families", module, x, indices, weights)
    NUMBERS["families"] = len(INTERFACE)


@check
def shapes_and_sentinels() -> None:
    module = synthetic(has_bias=True)
    for tokens, top_k in ((1, 1), (7, 1), (3, E), (1, 3)):
        compare("k = 1, k = E, one token", module, *inputs(module, tokens, top_k, free=() if top_k == E else (1,)))
    only = torch.full((T, 1), 3)
    compare("all tokens to one expert", module, torch.randn(T, H), only, torch.rand(T, 1))
    x, indices, weights = inputs(module, top_k=1)
    compare("strided router weights", module, x, indices, torch.rand(T, 2)[:, :1])
    module.zero_grad()
    module.config._experts_implementation = "megablocks"
    x, weights = torch.empty(0, H, requires_grad=True), torch.empty(0, K, requires_grad=True)
    out = module(x, torch.empty(0, K, dtype=torch.long), weights)
    out.sum().backward()
    assert out.shape == (0, H) and x.grad.shape == (0, H)
    assert all(not p.grad.any() for p in module.parameters())  # zero, and there: collectives wait for each of them

    for layout in ({}, {"has_bias": True, "is_transposed": True}, {"has_gate": False, "has_post_expert_norm": True}):
        module = synthetic(**layout)
        module._is_expert_parallel = True
        x, indices, weights = inputs(module)
        indices[::2, 1] = E  # on another rank
        indices[1] = E
        weights = weights.masked_fill(indices == E, 0.0)
        with poison():
            found = compare("expert-parallel sentinels", module, x, indices, weights)
        assert not found["router weights"][indices == E].any() and not found["output"][1].any()


@check
def empty_experts_are_zeroed() -> None:
    """And would not be without our kernel: what the GEMM left there was NaN."""
    a, b, ends = torch.randn(4, 8), torch.randn(4, 16), torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    with poison():
        raw = experts._torch_grouped_mm(a.t(), b, ends)
        found = experts.grouped_outer(a, b, ends, None)
    assert [bool(g.isnan().all()) for g in raw] == [True, False, True, False]
    assert not found[0].any() and not found[2].any()
    torch.testing.assert_close(found[1], a[:3].t() @ b[:3])
    large = torch.full((3, 100, 200), math.nan)  # more than one block per expert
    zeroed = experts._load_kernels().zero_empty(large, torch.tensor([2, 2, 5], dtype=torch.int32))
    assert zeroed[0].isnan().all() and not zeroed[1].any() and zeroed[2].isnan().all()


@check
def dtypes() -> None:
    """Half precision, router weights in float32: their gradient stays in float32. The interpreter truncates bf16."""
    for dtype in (torch.float16, torch.bfloat16):
        module = synthetic(has_bias=True)
        x, indices, weights = inputs(module)
        expected = run(module, "eager", x, indices, weights)
        module.to(dtype)
        found = run(module, "megablocks", x.to(dtype), indices, weights)
        assert found.pop("router weights").dtype == torch.float32
        expected.pop("router weights")
        assert {t.dtype for t in found.values()} == {dtype}
        worst = difference({n: t.float() for n, t in found.items()}, expected)
        NUMBERS[f"{dtype} against float32"] = worst
        assert worst < (0.01 if dtype == torch.float16 else 0.05), worst


@check
def autocast() -> None:
    """float32 weights under bf16 autocast: matmuls in bf16, as the eager ones, gradients and output in float32."""
    module = synthetic()
    x, indices, weights = inputs(module)
    exact = run(module, "eager", x, indices, weights)
    seen = []
    real = experts._torch_grouped_mm
    experts._torch_grouped_mm = lambda a, b, ends: seen.append(a.dtype) or real(a, b, ends)  # type: ignore
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = run(module, "megablocks", x, indices, weights)
        assert set(seen) == {torch.bfloat16}
        seen.clear()
        run(module, "megablocks", x, indices, weights)
        assert set(seen) == {torch.float32}
    finally:
        experts._torch_grouped_mm = real
    worst = difference(found, exact)
    NUMBERS["bf16 autocast against float32"] = worst
    assert 1e-4 < worst < 0.05, worst


@check
def operators() -> None:
    """`torch.library.opcheck`: schema, fake tensors, autograd registration, dynamic shapes."""
    indices, bins = torch.tensor([3, 0, 5, 1, 2, 4]), torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    ids = torch.tensor([0, 0, 2, 2, 2, 3], dtype=torch.int32)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=True)

    for weights in (None, leaf(6)):
        torch.library.opcheck(experts.gather, (leaf(3, H), indices, ids, weights, bins, 2))
        torch.library.opcheck(experts.scatter, (leaf(6, H), indices, ids, weights, bins, 2))
    torch.library.opcheck(experts.scatter_wgrad, (leaf(6, H), leaf(3, H), indices, ids, bins, 2, torch.float32))
    for transposed in (False, True):
        weight = leaf(4, H, 8) if transposed else leaf(4, 8, H)
        torch.library.opcheck(experts.grouped_mm, (leaf(6, H), weight, bins, None, transposed))
    torch.library.opcheck(experts.grouped_outer, (leaf(6, H), leaf(6, 8), bins, None))


@check
def second_derivatives() -> None:
    module = synthetic()
    x, indices, weights = inputs(module, 3)

    def penalty(implementation: str) -> list[torch.Tensor]:
        module.config._experts_implementation = implementation
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_(), *module.parameters()]
        out = module(leaves[0], indices, leaves[1])
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))

    for found, expected in zip(penalty("megablocks"), penalty("eager")):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@check
def compiles_in_one_graph() -> None:
    """Also with the number of tokens unknown. A break in the graph raises: fullgraph."""
    for layout, dynamic in (({"has_bias": True}, False), ({"has_gate": False, "is_transposed": True}, True)):
        module = synthetic(**layout)
        module._is_expert_parallel = True
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for tokens in (T, T - 1) if dynamic else (T,):
            batch = inputs(module, tokens)
            expected = run(module, "megablocks", *batch)
            assert difference(run(module, "megablocks", *batch, compiled), expected) <= TOLERANCE
    torch._dynamo.reset()


@check
def checkpointing() -> None:
    module = synthetic(has_bias=True)
    batch = inputs(module)
    expected = run(module, "megablocks", *batch)
    for reentrant in (False, True):
        call = functools.partial(torch.utils.checkpoint.checkpoint, module, use_reentrant=reentrant)
        assert difference(run(module, "megablocks", *batch, call), expected) == 0


@check
def sharded() -> None:
    """FSDP2 and DDP, over a group of one process: the hooks, views and dtypes are those of many."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        batch = inputs(synthetic())
        expected = run(synthetic(), "megablocks", *batch)
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = fully_shard(synthetic(), mesh=mesh)
        assert difference(run(sharded, "megablocks", *batch), expected) <= TOLERANCE
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        found = run(fully_shard(synthetic(), mesh=mesh, mp_policy=policy), "megablocks", *batch)
        assert difference({n: t.float() for n, t in found.items()}, expected) < 0.05
        module = synthetic()
        found = run(module, "megablocks", *batch, DistributedDataParallel(module))
        assert difference(found, expected) == 0
    finally:
        torch.distributed.destroy_process_group()


@check
def models_train_the_same() -> None:
    """Real models, from the name of the implementation to the loss after some steps of AdamW."""
    from tests.models import INTERFACE, build, tiny_config, tokens

    for family in {"olmoe", "mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"} & INTERFACE.keys():
        losses: dict[str, list[float]] = {}
        for implementation in ("eager", "megablocks"):
            model = build(family, tiny_config(family, experts_implementation=implementation))
            assert model.config._experts_implementation == implementation
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
            for _ in range(3):
                batch = tokens(batch=1, length=4, seed=0)
                loss = model(input_ids=batch, labels=batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.setdefault(implementation, []).append(loss.item())
        eager, ours = losses["eager"], losses["megablocks"]
        worst = max(abs(a - b) for a, b in zip(eager, ours))
        NUMBERS["losses of 5 models"] = max(NUMBERS.get("losses of 5 models", 0.0), worst)
        assert worst <= 1e-4 and eager[-1] < eager[0], (family, losses)


@check
def names_work_everywhere() -> None:
    """What was imported before transformers registered us: constructors, setters and the config take the name."""
    assert ALL_EXPERTS_FUNCTIONS["megablocks"] is experts.megablocks_experts_forward
    assert not any(type(finder).__module__ == "moe_param.experts.registration" for finder in sys.meta_path)
    config = transformers.MixtralConfig(
        vocab_size=16, hidden_size=H, intermediate_size=I, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="megablocks")
    assert model.config._experts_implementation == "megablocks"
    ids = torch.arange(4)[None]
    ours = model(ids).logits
    model.set_experts_implementation("eager")
    assert (model(ids).logits - ours).abs().max() < 1e-6
    model.set_experts_implementation("megablocks")
    generated = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert generated.shape == (1, 6)
    p = moe_param.apply(model, config, seed=0, experts="auto")  # on a CPU it leaves what is there
    assert p.rules and model.config._experts_implementation == "megablocks"
    assert moe_param.apply(model, config, seed=0, reinit=False, experts="megablocks").rules == p.rules


@check
def limits_are_said() -> None:
    module = synthetic()
    batch = inputs(module)

    def refused(error: type[Exception], words: str, *changed: Any) -> None:
        try:
            run(module, "megablocks", *(changed or batch))
        except error as raised:
            assert words in str(raised), raised
        else:
            raise AssertionError(f"no {error.__name__} with {words!r}")

    x = torch.empty(0, 2**16)
    experts._kernels_for(x, 2**15 - 1)
    try:
        experts._kernels_for(x, 2**15)
    except ValueError as error:
        assert "2^31" in str(error) and "32768·65536" in str(error)
    else:
        raise AssertionError("no overflow guard")
    refused(TypeError, "router's weights of Experts: float64", batch[0], batch[1], batch[2].double())
    before = experts.use_gmm("grouped_gemm")
    try:
        assert before == "auto"
        refused(ValueError, "grouped_gemm multiplies bfloat16 on CUDA only, not float32 on cpu")
    finally:
        experts.use_gmm(before)
    module.double()
    refused(TypeError, "gate_up_proj of Experts: float64", batch[0].double(), *batch[1:])
    module.float()
    module.gate_up_proj = nn.Parameter(torch.randn(E, 2 * I, H + 2))
    refused(ValueError, "multiples of 16 bytes, 4 in float32", torch.randn(T, H + 2), *batch[1:])


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results: dict[str, str | None] = {}
    seconds: dict[str, float] = {}
    chosen = sys.argv[2:] or list(CHECKS)
    for name in chosen:
        start = time.process_time()
        try:
            CHECKS[name]()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        seconds[name] = round(time.process_time() - start, 2)
    Path(sys.argv[1]).write_text(json.dumps({"results": results, "numbers": NUMBERS, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
