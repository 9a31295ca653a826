"""Text packed while training: the same blocks in the same order on any number of processes, and resumed exactly.

A stream is read in lanes. A lane owns some of the data set's shards (files), reads their documents in chunks, shuffles
each chunk and packs the tokens into blocks. Block i of the run is the next one of lane i mod lanes. So the order of the
run depends on the number of lanes, never on the number of processes: process p of P reads the lanes p, p + P, ….
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from moe_param.errors import InputError
from moe_param.training.data.text import Block, Tokenizer, encoded

MAX_LANES = 64
"""Each lane keeps a file open and a chunk of documents in memory."""


@dataclass(frozen=True)
class Position:
    """Where a lane is: the chunk it reads, what was left over before it, and the blocks used since it began.

    `source` is the state of the data set where the chunk begins, None at the first document.
    """

    epoch: int
    chunk: int
    source: dict[str, Any] | None
    rest: list[int]
    blocks: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


START = Position(0, 0, None, [], 0)


@dataclass
class PackedStream:
    """Endless blocks of each lane. `documents(lane, lanes)` opens a lane's documents anew, as a `datasets` stream;
    `texts` picks the training texts out of its rows."""

    documents: Callable[[int, int], Any]
    texts: Callable[[Any], Iterator[str]]
    tokenizer: Tokenizer
    seq_len: int
    shards: int
    shuffle_buffer: int
    seed: int
    name: str = "the stream"

    def lanes(self, batch: int, processes: int) -> int:
        """As many lanes as shards allow, so that every step takes as many blocks from each: a divisor of `batch`."""
        if processes > self.shards:
            raise InputError(
                f"{processes} processes, but {self.name} has {self.shards} shard{'s' * (self.shards > 1)} (files) to "
                "read: use fewer processes, split the data into more files, or streaming: false"
            )
        most = max(processes, min(self.shards, MAX_LANES))
        lanes = max(n for n in range(1, most + 1) if batch % n == 0)
        if lanes % processes:
            raise InputError(
                f"{processes} processes cannot share {lanes} lanes, the largest divisor of the batch ({batch} blocks) "
                f"that the {self.shards} shards of {self.name} allow: choose a batch or a number of processes that fit"
            )
        return lanes

    def blocks(self, lane: int, lanes: int, start: Position = START) -> Iterator[tuple[np.ndarray, Position]]:
        """The blocks of a lane from a position on, each with the position after it."""
        epoch, chunk, source, skip = start.epoch, start.chunk, start.source, start.blocks
        rest = np.array(start.rest, self.tokenizer.dtype)
        size = max(1, self.shuffle_buffer // lanes)
        while True:
            documents = self.documents(lane, lanes)
            if source is not None:
                documents.load_state_dict(source)
            rows = self.texts(documents)
            while texts := list(itertools.islice(rows, size)):
                before, made = rest.tolist(), 0
                order = np.random.default_rng((self.seed, epoch, lane, chunk)).permutation(len(texts))
                for tokens in encoded((texts[i] for i in order), self.tokenizer):
                    rest = np.concatenate([rest, tokens])
                    full = len(rest) // self.seq_len * self.seq_len
                    for block in rest[:full].reshape(-1, self.seq_len):
                        made += 1
                        if made > skip:
                            yield block, Position(epoch, chunk, source, before, made)
                    rest = rest[full:]
                source, skip, chunk = documents.state_dict(), 0, chunk + 1
            if not chunk:
                raise InputError(f"{self.name}: no text to train on in lane {lane} of {lanes}: use fewer, fuller files")
            epoch, chunk, source = epoch + 1, 0, None


class Lanes(IterableDataset[Block]):
    """The blocks of one process, its lanes in turn. Each block carries (lane, position after it)."""

    def __init__(self, stream: PackedStream, mine: range, lanes: int, positions: dict[int, Position]) -> None:
        self.stream, self.mine, self.lanes, self.positions = stream, mine, lanes, positions

    def __iter__(self) -> Iterator[Block]:
        each = [self.stream.blocks(lane, self.lanes, self.positions.get(lane, START)) for lane in self.mine]
        while True:
            for lane, blocks in zip(self.mine, each):
                block, position = next(blocks)
                ids = torch.from_numpy(block.astype(np.int64))
                yield {"input_ids": ids, "labels": ids, "position": (lane, position)}
