"""What an experts layer costs, forward and backward: "megablocks" against transformers' own implementations,
MegaBlocks' layer, and a dense MLP of the same FLOPs.

    python -m recipes.bench.experts --out experts.json     # the default grid of the device; a picture beside it
    python -m recipes.bench.experts --shapes E128k8F768H2048 --tokens 8192 32768 --routing balanced
    python -m recipes.bench.experts --out experts.json --resume        # what an interrupted run has not measured yet

A shape is E experts, k of them per token, expert size F, width H. All implementations of a case take turns, on the same
weights and tokens where they share a layout. Whatever cannot run is in the report with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_param.experts import megablocks as experts
from moe_param.training.report import hardware, versions
from recipes.bench.goals import COARSE, GOALS, LARGE, held
from recipes.bench.overhead import compare, ratio
from recipes.bench.report import bench_report

DESCRIPTION = "Forward and backward of an experts layer: megablocks against the others and a dense MLP of equal FLOPs."
# From the paper (two sparsities), fine-grained ones (the last is Qwen3-30B-A3B's), and Mixtral's.
GRID = {
    "cuda": "E4k1F2048H512 E8k2F4096H1024 E16k4F8192H2048 E12k1F2048H512 E24k2F4096H1024 E48k4F8192H2048 "
    "E64k8F1024H2048 E128k8F768H2048 E8k2F14336H4096",
    "cpu": "E4k1F512H128 E8k2F512H128 E48k4F256H128 E128k8F64H128",
}
TOKENS = {"cuda": [4096, 32768], "cpu": [64, 512]}
ROUTINGS = ("balanced", "skewed")
DENSE, EAGER, OURS = "dense", "eager", "megablocks"
NOISE = "dense again"  # what two equal things differ by


# -- a case ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    tokens: int
    num_experts: int
    top_k: int
    expert_size: int
    width: int
    routing: str

    @property
    def shape(self) -> str:
        return f"E{self.num_experts}k{self.top_k}F{self.expert_size}H{self.width}"

    @property
    def flops(self) -> int:
        """Of the matrix products of forward and backward: three matrices (gate, up, down) for each of the top_k
        experts of a token, a multiplication and an addition an element; backward twice that."""
        return 3 * (2 * 3 * self.tokens * self.top_k * self.expert_size * self.width)


def parse_shape(text: str) -> tuple[int, int, int, int]:
    found = re.fullmatch(r"E(\d+)k(\d+)F(\d+)H(\d+)", text)
    sizes = tuple(int(size) for size in found.groups()) if found else ()
    if not sizes or min(sizes) < 1 or sizes[1] > sizes[0]:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: expected E experts, k of them active, expert size F, width H, as E128k8F768H2048"
        )
    return sizes  # type: ignore[return-value]


def route(case: Case, generator: torch.Generator) -> Tensor:
    """(tokens, top_k), distinct experts for each token. Balanced: each expert equally often, up to one. Skewed: the
    r-th expert 1/r as likely (Zipf), by the Gumbel trick."""
    if case.routing == "balanced":
        index = torch.arange(case.tokens * case.top_k).view(case.tokens, case.top_k) % case.num_experts
        return index[torch.randperm(case.tokens, generator=generator)]
    uniform = torch.rand(case.tokens, case.num_experts, generator=generator).clamp_min(1e-12)
    scores = -torch.log(torch.arange(1, case.num_experts + 1.0)) - torch.log(-torch.log(uniform))
    return scores.topk(case.top_k).indices


class Layer:
    """Weights, tokens and routing of a case."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        generator = torch.Generator().manual_seed(0)
        self.config = MixtralConfig(
            hidden_size=case.width,
            intermediate_size=case.expert_size,
            num_local_experts=case.num_experts,
            num_experts_per_tok=case.top_k,
        )
        with torch.device(device):
            self.module = MixtralExperts(self.config).to(dtype)
            for parameter in self.module.parameters():
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            self.x = torch.randn(case.tokens, case.width, dtype=dtype).requires_grad_()
            self.grad = torch.randn(case.tokens, case.width, dtype=dtype)
        self.index = route(case, generator).to(device)
        weights = torch.rand(case.tokens, case.top_k, generator=generator) + 0.5
        self.weights = (weights / weights.sum(1, keepdim=True)).to(device, dtype).requires_grad_()


# -- the implementations ---------------------------------------------------------------------------------------------
class NotHere(Exception):
    """This implementation cannot run the case; the message says why."""


Forward = Callable[[], Tensor]
Build = Callable[[Layer], tuple[Forward, list[nn.Parameter]]]


def from_transformers(implementation: str, provider: str | None = None) -> Build:
    """One that transformers dispatches to; the same module and weights for all of them."""

    def build(layer: Layer) -> tuple[Forward, list[nn.Parameter]]:
        if implementation == "batched_mm":
            _check_memory(layer)
        if implementation == "sonicmoe":
            from transformers.integrations.sonicmoe import is_sonicmoe_loadable

            is_sonicmoe_loadable(raise_error=True)
        if provider is not None:
            experts.check_available()
            if not experts.is_available(layer.device):
                raise NotHere(f"MegaBlocks' kernels run on CUDA, not on {layer.device}")
            experts.gmm_provider(torch.device(layer.device), layer.dtype, provider)

        def forward() -> Tensor:
            layer.config._experts_implementation = implementation
            before = experts.use_gmm(provider) if provider else None
            out = layer.module(layer.x, layer.index, layer.weights)
            if before:
                experts.use_gmm(before)
            return out

        return forward, list(layer.module.parameters())

    return build


def _check_memory(layer: Layer) -> None:
    """batched_mm copies the weights once per token and chosen expert, and so does its backward pass."""
    case = layer.case
    needed = 2 * 3 * case.tokens * case.top_k * case.expert_size * case.width * layer.dtype.itemsize
    if layer.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free / 4:  # others want some too
        raise NotHere(f"copies the weights once per token: {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")


def dense(layer: Layer) -> tuple[Forward, list[nn.Parameter]]:
    """The ceiling: a gated MLP of size top_k·expert_size, so of the same FLOPs for every token. No router weights."""
    size = layer.case.top_k * layer.case.expert_size
    with torch.device(layer.device):
        up: Any = nn.Linear(layer.case.width, 2 * size, bias=False, dtype=layer.dtype)
        down: Any = nn.Linear(size, layer.case.width, bias=False, dtype=layer.dtype)

    def forward() -> Tensor:
        gate, x = up(layer.x).chunk(2, dim=-1)
        return down(nn.functional.silu(gate) * x)

    return forward, [up.weight, down.weight]


def dmoe(layer: Layer) -> tuple[Forward, list[nn.Parameter]]:
    """MegaBlocks' own dropless layer (grouped; its block-sparse one refuses current Triton), behind its router."""
    if layer.device != "cuda" or layer.dtype != torch.bfloat16:
        raise NotHere(f"its grouped_gemm multiplies bfloat16 on CUDA only, not {layer.dtype} on {layer.device}")
    from megablocks import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    case = layer.case
    arguments = Arguments(
        hidden_size=case.width,
        ffn_hidden_size=case.expert_size,
        moe_num_experts=case.num_experts,
        moe_top_k=case.top_k,
        moe_loss_weight=0.0,
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=nn.functional.silu,
        bias=False,
        fp16=False,
        bf16=True,
        device=torch.device(layer.device),
    )
    module: Any = ParallelDroplessMLP(arguments)
    with torch.no_grad():
        experts: Any = layer.module
        gate, up = experts.gate_up_proj.chunk(2, dim=1)  # (E, F, H) each
        module.mlp.w1.copy_(gate.reshape(-1, case.width))
        module.mlp.v1.copy_(up.reshape(-1, case.width))
        module.mlp.w2.copy_(experts.down_proj.transpose(1, 2).reshape(-1, case.width))

    def forward() -> Tensor:
        return module(layer.x, None, layer.weights, layer.index)

    return forward, [module.mlp.w1, module.mlp.v1, module.mlp.w2]


BUILDERS: dict[str, Build] = {
    "megablocks (torch)": from_transformers(OURS, "torch"),
    "megablocks (grouped_gemm)": from_transformers(OURS, "grouped_gemm"),
    EAGER: from_transformers(EAGER),
    "batched_mm": from_transformers("batched_mm"),
    "grouped_mm": from_transformers("grouped_mm"),
    "sonicmoe": from_transformers("sonicmoe"),
    "dMoE": dmoe,
    DENSE: dense,
}


# -- measuring -------------------------------------------------------------------------------------------------------
def bench(case: Case, device: str, dtype: torch.dtype, rounds: int, without: Collection[str] = ()) -> dict[str, Any]:
    layer = Layer(case, device, dtype)
    steps: dict[str, Callable[[], None]] = {}
    details: dict[str, dict[str, Any]] = {}
    not_run: dict[str, str] = {}
    expected: Tensor | None = None
    for name in (EAGER, *(name for name in BUILDERS if name != EAGER)):  # eager first: what the others must compute
        try:
            if name in without:
                raise NotHere("left out by --without")
            forward, parameters = BUILDERS[name](layer)
            out = forward().detach()  # tunes, allocates, compiles
            expected = out if name == EAGER else expected
            error = _distance(out, expected) if name not in (EAGER, DENSE) and expected is not None else None
            if error is not None and not error < (2e-2 if dtype.itemsize == 2 else 1e-4):
                raise NotHere(f"its result is off eager's by {error:.1e} of the norm")

            def step(forward: Forward = forward, parameters: list[nn.Parameter] = parameters) -> None:
                variables = [layer.x, layer.weights, *parameters]
                torch.autograd.grad(forward(), variables, layer.grad, allow_unused=True)  # dense has no router

            step()
            peak = peak_memory(step, device)
        except Exception as reason:  # whatever third-party kernels raise: it belongs in the report
            not_run[name] = _first_sentence(reason)
            _check_device(device, name, case)
            continue
        steps[name] = step
        details[name] = {"error": error, "peak_mib": round(peak / 2**20, 2)}

    runs = {**steps, **({NOISE: steps[DENSE]} if DENSE in steps else {})}
    measure = {name: partial(timed, step, device) for name, step in runs.items()}
    compare(measure, 1)
    seconds = compare(measure, rounds)
    for name in steps:
        middle = statistics.median(seconds[name])
        details[name] = {
            "seconds": float(f"{middle:.4g}"),
            "tflops": float(f"{case.flops / middle / 1e12:.4g}"),
            **details[name],
            **{f"over_{other}": ratio(seconds, name, other)["ratio"] for other in (EAGER, DENSE) if other in steps},
        }
    load = torch.bincount(layer.index.flatten().cpu(), minlength=case.num_experts)
    return {
        **asdict(case),
        "shape": case.shape,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "flops": case.flops,
        "busiest_expert": round(load.max().item() / load.float().mean().item(), 2),  # in fair shares
        "empty_experts": int((load == 0).sum()),
        "implementations": details,
        "not_run": not_run,
        "fastest": min((name for name in details if name != DENSE), key=lambda n: details[n]["seconds"], default=None),
        "noise": ratio(seconds, NOISE, DENSE)["ratio"] if DENSE in steps else None,
        "goals": goals(case, seconds, device, dtype),
    }


def _check_device(device: str, name: str, case: Case) -> None:
    """After an illegal access nothing runs on CUDA any more in this process: that is not the others' failure."""
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise SystemExit(
            f"{name} left CUDA unusable ({_first_sentence(error)}) in {case.shape}, {case.tokens} tokens, "
            f"{case.routing}. What was measured before is in --out; go on with --resume --without '{name}'"
        ) from error


def goals(case: Case, seconds: dict[str, list[float]], device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What "megablocks", with the provider that `auto` takes, is held against; empty where it does not run."""
    ours = f"{OURS} ({experts.gmm_provider(torch.device(device), dtype, 'auto')})"
    if ours not in seconds:
        return []
    others = [name for name in seconds if not name.startswith((OURS, DENSE))]
    pairs = {"eager": (EAGER, ours)}
    if others:
        pairs["fastest other"] = min(others, key=lambda name: statistics.median(seconds[name])), ours
    if case.tokens >= LARGE and case.expert_size >= COARSE:
        pairs["dense"] = ours, DENSE
    where = f"{case.shape}, {case.tokens} tokens, {case.routing}"
    found = {name: ratio(seconds, *pair) for name, pair in pairs.items() if set(pair) <= set(seconds)}
    return [held(name, value.pop("ratio"), where=where, **value) for name, value in found.items()]


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds of one forward and backward; on CUDA the mean of a few, so that starting the first is not counted in."""
    repeats, wait = 3 if device == "cuda" else 1, torch.get_device_module(device).synchronize
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return (time.perf_counter() - start) / repeats


def peak_memory(step: Callable[[], None], device: str) -> int:
    """Bytes in use at the worst moment, over those before (weights and tokens), gradients counted in."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    events = [event for event in run.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler tells the standard error stream, past Python's, that it starts and stops."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def _first_sentence(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].split(". ")[0] or "no message"
    return text if isinstance(error, NotHere | ImportError) else f"{type(error).__name__}: {text}"


# -- the report ------------------------------------------------------------------------------------------------------
def providers(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Which provider "auto" should take on this GPU: geometric mean of torch's time over grouped_gemm's."""
    names = [f"{OURS} ({provider})" for provider in experts.GMM_PROVIDERS]
    both = [r["implementations"] for r in results if all(name in r["implementations"] for name in names)]
    if not both:
        return None
    mean = statistics.geometric_mean(of[names[0]]["seconds"] / of[names[1]]["seconds"] for of in both)
    capability, fastest = tuple(torch.cuda.get_device_capability()), experts.GMM_PROVIDERS[int(mean > 1)]
    return {
        "name": "provider",
        "line": f"moe_param.experts.megablocks.FASTEST[{capability}] = {fastest!r}",
        "fastest": fastest,
        "torch_over_grouped_gemm": round(mean, 4),
        "cases": len(both),
    }


def print_tables(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    names = [name for name in BUILDERS if any(name in result["implementations"] for result in results)]

    def table(title: str, columns: list[str], cell: Callable[[dict[str, Any]], str]) -> None:
        table = Table(title=title, box=None)
        for header in ("shape", "tokens", "routing", *columns):
            table.add_column(header, justify="left" if header in ("shape", "routing") else "right")
        for result in results:
            values = []
            for name in columns:
                text = cell(found) if (found := result["implementations"].get(name)) else "-"
                values.append(f"[bold]{text}[/bold]" if name == result["fastest"] else text)
            table.add_row(result["shape"], str(result["tokens"]), result["routing"], *values)
        console.print(table)

    routed = [name for name in names if name != DENSE]
    table("time / dense MLP of the same FLOPs", routed, lambda found: f"{found.get('over_dense', math.nan):.2f}")
    table("TFLOP/s", names, lambda found: f"{found['tflops']:.3g}")
    table("peak memory, MiB", names, lambda found: f"{found['peak_mib']:.0f}")
    reasons = Counter(item for result in results for item in result["not_run"].items())
    for (name, reason), count in reasons.items():
        print(f"not run: {name}, {count} of {len(results)} cases: {reason}")
    for result in results:
        for goal in result["goals"]:
            if not goal["met"]:
                what = GOALS[goal["goal"]]
                print(f"goal missed: {what.what}: {goal['value']}, not {what.text}: {goal['where']}")


def plot(results: list[dict[str, Any]], picture: Path, title: str) -> None:
    from matplotlib.figure import Figure

    names = [name for name in BUILDERS if any(name in result["implementations"] for result in results)]
    routings = list(dict.fromkeys(result["routing"] for result in results))
    figure = Figure(figsize=(1 + 0.7 * len(results), 4.8), layout="constrained")
    for axes, routing in zip(figure.subplots(1, len(routings), sharey=True, squeeze=False)[0], routings):
        part = [result for result in results if result["routing"] == routing]
        labels = [f"{result['shape']}\n{result['tokens']} tokens" for result in part]
        for name in names:
            values = [result["implementations"].get(name, {}).get("tflops", math.nan) for result in part]
            style = (
                {"color": "black", "markersize": 20} if name == DENSE else {"color": f"C{list(BUILDERS).index(name)}"}
            )
            marker = "ov^Ds<>_"[list(BUILDERS).index(name)]
            axes.plot(range(len(part)), values, marker=marker, label=name, linestyle="", **style)
        axes.set_xticks(range(len(part)), labels, rotation=60, ha="right", fontsize=7)
        axes.set(title=f"{routing} routing", yscale="log")
        axes.grid(axis="y", which="both", alpha=0.3)
    figure.axes[0].set_ylabel("TFLOP/s, forward + backward")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize=8, markerscale=0.8)
    figure.suptitle(title, fontsize=9)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


def case_of(result: dict[str, Any]) -> Case:
    return Case(**{field.name: result[field.name] for field in fields(Case)})


def finished(out: Path | None, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The cases in the report of an interrupted run. Nothing if there is none; SystemExit if it was another machine's,
    other versions', or of another dtype: such numbers do not belong in one table."""
    if out is None:
        raise SystemExit("--resume goes on with what is in --out: give it")
    if not out.exists():
        return []
    report = json.loads(out.read_text("utf-8"))
    results = [result for result in report["results"] if result.get("name") != "provider"]
    here = {
        "hardware": hardware(),
        "versions": versions(),
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
    }
    for found in ({**report, **result} for result in results):
        for name, value in here.items():
            if found[name] != value:
                raise SystemExit(f"--resume: {out} was measured with {name} {found[name]}, this is {value}")
    return results


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.experts", description=DESCRIPTION)
    parser.add_argument("--out", type=Path, help="where the JSON goes; the picture goes beside it, as .png")
    parser.add_argument("--device", choices=tuple(GRID), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="E8k2F4096H1024")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--without", nargs="+", choices=tuple(BUILDERS), default=(), metavar="NAME")
    parser.add_argument("--resume", action="store_true", help="keep the cases that --out holds, measure the others")
    parser.add_argument(
        "--smallest", action="store_true", help="a tiny case, two rounds: tries the code, not the times"
    )
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here (on a CPU: --device cpu)")
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Grouped GEMM not available")  # MegaBlocks on import; we say so ourselves
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device == "cuda" else "float32"))
    shapes = arguments.shapes or [parse_shape(text) for text in GRID[device].split()]
    tokens, rounds = arguments.tokens or TOKENS[device], arguments.rounds
    if arguments.smallest:
        shapes, tokens, rounds = [parse_shape("E4k2F32H64")], [2], 2

    torch.manual_seed(0)
    cases = [Case(n, e, k, f, h, routing) for e, k, f, h in shapes for n in tokens for routing in arguments.routing]
    results = finished(arguments.out, device, dtype) if arguments.resume else []
    seen = [case_of(result) for result in results]
    for case in cases:
        if case in seen:
            continue
        results.append(bench(case, device, dtype, rounds, arguments.without))
        bench_report("recipes.bench.experts", argv, arguments.smallest, results, arguments.out)  # may be interrupted
        print(
            f"{len(results)}/{len(cases)}  {case.shape}  {case.tokens} tokens, {case.routing}: "
            f"{results[-1]['fastest']} is the fastest",
            flush=True,
        )
        torch.cuda.empty_cache()  # where there is one
    print_tables(results)
    if choice := providers(results):
        print(f"{choice['line']}  # torch / grouped_gemm: {choice['torch_over_grouped_gemm']}")
    rows = [*results, choice] if choice else results
    report = bench_report("recipes.bench.experts", argv, arguments.smallest, rows, arguments.out)
    if arguments.out:
        title = f"{report['hardware']}, {results[0]['dtype']}, torch {report['versions']['torch']}"
        plot(results, arguments.out.with_suffix(".png"), title)
    return report


if __name__ == "__main__":
    main()
