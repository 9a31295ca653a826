"""What moe_param costs: a training step, `apply` and the import, each against transformers doing the same; and Muon.

    python -m recipes.bench.overhead --out overhead.json

Everything is a ratio of runs that alternate with each other, so that a busy machine slows both sides alike.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.optimization import get_constant_schedule_with_warmup

import moe_param
from recipes.bench.goals import GOALS, held
from recipes.bench.muon_step import bench_muon
from recipes.bench.report import bench_report
from recipes.bench.rounds import GPU_TARGET, base_of, compare, config, forward_and_backward, ratio

DESCRIPTION = "What moe_param costs: a training step, apply, and the import, against transformers doing the same."


# -- a training step -------------------------------------------------------------------------------------------------
STEP_TARGETS = {"cpu": 1.01, "cuda": GOALS["step, Adam"].bound}


def bench_step(smallest: bool, device: str) -> list[dict[str, Any]]:
    """Forward, backward, optimizer and schedule of one model under optimizers that Trainer itself has built.

    "stock" is what a plain Trainer makes (decay and no decay), twice, to show what the noise is; "ours" is Trainer
    with our factory. All three train the same weights in turns; on a GPU under autocast to bfloat16.
    """
    rounds = 2 if smallest else 60
    sizes = {"cpu": (512, 4, 768, 8192), "cuda": GPU_TARGET}
    target = config(64, 2, 64, 128) if smallest else config(*sizes[device])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(target).to(device)
    parameterization = moe_param.apply(model, base_of(target), seed=0, experts=None)
    factory = parameterization.optimizer_factory(torch.optim.AdamW)
    batch = (4, 16) if smallest else {"cpu": (4, 128), "cuda": (8, 1024)}[device]
    ids = torch.randint(target.vocab_size, batch, device=device)

    with tempfile.TemporaryDirectory() as folder:
        # A tiny rate: three optimizers share the weights, and none should lead them anywhere.
        arguments = TrainingArguments(
            folder, learning_rate=1e-6, weight_decay=0.1, use_cpu=device == "cpu", report_to=[]
        )
        numbers = {"lr": 1e-6, "eps": 1e-8, "weight_decay": 0.1, "fused": True}  # fused: as Trainer's default
        optimizers = {
            "stock": Trainer(model, arguments).create_optimizer(),
            "stock again": Trainer(model, arguments).create_optimizer(),
            "ours": Trainer(model, arguments, optimizer_cls_and_kwargs=(factory, numbers)).create_optimizer(),
        }
    schedules = {name: get_constant_schedule_with_warmup(optimizer, 10) for name, optimizer in optimizers.items()}
    wait = torch.get_device_module(device).synchronize  # nothing on a CPU

    def step(name: str) -> float:
        wait()
        start = time.perf_counter()
        forward_and_backward(model, ids)
        optimizers[name].step()
        schedules[name].step()
        optimizers[name].zero_grad()
        wait()
        return time.perf_counter() - start

    measure = {name: partial(step, name) for name in optimizers}
    compare(measure, 1 if smallest else 5)  # the first steps allocate
    seconds = compare(measure, rounds)
    found = ratio(seconds, "ours", "stock")
    details = {
        "device": device,
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": {name: len(optimizer.param_groups) for name, optimizer in optimizers.items()},
        "threads": torch.get_num_threads(),
        "noise": ratio(seconds, "stock again", "stock")["ratio"],
        "goals": [held("step, Adam", found["ratio"])] if device == "cuda" or smallest else [],
    }
    return [{"name": "training step", "target": STEP_TARGETS[device], **found, **details}]


# -- apply -----------------------------------------------------------------------------------------------------------
def bench_apply(smallest: bool, patience: float) -> list[dict[str, Any]]:
    """`apply` against transformers' own initialization, on the same weights, in a fresh process each round.

    `apply` draws on all cores, transformers on one: so this waits for free cores, and says how many were not. On one
    core both draw at the same speed, and reading the structure of the model comes on top; that has no target.
    """
    results = []
    for threads in (1,) if smallest else (os.cpu_count() or 1, 1):
        runs, busy = [], []
        for i in range(1 if smallest else 6):
            busy.append(wait_for_cores(threads, patience))
            runs.append(_apply_in_process(smallest, threads, first=i % 2))
        seconds = {name: [run[name] for run in runs] for name in ("apply", "transformers")}
        what = f"{threads} thread{'s' if threads > 1 else ''}"
        results.append(
            {
                "name": f"apply, {what}",
                "target": 1.0 if threads > 1 or smallest else None,
                **ratio(seconds, "apply", "transformers"),
                "parameters": runs[0]["parameters"],
                "from_config_seconds": round(statistics.median(run["from_config"] for run in runs), 4),
                "cores_taken_by_others": [round(cores, 1) for cores in busy],
            }
        )
        peak = max(run["peak"] / run["model_bytes"] for run in runs)
        results.append({"name": f"peak memory of apply, {what}", "target": 1.1, "ratio": round(peak, 4)})
    return results


def wait_for_cores(wanted: int, seconds: float) -> float:
    """Waits, at most this long, until so many cores are free. Returns how many were taken at last."""
    end, cores = time.monotonic() + seconds, os.cpu_count() or 1
    while True:
        before = _cpu_ticks()
        time.sleep(1)
        total, idle = (b - a for a, b in zip(before, _cpu_ticks(), strict=True))
        busy = cores * (1 - idle / total)
        if cores - busy > wanted - 0.2 or time.monotonic() > end:
            return busy


def _cpu_ticks() -> tuple[int, int]:
    """(all, idle) ticks of all cores since the start of the machine."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]


def _apply_in_process(smallest: bool, threads: int, first: int) -> dict[str, float]:
    """One run of `_apply_worker`; on Linux only, for the memory is read from /proc."""
    command = [sys.executable, "-m", "recipes.bench.overhead", "--worker", str(first)]
    done = subprocess.run(
        [*command, "--smallest"] if smallest else command,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _apply_worker(smallest: bool, first: int) -> dict[str, float]:
    """Both initializations of one model, in either order: once each, with everything they do on a first call."""
    target = config(64, 2, 64, 128) if smallest else config(1024, 12, 2816, 32000)
    before = _memory("VmRSS")
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_config(target, dtype=torch.float32)
    run = {"from_config": time.perf_counter() - start}
    run["parameters"] = sum(p.numel() for p in model.parameters())
    run["model_bytes"] = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])

    def ours() -> None:
        moe_param.apply(model, base_of(target), seed=0, experts=None)

    def theirs() -> None:
        _reinitialize(model)

    both = [("apply", ours), ("transformers", theirs)]
    for name, initialize in both[::-1] if first else both:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        start = time.perf_counter()
        initialize()
        run[name] = time.perf_counter() - start
        if name == "apply":
            run["peak"] = _memory("VmHWM") - before
    return run


def _reinitialize(model: PreTrainedModel) -> None:
    """The initialization inside `from_config`, once more, on memory that is already there: that of torch's modules as
    they are constructed, then that of transformers."""
    head: Any = model.get_output_embeddings()
    probe = head.weight
    value = probe[0, 0].item()
    module: Any
    for module in model.modules():
        module._is_hf_initialized = False
        if type(module).__module__.startswith("torch.nn.") and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.initialize_weights()
    assert probe[0, 0].item() != value, "transformers did not write the weights again"


def _memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


# -- import ----------------------------------------------------------------------------------------------------------
BARE = "import torch, transformers"
LOOP = f"{BARE}; from transformers import AutoModelForCausalLM, PreTrainedModel"
TRAINER = f"{LOOP}, Trainer"
ALL = "from moe_param import *"


def bench_import(smallest: bool) -> list[dict[str, Any]]:
    """Fresh interpreters. transformers loads its parts on first use, and so do we: first the two imports as they
    stand, then both with everything loaded that training needs, in one's own loop and with Trainer."""
    statements = {
        "import": (f"{BARE}, moe_param", BARE),
        "import, all names, own loop": (f"{LOOP}; {ALL}", LOOP),
        "import, all names, Trainer": (f"{TRAINER}; {ALL}", TRAINER),
    }
    measure = {code: partial(_python, code) for pair in statements.values() for code in pair}
    if not smallest:
        compare(measure, 1)  # writes bytecode, fills the file cache
    seconds = compare(measure, 1 if smallest else 12)
    return [{"name": name, "target": 1.05, **ratio(seconds, *pair)} for name, pair in statements.items()]


def _python(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


# -- the report ------------------------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    benches = ("step", "muon", "apply", "import")
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.overhead", description=DESCRIPTION)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--only", choices=benches, nargs="+", default=benches, help="default: all")
    parser.add_argument("--device", choices=tuple(STEP_TARGETS), default="cpu", help="of the training step")
    parser.add_argument("--patience", type=float, default=60, help="seconds to wait for free cores before an `apply`")
    parser.add_argument("--smallest", action="store_true", help="tiny models, one round: tries the code, not the times")
    parser.add_argument("--worker", type=int, choices=(0, 1), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    if arguments.worker is not None:
        run = _apply_worker(arguments.smallest, arguments.worker)
        print(json.dumps(run))
        return run
    run_bench = {
        "step": lambda: bench_step(arguments.smallest, arguments.device),
        "muon": lambda: bench_muon(arguments.smallest, arguments.device),
        "apply": lambda: bench_apply(arguments.smallest, 0 if arguments.smallest else arguments.patience),
        "import": lambda: bench_import(arguments.smallest),
    }
    results = []
    for name in arguments.only:
        for result in run_bench[name]():
            target = result["target"]
            result["passed"] = None if target is None else result["ratio"] <= target
            results.append(result)
            print(f"{result['ratio']:.3f}  (target {target or 'none'})  {result['name']}", flush=True)
    return bench_report("recipes.bench.overhead", argv, arguments.smallest, results, arguments.out)


if __name__ == "__main__":
    main()
