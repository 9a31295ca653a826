"""What each process does; `test_balance_processes.py` starts it with torchrun and judges what it writes.

python -m torch.distributed.run --standalone --nproc-per-node 4 -m tests.distributed.balance_worker FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from moe_param import LoadBalancer
from moe_param.training.processes import shutdown
from tests.models import build, tokens

RATE, STEPS, MICRO = 0.05, 3, 2
# A native buffer, native parameters (sharded by FSDP2) in the block and in the router, and an injected bias.
FAMILIES = ("deepseek_v3", "afmoe", "ernie4_5_moe", "qwen3_moe")


def batch(step: int, micro: int, rank: int) -> torch.Tensor:
    return tokens(seed=100 * rank + 10 * step + micro)


def train(family: str, layout: str, mesh: DeviceMesh, rank: int, folder: Path) -> dict[str, Any]:
    model: Any = build(family)
    if layout == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif layout == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    # "one rank": a control, in which every process reduces over itself alone.
    group = None
    if layout == "one rank":
        group = [dist.new_group([r]) for r in range(dist.get_world_size())][rank]
    balancer = LoadBalancer(model, rate=RATE, inject=family == "qwen3_moe", process_group=group)
    indices: list[list[Any]] = [[] for _ in balancer.routes]
    for route, seen in zip(balancer.routes, indices):
        route.module.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[2].tolist()))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found: dict[str, Any] = {"steps": [], "sharded": []}
    for step in range(STEPS):
        for micro in range(MICRO):
            ids = batch(step, micro, rank)
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with CommDebugMode() as communication:
            balancer.step()
        natives = [route.native for route in balancer.routes]
        found["sharded"] = [isinstance(t, DTensor) for t in natives]
        full = [t.full_tensor() if isinstance(t, DTensor) else t for t in natives]
        found["steps"].append(
            {
                "indices": [[row for part in seen for row in part] for seen in indices],
                "bias": balancer.bias.tolist(),
                "collectives": communication.get_total_counts(),
                "native": [None if t is None else t.flatten().tolist() for t in full],
            }
        )
        for seen in indices:
            seen.clear()
    if family == "qwen3_moe":  # as the Trainer saves under DDP and FSDP2
        balancer.stop()
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(balancer.model, options=whole)
        if rank == 0:
            balancer.model.save_pretrained(folder / layout, state_dict=state)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found: dict[str, Any] = {
        f"{family} {layout}": train(family, layout, mesh, rank, folder)
        for family in (FAMILIES if dist.get_world_size() == 2 else FAMILIES[::3])
        for layout in ("ddp", "fsdp")
    }
    found["folder"] = str(folder)
    found["control"] = train("deepseek_v3", "one rank", mesh, rank, folder)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
