"""What one short run is told; plain values, so that it goes to a worker and into a ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ShortRun:
    """Training on `stdlib`, byte by byte, or on `data`. `config` and `base` are `PretrainedConfig.to_dict()`s."""

    config: dict[str, Any]
    base: dict[str, Any]
    spec: str
    lr: float
    steps: int
    batch_size: int  # blocks of an optimizer step
    seq_len: int
    warmup: float = 0.25  # share of the steps
    schedule: str = "linear"  # what follows, by transformers' name; this one falls to zero
    schedule_options: dict[str, Any] | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-12
    weight_decay: float = 0.0
    optimizer: str = "adamw"  # or "muon"
    matrix_lr_ratio: float | None = None  # muon: the rate of matrices over lr
    init_std: float | None = None  # default: the config's
    constants: dict[str, dict[str, float]] | None = None  # per role, as `moe_param.apply` takes them
    seed: int = 0
    validation_blocks: int = 256
    data: dict[str, Any] | None = None  # `DataArguments` of another text, read up front
    gradient_accumulation: int = 1  # equal parts of a batch, one forward pass each
    balance_rate: float | None = None  # this and the next two as `moe-param train` takes them
    balance_rule: str = "proportional"
    inject_bias: bool = False
    device: str = "cpu"  # or "cuda:0", …
    dtype: str = "float32"  # or "bfloat16": autocast over float32 weights
    experts: str | None = None  # as `moe_param.apply` takes it; by default what is fast on the device
