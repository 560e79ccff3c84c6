"""Megatron's tokenised data, judged by megatron-core's own IndexedDataset in both directions."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets import indexed_dataset

from ferry.core.errors import FerryError, InputError
from ferry.core.progress import Reporter
from ferry.data.megatron import PARTS, export_megatron
from ferry.data.prepare import prepare
from ferry.data.settings import DataSettings
from ferry.data.stream import Stream
from ferry.data.tokenset import TokenSet
from ferry.formats.megatron_data import DTYPES, IndexedData, IndexedWriter

DOCUMENTS = [[[5, 6, 7]], [[8], [9, 10]], [[11] * 40]]
"""Three documents; the second is two sequences."""


def by_megatron(prefix: Path, documents: list[list[list[int]]], dtype: type) -> None:
    """Write data with megatron-core's own builder."""
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def settings(smollm2: Path, tmp_path: Path) -> DataSettings:
    return DataSettings(data=(), tokenizer_dir=smollm2, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("code", DTYPES)
def test_what_megatron_writes_is_read_in_every_dtype(tmp_path: Path, code: int) -> None:
    dtype = indexed_dataset.DType.dtype_from_code(code)
    assert np.dtype(dtype) == DTYPES[code]
    by_megatron(tmp_path / "d", DOCUMENTS, dtype)
    data = IndexedData(tmp_path / "d")
    assert (data.num_sequences, data.num_documents, data.dtype) == (4, 3, np.dtype(dtype))
    assert [data.document(index).tolist() for index in range(3)] == [[5, 6, 7], [8, 9, 10], [11] * 40]
    assert data.sequence(2).tolist() == [9, 10]


@pytest.mark.parametrize("code", DTYPES)
def test_what_is_written_is_what_megatron_would_have_written(tmp_path: Path, code: int) -> None:
    by_megatron(tmp_path / "theirs", DOCUMENTS, indexed_dataset.DType.dtype_from_code(code))
    with IndexedWriter(tmp_path / "ours", DTYPES[code]) as writer:
        for document in DOCUMENTS:
            for number, sequence in enumerate(document, start=1):
                writer.append(np.array(sequence), ends_document=number == len(document))
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()
    peer = indexed_dataset.IndexedDataset(str(tmp_path / "ours"))
    assert [peer[index].tolist() for index in range(len(peer))] == [s for document in DOCUMENTS for s in document]
    assert peer.document_indices.tolist() == [0, 1, 3, 4]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit"), IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.append(np.array([1, 70_000]))
    assert list(tmp_path.iterdir()) == []


def corrupted(prefix: Path, at: int, new: bytes) -> None:
    data = bytearray(Path(f"{prefix}.idx").read_bytes())
    data[at : at + len(new)] = new
    Path(f"{prefix}.idx").write_bytes(data)


@pytest.mark.parametrize(
    ("at", "new", "words"),
    [
        (0, b"X", "does not begin like an index"),
        (9, struct.pack("<Q", 2), "has version 2, expected 1"),
        (17, b"\x09", "unknown dtype code 9"),
        (18, struct.pack("<Q", 10_000), "its header promises"),
        (34, struct.pack("<i", 1000), "points outside its .bin"),
        (34 + 16, struct.pack("<q", -4), "points outside its .bin"),
        (34 + 16, struct.pack("<q", 2), "no multiple of 4 bytes"),
        (34 + 48, struct.pack("<q", 1), "do not go from 0 to its 4 sequences"),
    ],
)
def test_a_damaged_index_is_refused_before_anything_is_read(tmp_path: Path, at: int, new: bytes, words: str) -> None:
    by_megatron(tmp_path / "d", DOCUMENTS, np.int32)
    corrupted(tmp_path / "d", at, new)
    with pytest.raises(InputError, match=words) as caught:
        IndexedData(tmp_path / "d")
    assert caught.value.code == "megatron-data.index"


@pytest.mark.parametrize("spelling", ["d_text_document", "d_text_document.idx", "d_text_document.bin", "d", "."])
def test_text_data_are_documents_however_they_are_named(settings: DataSettings, tmp_path: Path, spelling: str) -> None:
    (tmp_path / "data").mkdir()
    by_megatron(tmp_path / "data" / "d_text_document", DOCUMENTS, np.uint16)
    made = prepare(replace(settings, data=(f"{tmp_path}/data/{spelling}",), method="pretrain", seq_len=10), Reporter())
    assert [made.train.sample(index).ids_T.tolist() for index in range(3)] == [[5, 6, 7], [8, 9, 10], [11] * 40]
    assert Stream(made.train, 10).epoch(1, 0).num_sequences == 4
    assert made.choices[0].endswith("is read as megatron text: it has an index (.idx)")


def test_packed_instruction_data_keep_labels_padding_and_borders(settings: DataSettings, tmp_path: Path) -> None:
    ids = [[[1, 2, 3, 4, 5, 6, 0, 0]], [[7, 8, 9]]]
    mask = [[[1, 1, 1, 2, 2, 2, 0, 0]], [[1, 1, 1]]]
    labels = [[[-100, 2, 3, -100, 5, 6, -100, -100]], [[-100, -100, 9]]]
    for part, documents in zip(PARTS, (ids, mask, labels), strict=True):
        by_megatron(tmp_path / f"d_packed_{part}_document", documents, np.int32)
    made = prepare(replace(settings, data=(f"{tmp_path}/d",), method="sft"), Reporter())
    samples = [made.train.sample(index) for index in range(made.train.num_samples)]
    assert [sample.ids_T.tolist() for sample in samples] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert [sample.supervised_T.tolist() for sample in samples] == [[False, True, True]] * 2 + [[False, False, True]]


def test_conversations_go_to_megatron_and_come_back_the_same(settings: DataSettings, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "1+1", "completion": "2"}\n{"prompt": "2+2", "completion": "4 é"}\n')
    made = prepare(replace(settings, data=(f"{tmp_path}/a.jsonl",)), Reporter())
    files = export_megatron(made.train, tmp_path / "out")
    assert sorted(file.name for file in files) == sorted(
        f"out_packed_{part}_document.{ending}" for part in PARTS for ending in ("bin", "idx")
    )
    peer = indexed_dataset.IndexedDataset(str(tmp_path / "out_packed_labels_document"))
    first = made.train.sample(0)
    assert peer[0].tolist() == np.where(first.supervised_T, first.ids_T, -100).tolist()
    back = prepare(replace(settings, data=(f"{tmp_path}/out",)), Reporter())
    (one,), (other,) = made.train.sets, back.train.sets
    assert isinstance(one, TokenSet)
    assert isinstance(other, TokenSet)
    assert other.sha256 == one.sha256
    export_megatron(made.train, tmp_path / "out", "text")
    assert IndexedData(tmp_path / "out_text_document").document(0).tolist() == first.ids_T.tolist()
    with pytest.raises(FerryError, match="exists already"):
        export_megatron(made.train, tmp_path / "out")


def test_tokens_of_another_tokenizer_are_refused(settings: DataSettings, tmp_path: Path) -> None:
    by_megatron(tmp_path / "d_text_document", [[[1, 2]], [[3, 60_000]]], np.int32)
    with pytest.raises(InputError, match=r"d_text_document\[1\] holds token 60000") as caught:
        prepare(replace(settings, data=(f"{tmp_path}/d",), method="pretrain", seq_len=2), Reporter())
    assert caught.value.code == "megatron-data.vocabulary"


def test_parts_that_do_not_belong_together_are_refused(settings: DataSettings, tmp_path: Path) -> None:
    for part, documents in zip(PARTS, ([[[1, 2]]], [[[1, 1]]], [[[1, 2, 3]]]), strict=True):
        by_megatron(tmp_path / f"d_packed_{part}_document", documents, np.int32)
    with pytest.raises(InputError, match="does not have the sequences of") as caught:
        prepare(replace(settings, data=(f"{tmp_path}/d",)), Reporter())
    assert caught.value.code == "megatron-data.parts"
