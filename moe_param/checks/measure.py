"""One run of a coordinate check: a model of one size and seed, a few steps, and how far its activations moved."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

import moe_param
from moe_param.applying import apply
from moe_param.checks.watch import QUANTITIES, Watch, logits_of
from moe_param.ledger import fingerprint
from moe_param.scaling.spec import ScalingSpec
from moe_param.structure.shape import Shape


@dataclass(frozen=True)
class Run:
    """What one run is: the model at `factor` times the base, the initialization, the text, the steps."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    base_shape: Shape
    spec: ScalingSpec
    factor: float
    seed: int
    steps: int
    lr: float
    eps: float
    batch: torch.Tensor  # (batch, length) ids
    init_std: float | None = None
    constants: Mapping[str, Mapping[str, float]] | None = None
    optimizer: str = "adamw"
    matrix_lr_ratio: float | None = None

    @property
    def fingerprint(self) -> str:
        """Differs where the records may: in the architecture, the text, the versions or any other setting."""
        return fingerprint(
            {
                "model_class": f"{self.model_class.__module__}.{self.model_class.__qualname__}",
                "config": self.config.to_json_string(use_diff=False),
                "implementations": [self.config._attn_implementation, self.config._experts_implementation],
                "base_shape": asdict(self.base_shape),
                "spec": self.spec.to_dict(),
                "factor": self.factor,
                "seed": self.seed,
                "steps": [self.steps, self.lr, self.eps],
                "batch": [list(self.batch.shape), hashlib.sha256(self.batch.cpu().numpy().tobytes()).hexdigest()],
                "constants": [self.init_std, self.constants],
                **({} if self.optimizer == "adamw" else {"optimizer": [self.optimizer, self.matrix_lr_ratio]}),
                "dtype": str(torch.get_default_dtype()),
                "quantities": QUANTITIES,
                "versions": [torch.__version__, transformers.__version__, moe_param.__version__],
            }
        )


def measure(run: Run) -> dict[str, Any]:
    """Builds, trains, measures.

    Returns:
        {"factor", "seed", "loss": per step, "init": {quantity: RMS}, "change": per step {quantity: RMS of the
        difference from initialization}, "weights": {role: RMS change}}.
    """
    torch.manual_seed(run.seed)
    model = run.model_class(copy.deepcopy(run.config))
    parameterization = apply(
        model, run.base_shape, spec=run.spec, seed=run.seed, init_std=run.init_std, constants=run.constants
    )
    head = _head(model, run.seed)
    optimizer = parameterization.optimizer(
        model, optimizer=run.optimizer, lr=run.lr, eps=run.eps, matrix_lr_ratio=run.matrix_lr_ratio
    )
    if head is not None:
        optimizer.add_param_group({"params": [head.weight], "lr": run.lr, "eps": run.eps})
    watch = Watch(model, parameterization, head)
    initial = watch.run(run.batch)
    record: dict[str, Any] = {"factor": run.factor, "seed": run.seed, "loss": [], "change": []}
    record["init"] = {q: _rms(values) for q, values in initial.items()}
    model.train()
    for _ in range(run.steps):
        logits = logits_of(model, head, run.batch)[:, :-1].flatten(0, 1).float()
        loss = torch.nn.functional.cross_entropy(logits, run.batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        record["loss"].append(float(loss.detach()))
        now = watch.run(run.batch)
        change = {q: [a - b for a, b in zip(now[q], initial[q], strict=True)] for q in initial}
        record["change"].append({q: _rms(values) for q, values in change.items()})
    moved: dict[str, list[torch.Tensor]] = {}
    for name, p in model.named_parameters():
        moved.setdefault(parameterization.rules[name].role, []).append(p.detach() - watch.initial[p])
    record["weights"] = {role: _rms(values) for role, values in moved.items()}
    return record


def _head(model: PreTrainedModel, seed: int) -> nn.Linear | None:
    """A plain linear head for a text backbone that has none. The factor 1/width on its logits is already in the final
    norm (`moe_param.structure.roles` puts it there), so the head itself is not scaled."""
    if model.get_output_embeddings() is not None:
        return None
    embedding: Any = model.get_input_embeddings().weight
    head = nn.Linear(embedding.shape[-1], embedding.shape[0], bias=False)
    nn.init.normal_(head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    return head


def _rms(tensors: Sequence[torch.Tensor]) -> float:
    total = sum(float(t.double().square().sum()) for t in tensors)
    return math.sqrt(total / max(1, sum(t.numel() for t in tensors)))
