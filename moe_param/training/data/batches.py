"""Which blocks of a run each process trains on.

Block i of the run is the same on any number of processes, and step s takes the blocks [s·batch, (s+1)·batch). So a run
gives the same losses on one process as on two, and goes on from a checkpoint without reading what it has seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from moe_param.errors import InputError
from moe_param.training.arguments import Horizon
from moe_param.training.data.packing import PackedDataset
from moe_param.training.data.streams import Lanes, PackedStream, Position
from moe_param.training.data.text import Block


class Order:
    """Block i of the run → block of the data: every epoch in a new order, which depends on the seed alone."""

    def __init__(self, blocks: int, seed: int) -> None:
        self.blocks, self.seed, self.epoch = blocks, seed, -1

    def __getitem__(self, index: int) -> int:
        epoch, i = divmod(index, self.blocks)
        if epoch != self.epoch:
            self.epoch, self.permutation = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.blocks)
        return int(self.permutation[i])


def collate(blocks: list[Block]) -> dict[str, Any]:
    batch: dict[str, Any] = {key: torch.stack([b[key] for b in blocks]) for key in ("input_ids", "labels")}
    if "position" in blocks[0]:
        batch["positions"] = dict(b["position"] for b in blocks)  # the last one of each lane
    return batch


@dataclass
class Batches:
    """The micro-batches of one process from step `start` on; a loader for `Trainer`, which asks for its length."""

    data: PackedDataset | PackedStream
    horizon: Horizon
    seed: int
    process: int = 0
    processes: int = 1
    workers: int = 0
    pin_memory: bool = False
    start: int = 0
    positions: dict[int, Position] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lanes = 0
        if isinstance(self.data, PackedStream):
            self.lanes = self.data.lanes(self.horizon.batch, self.processes)
            if self.workers > 1:
                raise InputError(
                    f"dataloader_num_workers is {self.workers}: a stream is read by one worker per process, so that it "
                    "can be resumed exactly; set 1 (or 0)"
                )
        self.share = self.horizon.batch // self.processes

    def __len__(self) -> int:
        """Of the whole run, wherever it starts."""
        return self.horizon.steps * self.share // self.horizon.micro

    @property
    def facts(self) -> dict[str, Any]:
        """What has to stay for a checkpoint to be continued exactly."""
        return {"batch": self.horizon.batch, "seq_len": self.horizon.seq_len, "seed": self.seed, "lanes": self.lanes}

    @property
    def mine(self) -> range:
        """The lanes of a stream that this process reads."""
        return range(self.process, self.lanes, self.processes)

    def indices(self) -> Iterator[list[int]]:
        assert isinstance(self.data, PackedDataset)
        order = Order(len(self.data), self.seed)
        for step in range(self.start, self.horizon.steps):
            first = step * self.horizon.batch + self.process * self.share
            for i in range(first, first + self.share, self.horizon.micro):
                yield [order[j] for j in range(i, i + self.horizon.micro)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        options: dict[str, Any] = {
            "collate_fn": collate,
            "num_workers": self.workers,
            "pin_memory": self.pin_memory,
        }
        if isinstance(self.data, PackedStream):
            source = Lanes(self.data, self.mine, self.lanes, self.positions)
            return iter(DataLoader(source, batch_size=self.horizon.micro, **options))
        return iter(DataLoader(self.data, batch_sampler=list_of(self.indices), **options))


class list_of:
    """An iterable of what a function generates, anew each time: what DataLoader takes for a batch_sampler."""

    def __init__(self, generate: Any) -> None:
        self.generate = generate

    def __iter__(self) -> Iterator[Any]:
        return self.generate()
