"""What load balancing costs: training steps with `LoadBalancer` over steps without, alternating in one process.

    python -m recipes.bench.balance --out balance.json

On a GPU it also counts, with `torch.cuda.set_sync_debug_mode`, how often the host waits for the device in a step.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DeepseekV3Config, PretrainedConfig, Qwen3MoeConfig

from moe_param import LoadBalancer
from recipes.bench.goals import GOALS, held
from recipes.bench.overhead import compare, ratio
from recipes.bench.report import bench_report

DESCRIPTION = "What load balancing costs: training steps with LoadBalancer over steps without."
TARGETS = {"cpu": 1.02, "cuda": GOALS["balancing"].bound}


# Width, expert size, batch and length: a step that keeps the device busy.
SIZES = {"cpu": (256, 128, 8, 128), "cuda": (1024, 512, 8, 1024)}


def configs(smallest: bool, device: str) -> dict[str, PretrainedConfig]:
    """8 layers of 64 experts, 8 of them active: one family with a selection bias of its own, one without."""
    layers, experts, width, hidden = (2, 8, 64, 32) if smallest else (8, 64, *SIZES[device][:2])
    same: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "moe_intermediate_size": hidden,
        "intermediate_size": width,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts_per_tok": experts // 8,
        "vocab_size": 512,
        "use_cache": False,
    }
    latent: dict[str, Any] = {
        "kv_lora_rank": 64,
        "q_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    }
    groups: dict[str, Any] = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    gated: dict[str, Any] = {"num_experts": experts, "head_dim": width // 4, "norm_topk_prob": True}
    return {
        "native": DeepseekV3Config(n_routed_experts=experts, **groups, **latent, **same),
        "injected": Qwen3MoeConfig(**same, **gated),
    }


def bench(name: str, config: PretrainedConfig, device: str, smallest: bool, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    plain = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").to(device, dtype).train()
    models = {"without": plain, "without again": copy.deepcopy(plain), "with": copy.deepcopy(plain)}
    optimizers = {key: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) for key, model in models.items()}
    balancer = LoadBalancer(models["with"], rate=1e-3, inject=name == "injected")
    ids = torch.randint(config.vocab_size, (2, 16) if smallest else SIZES[device][2:], device=device)

    def step(key: str) -> None:
        models[key](input_ids=ids, labels=ids).loss.backward()
        optimizers[key].step()
        optimizers[key].zero_grad()
        if key == "with":
            balancer.step()

    wait = torch.get_device_module(device).synchronize  # nothing on a CPU

    def timed(key: str) -> float:
        wait()
        start = time.perf_counter()
        step(key)
        wait()
        return time.perf_counter() - start

    measure = {key: partial(timed, key) for key in models}
    compare(measure, 1 if smallest else 3)  # the first steps allocate
    seconds = compare(measure, rounds)
    waits = {key: synchronizations(partial(step, key), device) for key in models}
    found = ratio(seconds, "with", "without")
    goals = [held("balancing", found["ratio"]), held("balancing waits", waits["with"] - waits["without"])]
    return {
        "name": f"{name} bias, {device}",
        "target": TARGETS[device],
        **found,
        "noise": ratio(seconds, "without again", "without")["ratio"],
        "layers": len(balancer.routes),
        "experts": balancer.bias.shape[-1],
        "tokens": ids.numel(),
        "synchronizations": waits,
        "goals": goals if device == "cuda" or smallest else [],
    }


def synchronizations(step: Callable[[], None], device: str) -> int:
    """How often the host waits for the device in a step; the model itself may, balancing must not add to it."""
    if device == "cpu":
        return 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not the one that says, once in a process, that this mode "does not yet detect all synchronizing operations".
    return sum("called a synchronizing" in str(warning.message) for warning in seen)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m recipes.bench.balance", description=DESCRIPTION)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--device", choices=tuple(TARGETS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument(
        "--smallest", action="store_true", help="tiny models, two rounds: tries the code, not the times"
    )
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    results = []
    for name, config in configs(arguments.smallest, arguments.device).items():
        rounds = 2 if arguments.smallest else arguments.rounds
        result = bench(name, config, arguments.device, arguments.smallest, rounds)
        result["passed"] = result["ratio"] <= result["target"]
        results.append(result)
        print(
            f"{result['ratio']:.3f}  (target {result['target']}, noise {result['noise']})  {result['name']}", flush=True
        )
    return bench_report("recipes.bench.balance", argv, arguments.smallest, results, arguments.out)


if __name__ == "__main__":
    main()
