"""The text of a short run: read once per process, up front, in blocks."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import torch
from transformers import AutoConfig

from moe_param.errors import InputError
from moe_param.training.arguments import Horizon
from moe_param.training.data.batches import Batches
from moe_param.training.data.loading import load_data
from moe_param.training.data.packing import PackedDataset
from moe_param.training.data.text import ByteTokenizer, DataArguments, load_tokenizer, stdlib_tokens
from moe_param.tuning.settings import ShortRun

NO_STREAM = "short runs read their text up front: set streaming: false, or give train_files"


@functools.cache
def corpus(seq_len: int, validation_blocks: int = 256) -> tuple[PackedDataset, PackedDataset]:
    """(training, held-out) blocks of the standard library's sources."""
    train, held_out = stdlib_tokens(ByteTokenizer())
    return PackedDataset(train, seq_len), PackedDataset(held_out, seq_len, max_blocks=validation_blocks)


@functools.cache
def _text(arguments: str) -> tuple[PackedDataset, PackedDataset]:
    data = load_data(DataArguments(**json.loads(arguments)))
    if not isinstance(data.train, PackedDataset):
        raise InputError(NO_STREAM)
    return data.train, data.validation


def blocks_of(run: ShortRun) -> tuple[PackedDataset, PackedDataset]:
    """(training, held-out) blocks of a run's text.

    Raises:
        InputError: a text that cannot be read, or does not fill one batch.
    """
    if run.data:
        sizes = {"seq_len": run.seq_len, "validation_blocks": run.validation_blocks}
        training, validation = _text(json.dumps(run.data | sizes))
    else:
        training, validation = corpus(run.seq_len, run.validation_blocks)
    if run.batch_size > len(training):
        raise InputError(
            f"a batch is {run.batch_size} blocks of {run.seq_len} tokens, and the whole text has {len(training)}: "
            f"give more text, or a batch of at most {len(training)}"
        )
    return training, validation


def check_text(run: ShortRun) -> None:
    """Reads the text as the workers will.

    Raises:
        InputError: a text that cannot be read, of more ids than the model has, or too short.
    """
    if run.data and run.data.get("streaming"):
        raise InputError(NO_STREAM)
    vocabulary = load_tokenizer((run.data or {}).get("tokenizer", "bytes")).vocab_size
    known = AutoConfig.for_model(**run.config).get_text_config().vocab_size
    if vocabulary > known:
        raise InputError(f"the tokenizer has {vocabulary} ids, the model {known}: set overrides.vocab_size")
    blocks_of(run)


def times_seen(run: ShortRun) -> str:
    """How often a run sees each block of its text, in words; empty where it does not see one twice."""
    times = run.steps * run.batch_size / len(blocks_of(run)[0])
    return f"the text is seen {times:.3g} times" if times > 1 else ""


def batches(run: ShortRun, training: PackedDataset) -> Iterator[torch.Tensor]:
    """The micro-batches that `moe-param train` on one process takes, in its order, epoch after epoch."""
    horizon = Horizon(run.batch_size, run.batch_size // run.gradient_accumulation, run.steps, run.seq_len)
    for indices in Batches(training, horizon, run.seed).indices():
        yield training.batch(indices)
