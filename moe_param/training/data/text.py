"""Text in, fixed-length blocks of tokens out.

Three sources: `stdlib` (the .py files of the running Python: real text on every machine, no download),
local files, and anything `datasets.load_dataset` knows by name. Documents are joined with an
end-of-document token and cut into blocks of `seq_len`; nothing is padded, so all blocks weigh the same.
"""

from __future__ import annotations

import glob
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moe_param.corpus import document_bytes, stdlib_split
from moe_param.errors import InputError, MoeParamError

BUILDERS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst"})
FEW_DOCUMENTS = 100  # below this a split by document is too coarse: the end of the text is held out

Block = dict[str, Any]
"""input_ids and labels, (seq_len,); of a stream also `position`, where its lane is after it."""


@dataclass
class DataArguments:
    """Which text to train on."""

    dataset: str = field(
        default="stdlib",
        metadata={"help": "'stdlib', or a Hub data set id or local folder as `datasets.load_dataset` takes it."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split of the data set to train on."})
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to validate on; without it, documents are held out of train_split."},
    )
    train_files: list[str] | None = field(
        default=None,
        metadata={"help": "Local .txt, .md, .jsonl, .json or .parquet files or globs, instead of dataset."},
    )
    validation_files: list[str] | None = field(
        default=None,
        metadata={"help": "Files to validate on; without them, documents of train_files are held out."},
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    tokenizer: str = field(
        default="bytes", metadata={"help": "'bytes' (256 ids), or a Hugging Face tokenizer's name or path."}
    )
    seq_len: int = field(default=256, metadata={"help": "Tokens per block."})
    streaming: bool | None = field(
        default=None,
        metadata={"help": "Read while training, not up front. Default: yes for dataset, no for files."},
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Documents of a stream that are shuffled among each other, over all lanes."}
    )
    validation_fraction: float = field(default=0.05, metadata={"help": "Share of documents held out."})
    validation_blocks: int = field(default=256, metadata={"help": "Blocks to validate on, evenly spaced; 0 for all."})

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise InputError(f"seq_len is {self.seq_len}: the loss needs at least 2 tokens per block")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction is {self.validation_fraction}: expected a number between 0 and 1")
        if self.train_files and self.dataset != "stdlib":
            raise InputError("dataset and train_files are both set: give one of them")
        if self.train_files and self.validation_split:
            raise InputError("validation_split is for dataset: with train_files give validation_files")
        if self.validation_files and not self.train_files:
            raise InputError("validation_files is set without train_files: give both, or use validation_split")


class Tokenizer(Protocol):
    vocab_size: int
    dtype: type[np.unsignedinteger[Any]]

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The tokens of each text, each closed by the end-of-document token."""


class ByteTokenizer:
    """UTF-8 bytes. Byte 0 does not occur in text and ends a document, so 256 ids are all there is."""

    vocab_size = 256
    dtype = np.uint8

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [document_bytes(text) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class HFTokenizer:
    """Any Hugging Face tokenizer that has an end-of-text token."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self.hf = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"tokenizer {name!r} cannot be loaded ({reason}): give 'bytes', a Hub id or a folder"
            ) from error
        if self.hf.eos_token_id is None:
            raise InputError(f"tokenizer {name!r} has no eos_token to end documents with: set one and save it")
        self.vocab_size = len(self.hf)
        self.dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        ids = self.hf(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.array([*document, self.hf.eos_token_id], self.dtype) for document in ids]


def load_tokenizer(name: str) -> ByteTokenizer | HFTokenizer:
    return ByteTokenizer() if name == "bytes" else HFTokenizer(name)


def stdlib_tokens(tokenizer: Tokenizer, fraction: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    train, validation = (
        np.concatenate(list(encoded((path.read_text("utf-8", "replace") for _, path in part), tokenizer)))
        for part in stdlib_split(fraction)
    )
    return train, validation


def encoded(texts: Iterable[str], tokenizer: Tokenizer, batch: int = 256) -> Iterator[np.ndarray]:
    """Tokens of each text; in batches, because fast tokenizers work on many texts at once."""
    iterator = iter(texts)
    while chunk := list(itertools.islice(iterator, batch)):
        yield from tokenizer.encode(chunk)


UNREADABLE = (ValueError, EOFError, OSError, zlib.error)
"""What `datasets` lets through of a file that is cut short, damaged or not UTF-8 (pyarrow's are ValueErrors)."""


@contextmanager
def readable(source: str, files: Sequence[str] | None) -> Iterator[None]:
    """Raises what goes wrong in reading as an InputError that names the file among `files`, or else the `source`."""
    try:
        yield
    except MoeParamError:
        raise
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{_broken(files or ()) or source}: cannot be read to its end ({reason}); text has to be UTF-8, and files "
            "whole: mend it or leave it out"
        ) from error


def _broken(files: Sequence[str]) -> str | None:
    """The first file that cannot be read by itself."""
    for path in (path for pattern in files for path in _matches(pattern)):
        try:
            for _ in _load(_builder(path), [path], "train"):
                pass
        except UNREADABLE:
            return path
    return None


def column(rows: Iterable[dict[str, Any]], name: str, source: str, files: Sequence[str] | None) -> Iterator[str]:
    """The texts in a column of `rows`, which were read of `files` (None: of a data set); empty ones are left out.

    Raises:
        InputError: no such column, something else than text in it, or rows that cannot be read; `source` is named.
    """
    with readable(source, files):
        for row in rows:
            if name not in row:
                raise InputError(f"{source}: no column {name!r} (it has: {', '.join(row)}): set text_column")
            text = row[name]
            if text is not None and not isinstance(text, str):
                raise InputError(f"{source}: column {name!r} holds {type(text).__name__}, not text: set text_column")
            if text:
                yield text


def documents(args: DataArguments, files: list[str] | None, split: str) -> Any:
    """A `datasets.IterableDataset`: also for what is read up front, as that leaves no copy in the cache."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    if files:
        paths = [path for pattern in files for path in _matches(pattern)]
        builders = {_builder(path) for path in paths}
        if len(builders) > 1:
            raise InputError(f"{' '.join(files)}: several kinds of file ({', '.join(sorted(builders))}): give one")
        try:
            with readable(" ".join(files), files):
                return _load(builders.pop(), paths, split)
        except StopIteration:  # what datasets lets escape where the first .jsonl file is empty
            raise InputError(f"{paths[0]}: no text in it") from None
    try:
        return load_dataset(args.dataset, args.dataset_config, split=split, streaming=True)
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"data set {args.dataset!r} cannot be loaded: {reason} (local files go in train_files)"
        ) from error
    except ValueError as error:  # an unknown configuration or split; datasets lists the valid ones
        raise InputError(f"data set {args.dataset!r}: {error}") from error


def _load(builder: str, paths: list[str], split: str) -> Any:
    from datasets import load_dataset

    options = {"sample_by": "document"} if builder == "text" else {}
    return load_dataset(builder, data_files={split: paths}, split=split, streaming=True, **options)


def _matches(pattern: str) -> list[str]:
    found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not found:
        raise InputError(f"{pattern}: no such file")
    return found


def _builder(path: str) -> str:
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in COMPRESSED]
    if not suffixes or suffixes[-1] not in BUILDERS:
        raise InputError(f"{path}: kind of file not known by its name, expected one of {', '.join(BUILDERS)}")
    return BUILDERS[suffixes[-1]]
