"""Blocks of `seq_len` tokens out of a flat array of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from moe_param.errors import InputError
from moe_param.training.data.text import Block


class PackedDataset(Dataset[Block]):
    """Block i of a flat token array. Only an incomplete last block is left out."""

    def __init__(self, tokens: np.ndarray, seq_len: int, *, max_blocks: int = 0, what: str = "training") -> None:
        blocks = len(tokens) // seq_len
        if blocks == 0:
            raise InputError(f"{len(tokens)} {what} tokens: less than a block, give more text or a smaller seq_len")
        self.tokens, self.seq_len = tokens, seq_len
        # Evenly spaced, so that a small validation set still sees the whole of the held-out text.
        chosen = min(max_blocks or blocks, blocks)
        self.starts = np.linspace(0, blocks - 1, chosen).astype(np.int64) * seq_len

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Block:
        start = self.starts[index]
        ids = torch.from_numpy(self.tokens[start : start + self.seq_len].astype(np.int64))
        return {"input_ids": ids, "labels": ids}  # transformers shifts the labels itself

    def batch(self, indices: Iterable[int]) -> torch.Tensor:
        starts = self.starts[np.fromiter(indices, np.int64)]
        return torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.seq_len)].astype(np.int64))

    def batches(self, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
        """Endless batches, every epoch in a new order that depends on the seed alone."""
        if len(self) < batch_size:
            raise InputError(f"{len(self)} blocks do not fill one batch: more text or batch_size below {batch_size}")
        for epoch in itertools.count():
            order = np.random.default_rng((seed, epoch)).permutation(len(self))
            for start in range(0, len(order) - batch_size + 1, batch_size):
                yield self.batch(order[start : start + batch_size])
