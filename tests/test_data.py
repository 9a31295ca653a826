"""Data: splits by file, packing, and errors in one line. Real files, the real standard library."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from recipes.data import (
    ByteTokenizer,
    DataArguments,
    InputError,
    PackedDataset,
    PackedStream,
    load_data,
    stdlib_files,
    stdlib_split,
    stdlib_tokens,
)


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def documents(count: int) -> list[str]:
    return [f"document {i}: " + "abc " * (i % 7 + 1) for i in range(count)]


# -- stdlib ----------------------------------------------------------------------------------------------------------
def test_stdlib_split_is_by_file_disjoint_and_complete() -> None:
    train, held_out = (dict(part) for part in stdlib_split(0.05))
    assert not train.keys() & held_out.keys()
    assert train.keys() | held_out.keys() == dict(stdlib_files()).keys()
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.1
    assert not any("site-packages" in name or "/test/" in f"/{name}" for name in train | held_out)


def test_stdlib_side_of_a_file_depends_on_its_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = dict(stdlib_split(0.05)[1])
    files = stdlib_files()
    monkeypatch.setattr("recipes.data.stdlib_files", lambda: files[::2])
    assert dict(stdlib_split(0.05)[1]).keys() == held_out.keys() & dict(files[::2]).keys()


def test_stdlib_tokens_are_the_files_bytes_and_deterministic() -> None:
    train, held_out = stdlib_tokens(ByteTokenizer())
    again, _ = stdlib_tokens(ByteTokenizer())
    assert train.dtype == np.uint8 and np.array_equal(train, again)
    _, path = stdlib_split(0.05)[1][0]
    first = path.read_bytes().replace(b"\r\n", b"\n")
    assert held_out[: len(first) + 1].tobytes() == first + b"\0"
    assert len(train) > 1_000_000  # real text, enough for the recipes


# -- packing ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seq_len", [2, 7, 64])
def test_packing_loses_only_the_tail(seq_len: int) -> None:
    tokens = np.arange(1000) % 251
    packed = PackedDataset(tokens.astype(np.uint8), seq_len)
    joined = torch.cat([packed[i]["input_ids"] for i in range(len(packed))])
    assert joined.tolist() == tokens[: 1000 - 1000 % seq_len].tolist()
    assert torch.equal(packed[0]["input_ids"], packed[0]["labels"])


def test_batches_visit_every_block_once_an_epoch_in_an_order_of_the_seed() -> None:
    packed = PackedDataset(np.repeat(np.arange(12, dtype=np.uint8), 4), 4)

    def epoch(seed: int) -> list[int]:
        return torch.cat(list(itertools.islice(packed.batches(3, seed), 4)))[:, 0].tolist()

    assert sorted(epoch(0)) == list(range(12))
    assert epoch(0) == epoch(0) != epoch(1)


def test_few_validation_blocks_are_spread_over_the_text() -> None:
    packed = PackedDataset(np.arange(100, dtype=np.uint8), 10, max_blocks=3)
    assert [int(packed[i]["input_ids"][0]) for i in range(3)] == [0, 40, 90]


# -- local files -----------------------------------------------------------------------------------------------------
def test_local_split_by_document_is_disjoint_and_complete(tmp_path: Path) -> None:
    texts = documents(300)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    data = load_data(DataArguments(train_files=[path], seq_len=2, validation_blocks=0))
    assert isinstance(data.train, PackedDataset)
    train, held_out = (set(bytes(part.tokens).split(b"\0")[:-1]) for part in (data.train, data.validation))
    assert not train & held_out
    assert train | held_out == {text.encode() for text in texts}


def test_one_text_file_is_split_at_its_end(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("line\n" * 1000)
    data = load_data(DataArguments(train_files=[str(tmp_path / "*.txt")], seq_len=8, validation_fraction=0.1))
    assert isinstance(data.train, PackedDataset)
    assert bytes(np.concatenate([data.train.tokens, data.validation.tokens])) == b"line\n" * 1000 + b"\0"
    assert "at the end" in data.description


def test_parquet_and_separate_validation_files(tmp_path: Path) -> None:
    from datasets import Dataset

    for name in ("train", "validation"):
        Dataset.from_dict({"body": [f"{name} {i}" for i in range(20)]}).to_parquet(tmp_path / f"{name}.parquet")
    data = load_data(
        DataArguments(
            train_files=[str(tmp_path / "train.parquet")],
            validation_files=[str(tmp_path / "validation.parquet")],
            text_column="body",
            seq_len=4,
        )
    )
    assert b"validation" in bytes(data.validation.tokens)
    assert isinstance(data.train, PackedDataset) and b"validation" not in bytes(data.train.tokens)


def test_hugging_face_tokenizer(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"[END]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    folder = str(tmp_path / "tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[END]").save_pretrained(folder)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a b a"}] * 20)
    data = load_data(DataArguments(train_files=[path], tokenizer=folder, seq_len=4))
    assert data.tokenizer.vocab_size == 4
    assert data.train[0]["input_ids"].tolist() == [2, 3, 2, 0]

    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    with pytest.raises(InputError, match="no eos_token"):
        load_data(DataArguments(train_files=[path], tokenizer=folder))


# -- streams: a local folder takes the path a Hub id takes -----------------------------------------------------------
def test_stream_packs_what_is_not_held_out(tmp_path: Path) -> None:
    texts = documents(200)
    write_jsonl(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    data = load_data(DataArguments(dataset=str(tmp_path), seq_len=16, validation_blocks=8, shuffle_buffer=50))
    assert isinstance(data.train, PackedStream) and len(data.validation) == 8

    def joined() -> bytes:
        return b"".join(bytes(block["input_ids"].tolist()) for block in data.train)

    first = joined()
    held_out = bytes(data.validation.tokens).split(b"\0")[:-1]
    seen = first.split(b"\0")[:-1]
    assert set(seen) <= {text.encode() for text in texts} - set(held_out)
    assert len(seen) >= 200 - len(held_out) - 1  # all but the tail
    assert joined() == first
    data.train.set_epoch(1)
    assert joined() != first


def test_stream_shares_its_shards_among_loader_workers(tmp_path: Path) -> None:
    for shard in range(2):
        write_jsonl(tmp_path / f"{shard}.jsonl", [{"text": f"{shard}-{i:03}"} for i in range(40)])
    args = DataArguments(train_files=[str(tmp_path / "*.jsonl")], streaming=True, seq_len=6, validation_blocks=1)
    loader = torch.utils.data.DataLoader(load_data(args).train, batch_size=None, num_workers=2)
    seen = [bytes(block["input_ids"].tolist()) for block in loader]
    assert len(seen) == len(set(seen)) >= 78  # no document twice


# -- errors ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"body": "x", "id": 1}\n', r"no column 'text' \(it has: body, id\): set text_column"),
        ("a.jsonl", '{"text": 5}\n', "column 'text' holds int, not text"),
        ("a.jsonl", "", "no text in it"),
        ("a.jsonl", '{"text": ""}\n', "no text in it"),
        ("a.txt", "", "no text in it"),
        ("a.txt", "short", "less than a block"),
        ("a.pdf", "x", "kind of file not known"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as raised:
        load_data(DataArguments(train_files=[str(tmp_path / name)]))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_files": ["nowhere/*.txt"]}, "nowhere/.*: no such file"),
        ({"train_files": ["a.txt"], "dataset": "some/id"}, "give one of them"),
        ({"validation_files": ["a.txt"]}, "without train_files"),
        ({"seq_len": 1}, "at least 2 tokens"),
        ({"validation_fraction": 1.5}, "between 0 and 1"),
        ({"streaming": True}, "does not stream"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data(DataArguments(**arguments))  # type: ignore[arg-type]


def test_missing_split_of_a_data_set(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "x"}])
    with pytest.raises(InputError, match="test"):
        load_data(DataArguments(dataset=str(tmp_path), train_split="test"))
