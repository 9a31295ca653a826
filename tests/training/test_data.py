"""Data: splits by file, packing, and errors in one line. Real files, the real standard library."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from moe_param.corpus import held_out_by_hash, stdlib_split
from moe_param.errors import InputError
from moe_param.training.arguments import Horizon
from moe_param.training.data.batches import Batches
from moe_param.training.data.loading import load_data
from moe_param.training.data.packing import PackedDataset
from moe_param.training.data.streams import START, PackedStream, Position
from moe_param.training.data.text import (
    ByteTokenizer,
    DataArguments,
    stdlib_tokens,
)


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def documents(count: int) -> list[str]:
    return [f"document {i}: " + "abc " * (i % 7 + 1) for i in range(count)]


# -- stdlib ----------------------------------------------------------------------------------------------------------
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
def stream(tmp_path: Path, shards: int = 1, count: int = 200, **settings: Any) -> tuple[PackedStream, PackedDataset]:
    for shard in range(shards):
        rows = [{"text": text} for text in documents(count)[shard::shards]]
        write_jsonl(tmp_path / f"train-{shard}.jsonl", rows)
    options = {"seq_len": 16, "validation_blocks": 8, "shuffle_buffer": 50, **settings}
    data = load_data(DataArguments(dataset=str(tmp_path), **options))
    assert isinstance(data.train, PackedStream)
    return data.train, data.validation


def epoch_of(packed: PackedStream, lane: int = 0, lanes: int = 1, epoch: int = 0) -> bytes:
    taken = itertools.takewhile(lambda item: item[1].epoch <= epoch, packed.blocks(lane, lanes))
    return b"".join(block.tobytes() for block, where in taken if where.epoch == epoch)


def test_stream_packs_what_is_not_held_out(tmp_path: Path) -> None:
    packed, validation = stream(tmp_path)
    texts = {text.encode() for text in documents(200)}
    held_out = {text.encode() for text in documents(200) if held_out_by_hash(text, 0.05)}
    assert held_out and set(bytes(validation.tokens).split(b"\0")[:-1]) <= held_out
    first = epoch_of(packed)
    seen = first.split(b"\0")[:-1]
    assert set(seen) <= texts - held_out
    assert len(seen) == len(set(seen)) >= 200 - len(held_out) - 1  # all but the tail
    assert epoch_of(packed) == first != epoch_of(packed, epoch=1)


def test_lanes_share_the_shards(tmp_path: Path) -> None:
    packed, _ = stream(tmp_path, shards=3)
    assert packed.shards == 3
    each = [set(epoch_of(packed, lane, 3).split(b"\0")[:-1]) for lane in range(3)]
    trained = {text.encode() for text in documents(200) if not held_out_by_hash(text, 0.05)}
    assert set.union(*each) <= trained and len(set.union(*each)) >= len(trained) - 3
    assert sum(map(len, each)) == len(set.union(*each))  # no document in two lanes


@pytest.mark.parametrize("used", [0, 1, 7, 40, 300, 700])
def test_a_stream_goes_on_from_any_position_to_the_token(tmp_path: Path, used: int) -> None:
    packed, _ = stream(tmp_path)
    blocks = packed.blocks(0, 1)
    where = [START, *(after for _, after in itertools.islice(blocks, used))][-1]
    where = Position(**json.loads(json.dumps(where.to_dict())))  # through a checkpoint
    expected = [block.tolist() for block, _ in itertools.islice(blocks, 60)]
    again, _ = stream(tmp_path)
    assert [block.tolist() for block, _ in itertools.islice(again.blocks(0, 1, where), 60)] == expected
    wrong = Position(**{**where.to_dict(), "blocks": where.blocks + 1})
    assert [block.tolist() for block, _ in itertools.islice(again.blocks(0, 1, wrong), 60)] != expected


# -- which process trains on which blocks ----------------------------------------------------------------------------
def steps(data: Any, processes: int, *, start: int = 0, micro: int = 2, **settings: Any) -> list[list[list[int]]]:
    """The blocks of each step, over all processes, sorted: their order within a step means nothing."""
    horizon = Horizon(batch=8, micro=micro, steps=12, seq_len=data.seq_len)
    parts = []
    for process in range(processes):
        batches = Batches(data, horizon, 3, process, processes, start=start, **settings)
        share = 8 // processes // micro
        rows = list(itertools.islice(batches, (12 - start) * share))
        assert len(batches) == 12 * share
        blocks = [block for row in rows for block in row["input_ids"].tolist()]
        parts.append([blocks[i : i + 8 // processes] for i in range(0, len(blocks), 8 // processes)])
    return [sorted(itertools.chain(*step)) for step in zip(*parts)]


@pytest.mark.parametrize("kind", ["array", "stream"])
def test_a_step_has_the_same_blocks_on_any_number_of_processes(tmp_path: Path, kind: str) -> None:
    if kind == "array":
        data: Any = PackedDataset(np.arange(30 * 4, dtype=np.uint8), 4)  # more than three epochs in 12 steps of 8
    else:
        data, _ = stream(tmp_path, shards=4)
    alone = steps(data, 1)
    assert len(alone) == 12 and all(len(step) == 8 for step in alone)
    assert steps(data, 2) == steps(data, 4) == steps(data, 1, micro=8) == steps(data, 2, workers=1) == alone
    if kind == "array":
        assert steps(data, 2, start=5) == alone[5:]
        flat = [index for batch in Batches(data, Horizon(8, 2, 12, 4), 3).indices() for index in batch]
        assert [sorted(flat[i : i + 30]) for i in (0, 30, 60)] == [list(range(30))] * 3 and flat[:30] != flat[30:60]


def test_positions_of_all_processes_resume_a_stream_on_another_number(tmp_path: Path) -> None:
    data, _ = stream(tmp_path, shards=4)
    positions: dict[int, Position] = {}
    for process in range(2):
        batches = Batches(data, Horizon(8, 2, 12, 16), 3, process, 2)
        for batch in itertools.islice(batches, 5 * 2):  # five steps of two micro-batches
            positions.update(batch["positions"])
    assert sorted(positions) == [0, 1, 2, 3]
    assert steps(data, 1, start=5, positions=positions) == steps(data, 4, start=5, positions=positions)
    assert steps(data, 1, start=5, positions=positions) == steps(data, 1)[5:]


@pytest.mark.parametrize(
    ("shards", "batch", "processes", "workers", "message"),
    [
        (2, 12, 3, 0, "3 processes, but .* has 2 shards .* fewer processes, .* or streaming: false"),
        (5, 12, 3, 0, "3 processes cannot share 4 lanes"),
        (2, 8, 2, 2, "a stream is read by one worker per process"),
    ],
)
def test_streams_that_processes_cannot_share(
    tmp_path: Path, shards: int, batch: int, processes: int, workers: int, message: str
) -> None:
    data, _ = stream(tmp_path, shards=shards)
    with pytest.raises(InputError, match=message):
        Batches(data, Horizon(batch, 2, 4, 16), 0, 0, processes, workers)


def test_a_lane_without_text_is_an_error_and_not_an_endless_loop(tmp_path: Path) -> None:
    data, _ = stream(tmp_path)
    write_jsonl(tmp_path / "train-1.jsonl", [{"text": ""}] * 3)
    data, _ = stream(tmp_path)
    assert data.shards == 2
    with pytest.raises(InputError, match="no text to train on in lane 1 of 2"):
        next(data.blocks(1, 2))


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


# -- files that are broken -------------------------------------------------------------------------------------------
def broken_files(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of files that cannot be read to their end."""
    lines = "".join(json.dumps({"text": f"hello {i}"}) + "\n" for i in range(300)).encode()
    Dataset.from_dict({"text": ["hello"] * 300}).to_parquet(folder / "whole.parquet")
    return {
        "latin.txt": "café\n".encode("latin-1") * 50,
        "latin.jsonl": lines + b'{"text": "caf\xe9"}\n',
        "cut.jsonl": lines[:-9],
        "cut.jsonl.gz": gzip.compress(lines)[:-20],
        "not.txt.gz": lines,
        "cut.parquet": (folder / "whole.parquet").read_bytes()[:-30],
    }


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_file_is_named_among_whole_ones(tmp_path: Path, streaming: bool) -> None:
    for name, content in broken_files(tmp_path).items():
        suffix = "".join(Path(name).suffixes)
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        whole = tmp_path / "whole.parquet" if suffix == ".parquet" else write_jsonl(folder / "a.jsonl", [{"text": "b"}])
        if suffix not in (".jsonl", ".parquet"):  # of the same kind as the broken one
            text = Path(whole).read_bytes()
            whole = folder / f"a{suffix}"
            whole.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
        (folder / name).write_bytes(content)
        arguments = DataArguments(
            train_files=[str(whole), str(folder / name)], seq_len=2, streaming=streaming, validation_fraction=0.3
        )
        with pytest.raises(InputError, match=rf"{name}: cannot be read to its end \(") as raised:
            data = load_data(arguments)
            assert isinstance(data.train, PackedStream)
            for _ in itertools.islice(data.train.blocks(0, 1), 2000):
                pass
        assert "\n" not in str(raised.value)
