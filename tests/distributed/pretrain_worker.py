"""What `accelerate launch` starts in `test_pretrain_processes.py`: the recipe, several times in one set of processes.

    accelerate launch --config_file recipes/accelerate/NAME.yaml -m tests.distributed.pretrain_worker FOLDER TASKS.json

TASKS.json is a list of [name, arguments of moe_param.train, what to plant]. Writes FOLDER/rankN.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from moe_param.errors import MoeParamError
from moe_param.training import pretrain
from moe_param.training.processes import shutdown
from moe_param.training.report import MetricsFile


def digest(model: torch.nn.Module) -> str:
    """Of every bit of every parameter and buffer, however they are sharded."""
    total = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        total.update(name.encode() + full.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def watching(found: dict[str, Any], plant: str | None) -> type[MetricsFile]:
    class Watching(MetricsFile):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            model = kwargs["model"]
            found["start"] = digest(model)
            found["sharded"] = any(isinstance(p, DTensor) for p in model.parameters())
            if plant:  # on one process only: the others have to stop with it
                rank = int(os.environ.get("RANK", "0"))
                model.get_submodule(plant).register_forward_hook(
                    lambda module, args, out: out * float("nan") if rank == 1 and state.global_step == 1 else out
                )

    return Watching


def task(arguments: list[str], plant: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    pretrain.MetricsFile = watching(found, plant)  # type: ignore[misc]
    try:
        found["summary"] = pretrain.pretrain(*pretrain.parse(arguments))
    except MoeParamError as error:
        found["error"] = str(error)
    return found


def main(folder: Path, tasks: list[Any]) -> None:
    torch.set_num_threads(1)
    found = {name: task(arguments, plant) for name, arguments, plant in tasks}
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
