"""What each of two processes does; `test_two_processes.py` starts it with torchrun and judges what it writes.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.distributed.worker FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import moe_param
from moe_param import Parameterization, Shape
from moe_param.init import BLOCK
from moe_param.training.processes import shutdown
from tests.models import build, tokens

BASE = Shape(width=32, depth=1, num_experts=6, top_k=2, expert_size=16)
# Sizes that two processes cannot share evenly: 3 experts for each active one, an odd vocabulary, and an embedding of
# more than one block of the initializer.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_local_experts": 9,
    "num_experts_per_tok": 3,
    "intermediate_size": 40,
    "vocab_size": BLOCK // 64 + 1001,
}
SMALL: dict[str, Any] = {**SIZES, "vocab_size": 129}
LR, EPS, DECAY = 2e-2, 1e-6, 0.1
GLOBAL_BATCH, STEPS = 4, 4
THRESHOLD = 0.1  # of the scale-free norm: below what the first batch has


def parameterized(sizes: dict[str, Any], seed: int | None = 1, built: int = 0) -> tuple[Any, Parameterization]:
    model = build("mixtral", seed=built, **sizes)
    return model, moe_param.apply(model, BASE, seed=seed, experts=None)


# -- sharded initialization ------------------------------------------------------------------------------------------
def full(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in model.named_parameters()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def shard(model: nn.Module, mesh: DeviceMesh, placement: dict[int, Placement]) -> None:
    """Every parameter becomes a DTensor; the placement depends on its number of dimensions."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                where = [placement.get(p.dim(), Replicate())]
                module._parameters[name] = nn.Parameter(distribute_tensor(p.detach(), mesh, where))


def sharded_initialization(mesh: DeviceMesh, rank: int) -> dict[str, Any]:
    expected = full(parameterized(SIZES)[0])
    found: dict[str, Any] = {}
    layouts: dict[str, dict[int, Placement]] = {
        "dim0": {1: Shard(0), 2: Shard(0), 3: Shard(0)},
        "dim1": {1: Shard(0), 2: Shard(1), 3: Shard(1)},
        "dim2": {3: Shard(2)},
    }
    for name, layout in layouts.items():
        model = build("mixtral", seed=3 + rank, **SIZES)
        shard(model, mesh, layout)
        moe_param.apply(model, BASE, seed=1, experts=None)
        found[name] = differing(full(model), expected)
    model = build("mixtral", seed=3, **SIZES)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    moe_param.apply(model, BASE, seed=1, experts=None)
    found["fully_shard"] = differing(full(model), expected)
    found["uneven"] = sorted({tuple(p.to_local().shape) for p in model.parameters() if p.dim() == 3})
    found["special"] = special_initialization(mesh, rank)

    # The control: what a seeded normal_ does to the local parts of a tensor.
    local = torch.empty(4, 8)
    torch.manual_seed(0)
    local.normal_()
    parts = [torch.empty_like(local) for _ in range(2)]
    dist.all_gather(parts, local)
    found["plain normal_ repeats itself"] = torch.equal(parts[0], parts[1])
    weight = model.lm_head.weight.full_tensor()
    half = weight.shape[0] // 2
    found["ours repeats itself"] = torch.equal(weight[:half], weight[half + 1 : 2 * half + 1])
    return found


def special_initialization(mesh: DeviceMesh, rank: int) -> list[str]:
    """A mixer whose decays and time steps transformers itself draws, and whose module is sharded as such."""
    sizes: dict[str, Any] = {"mamba_num_heads": 5, "mamba_head_dim": 32}
    model = build("nemotron_h", **sizes)
    base = model.config.__class__.from_dict(model.config.to_dict())
    moe_param.apply(model, base, seed=1, experts=None)
    expected = full(model)
    model = build("nemotron_h", seed=3 + rank, **sizes)
    fully_shard(model.model.layers[0].mixer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    moe_param.apply(model, base, seed=1, experts=None)
    local = model.model.layers[0].mixer.dt_bias.to_local()
    assert local.shape == (3 - rank,), "an uneven shard is meant"
    return differing(full(model), expected)


# -- training --------------------------------------------------------------------------------------------------------
def batches() -> list[torch.Tensor]:
    return [tokens(vocab=128, batch=GLOBAL_BATCH, seed=step) for step in range(STEPS)]


def train_fsdp(mesh: DeviceMesh, rank: int, name: str = "adamw") -> dict[str, Any]:
    model, parameterization = parameterized(SMALL)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = parameterization.optimizer_factory(name)()(model, lr=LR, eps=EPS, weight_decay=DECAY)
    return {
        "losses": steps(model, optimizer, rank),
        "groups": [[g["names"], g["lr"]] for g in optimizer.param_groups],
    }


def train_ddp(rank: int, name: str) -> dict[str, Any]:
    """A loop of one's own around DDP; the optimizer is that of the model inside."""
    model, parameterization = parameterized(SMALL)
    optimizer = parameterization.optimizer(model, optimizer=name, lr=LR, eps=EPS, weight_decay=DECAY)
    return {"losses": steps(DistributedDataParallel(model), optimizer, rank), "end": digest(model)}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> list[float]:
    """The losses of all ranks' parts of every global batch."""
    losses = []
    for batch in batches():
        part = batch.chunk(2)[rank]
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
    return losses


def clipped(mesh: DeviceMesh | None, rank: int) -> dict[str, Any]:
    """The scale-free norm and what clipping leaves, of one global batch: FSDP2, or one process without a mesh."""
    model, parameterization = parameterized(SMALL)
    part = batches()[0]
    if mesh is not None:
        part = part.chunk(2)[rank]
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    model(input_ids=part, labels=part).loss.backward()
    norm = moe_param.clip_grad_norm_(parameterization, model, THRESHOLD)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}
    return {"norm": norm.item(), "left": {name: g.norm().item() for name, g in whole.items()}}


def train_with_trainer(folder: Path, processes: int) -> dict[str, Any]:
    """The Trainer on its own: DDP under torchrun, one process otherwise; the same global batches."""
    model, parameterization = parameterized(SMALL, built=0 if processes == 1 else 3 + dist.get_rank())
    start = digest(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        seed=5,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens(vocab=128, batch=64)]
    factory = parameterization.optimizer_factory(torch.optim.AdamW)
    settings = {"lr": LR, "eps": EPS, "weight_decay": DECAY}
    trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(factory, settings))
    trainer.train()
    wrapped = [name for name, _ in trainer.model_wrapped.named_parameters()]
    again = parameterization.param_groups(trainer.model_wrapped, lr=LR, eps=EPS, weight_decay=DECAY)
    assert trainer.optimizer is not None
    return {
        "start": start,
        "end": digest(model),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "wrapped": wrapped[0],
        "groups under the wrapper": [g["names"] for g in again] == [g["names"] for g in trainer.optimizer.param_groups],
    }


def digest(model: nn.Module) -> list[float]:
    """Enough of every parameter to tell two models apart to the last bit."""
    flat = [p.detach().flatten().double() for p in model.parameters()]
    return [float(x) for p in flat for x in (p[0], p[-1], p.sum())]


def unseeded(rank: int) -> list[float]:
    model = build("mixtral", **SMALL)
    torch.manual_seed(100 + rank)
    moe_param.apply(model, BASE, experts=None)
    return digest(model)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(100 + rank)  # ranks do not agree on the global generator
    found = {
        "sharded": sharded_initialization(mesh, rank),
        "fsdp": train_fsdp(mesh, rank),
        "fsdp_muon": train_fsdp(mesh, rank, "muon"),
        "ddp_muon": train_ddp(rank, "muon"),
        "clipped": clipped(mesh, rank),
        "ddp": train_with_trainer(folder / str(rank), processes=2),
    }
    found["unseeded"] = unseeded(rank)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
