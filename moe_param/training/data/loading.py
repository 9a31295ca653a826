"""`load_data`: what the arguments ask for, read up front or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_param.corpus import held_out_by_hash
from moe_param.errors import InputError
from moe_param.training.data.packing import PackedDataset
from moe_param.training.data.streams import PackedStream
from moe_param.training.data.text import (
    FEW_DOCUMENTS,
    ByteTokenizer,
    DataArguments,
    HFTokenizer,
    Tokenizer,
    column,
    documents,
    encoded,
    load_tokenizer,
    stdlib_tokens,
)


@dataclass
class Data:
    train: PackedDataset | PackedStream
    validation: PackedDataset
    tokenizer: ByteTokenizer | HFTokenizer
    description: str


def load_data(args: DataArguments, seed: int = 0, tokenizer: ByteTokenizer | HFTokenizer | None = None) -> Data:
    """The text that `args` ask for, in blocks of tokens; `tokenizer` is that of `args`, if it was loaded already.

    Raises:
        InputError: text that is not there, cannot be read or is too short.
    """
    tokenizer = tokenizer or load_tokenizer(args.tokenizer)
    if args.dataset == "stdlib" and not args.train_files:
        if args.streaming:
            raise InputError("dataset 'stdlib' does not stream: leave streaming unset")
        train, validation = stdlib_tokens(tokenizer, args.validation_fraction)
        name, how = "stdlib", "by file"
    else:
        name = " ".join(args.train_files) if args.train_files else args.dataset
        if args.streaming if args.streaming is not None else not args.train_files:
            return _stream(args, tokenizer, name, seed)
        train, validation, how = _local_tokens(args, tokenizer, name)
    held_out = PackedDataset(validation, args.seq_len, max_blocks=args.validation_blocks, what="held-out")
    description = (
        f"{name}: {len(train):,} tokens to train on, {len(validation):,} held out {how} "
        f"({len(held_out)} blocks of them in use)"
    )
    return Data(PackedDataset(train, args.seq_len), held_out, tokenizer, description)


def _local_tokens(args: DataArguments, tokenizer: Tokenizer, name: str) -> tuple[np.ndarray, np.ndarray, str]:
    """(training tokens, validation tokens, how they were split)."""

    def read(files: list[str] | None, split: str) -> list[str]:
        texts = list(column(documents(args, files, split), args.text_column, name, files))
        if not texts:
            raise InputError(f"{' '.join(files) if files else name}: no text in it")
        return texts

    def tokens(texts: list[str]) -> np.ndarray:
        return np.concatenate(list(encoded(texts, tokenizer)))

    texts = read(args.train_files, args.train_split)
    if args.validation_files or args.validation_split:
        separate = read(args.validation_files, args.validation_split or args.train_split)
        return tokens(texts), tokens(separate), "as given"
    held_out = [held_out_by_hash(text, args.validation_fraction) for text in texts]
    if len(texts) >= FEW_DOCUMENTS and any(held_out) and not all(held_out):
        train, validation = ([t for t, out in zip(texts, held_out) if out is side] for side in (False, True))
        return tokens(train), tokens(validation), "by document"
    flat = tokens(texts)
    cut = int(len(flat) * (1 - args.validation_fraction))
    return flat[:cut], flat[cut:], f"at the end (too few documents to split: {len(texts)})"


def _stream(args: DataArguments, tokenizer: ByteTokenizer | HFTokenizer, name: str, seed: int) -> Data:
    if args.validation_blocks < 1:
        raise InputError("validation_blocks is 0, which means all: a stream needs a number")
    separate = bool(args.validation_files or args.validation_split)
    source = documents(args, args.train_files, args.train_split)

    def texts(rows: Any) -> Iterator[str]:
        for text in column(rows, args.text_column, name, args.train_files):
            if separate or not held_out_by_hash(text, args.validation_fraction):
                yield text

    held_out = column(source, args.text_column, name, args.train_files)
    if separate:
        other = documents(args, args.validation_files, args.validation_split or args.train_split)
        held_out = column(other, args.text_column, name, args.validation_files)
    taken: list[np.ndarray] = []
    read = size = 0
    for text in held_out:
        read += 1
        if separate or held_out_by_hash(text, args.validation_fraction):
            taken += tokenizer.encode([text])
            size += len(taken[-1])
            if size >= args.validation_blocks * args.seq_len:
                break
    if not read or not any(True for _ in texts(source)):
        raise InputError(f"{name}: no text in it" if not read else f"{name}: no text left to train on")
    if not taken:
        raise InputError(
            f"{name}: none of {read} documents is among the {args.validation_fraction:.0%} held out: "
            "give validation_files or a larger validation_fraction"
        )
    validation = PackedDataset(np.concatenate(taken), args.seq_len, max_blocks=args.validation_blocks, what="held-out")
    stream = PackedStream(
        lambda lane, lanes: source.shard(num_shards=lanes, index=lane),
        texts,
        tokenizer,
        args.seq_len,
        shards=source.num_shards,
        shuffle_buffer=args.shuffle_buffer,
        seed=seed,
        name=name,
    )
    how = "as given" if separate else f"of {args.validation_fraction:.0%} held out by hash"
    return Data(
        stream, validation, tokenizer, f"{name}: streaming {stream.shards} shards, {len(validation)} blocks {how}"
    )
