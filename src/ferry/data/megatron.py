"""Megatron's tokenised data as training data, and token files as Megatron's data.

Two kinds are known: `PREFIX_text_document`, whose documents are texts, and the three files `PREFIX_packed_input_ids_`,
`_attention_mask_` and `_labels_document` of instruction data. There a label of -100 is not learned, a mask of 0 is
padding, and a mask that counts 1, 2, 3 ... tells several conversations in one sequence apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from ferry.core.errors import InputError
from ferry.data.chunks import Done, Spec, filled, place
from ferry.data.rendering import Tokens
from ferry.data.tokenset import Samples
from ferry.formats.megatron_data import IndexedData, IndexedWriter, Items

PARTS = ("input_ids", "attention_mask", "labels")
IGNORED = -100
BATCH_TOKENS = 1 << 18


class MegatronData(NamedTuple):
    """Where the data lies: `prefix` is without the endings of its kind for `packed`, the whole name for `text`."""

    kind: Literal["text", "packed"]
    prefix: Path

    @property
    def prefixes(self) -> tuple[Path, ...]:
        if self.kind == "text":
            return (self.prefix,)
        return tuple(_packed(self.prefix, part) for part in PARTS)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(Path(f"{prefix}{ending}") for prefix in self.prefixes for ending in (".idx", ".bin"))


def find_megatron(path: Path) -> MegatronData | None:
    """Return the Megatron data a path names: a .idx or .bin, a prefix, or a directory with one set of files."""
    if path.suffix in (".idx", ".bin"):
        path = path.with_suffix("")
    if path.is_dir():
        found = {_data(file.with_suffix("")) for file in path.glob("*.idx")}
        if len(found) > 1:
            names = ", ".join(sorted(data.prefix.name for data in found))
            raise InputError(
                f"{path} holds several sets of Megatron data: {names}",
                code="megatron-data.several",
                repair="give each as an item of its own",
            )
        return found.pop() if found else None
    for prefix in (path, _packed(path, PARTS[0]), path.parent / f"{path.name}_text_document"):
        if Path(f"{prefix}.idx").is_file():
            return _data(prefix)
    return None


def read_megatron(data: MegatronData, spec: Spec, vocab_size: int) -> Iterator[Done]:
    """Give the samples of the data in batches: a document each, or a part of one that its mask tells apart."""
    parts = [IndexedData(prefix) for prefix in data.prefixes]
    _check_parts(data, parts)
    done, samples, num_tokens = Done(0, 0), list[Tokens](), 0
    for number in range(parts[0].num_documents):
        stored = [part.document(number) for part in parts]
        where = f"{data.prefix.name}[{number}]"
        _check_ids(stored[0], where, vocab_size)
        for sample in _samples(data, stored):
            done.num_rows += 1
            place(sample, where, spec, samples, done)
        done.num_bytes += sum(part.nbytes for part in stored)
        num_tokens += len(stored[0])
        if num_tokens >= BATCH_TOKENS:
            yield filled(done, samples)
            done, samples, num_tokens = Done(0, 0), [], 0
    yield filled(done, samples)


def export_megatron(tokens: Samples, prefix: Path, kind: Literal["text", "packed"] = "packed") -> list[Path]:
    """Write samples as Megatron's data, a document each; return the files."""
    data = MegatronData(kind, prefix if kind == "packed" else prefix.parent / f"{prefix.name}_text_document")
    if kind == "text":
        with IndexedWriter(data.prefix) as writer:
            for index in range(tokens.num_samples):
                writer.append(tokens.sample(index).ids_T)
        return list(data.files)
    with (
        IndexedWriter(data.prefixes[0]) as ids,
        IndexedWriter(data.prefixes[1]) as mask,
        IndexedWriter(data.prefixes[2]) as labels,
    ):
        for index in range(tokens.num_samples):
            sample = tokens.sample(index)
            ids.append(sample.ids_T)
            mask.append(np.ones_like(sample.ids_T))
            labels.append(np.where(sample.supervised_T, sample.ids_T, IGNORED))
    return list(data.files)


def _packed(prefix: Path, part: str) -> Path:
    return prefix.parent / f"{prefix.name}_packed_{part}_document"


def _data(prefix: Path) -> MegatronData:
    """Return the data that one of its files belongs to."""
    for part in PARTS:
        ending = f"_packed_{part}_document"
        if prefix.name.endswith(ending):
            return MegatronData("packed", prefix.parent / prefix.name.removesuffix(ending))
    return MegatronData("text", prefix)


def _samples(data: MegatronData, stored: list[Items]) -> Iterator[Tokens]:
    ids_T = stored[0].astype(np.int32)
    if data.kind == "text":
        yield Tokens(ids_T, np.ones(len(ids_T), np.bool_))
        return
    mask_T, supervised_T = stored[1], stored[2] != IGNORED
    edges = [0, *(np.flatnonzero(np.diff(mask_T)) + 1).tolist(), len(ids_T)]
    for first, last in pairwise(edges):
        if last > first and mask_T[first]:
            yield Tokens(ids_T[first:last], supervised_T[first:last])


def _check_parts(data: MegatronData, parts: list[IndexedData]) -> None:
    if any(part.dtype.kind == "f" for part in parts):
        raise InputError(
            f"{data.prefix} holds fractions, not tokens", code="megatron-data.tokens", repair="give tokenised text"
        )
    for prefix, part in zip(data.prefixes[1:], parts[1:], strict=True):
        same = np.array_equal(part.lengths, parts[0].lengths)
        if not same or not np.array_equal(part.document_indices, parts[0].document_indices):
            raise InputError(
                f"{prefix}.idx does not have the sequences of {data.prefixes[0].name}.idx",
                code="megatron-data.parts",
                repair="preprocess the data again",
            )


def _check_ids(ids_T: Items, where: str, vocab_size: int) -> None:
    if len(ids_T) and (int(ids_T.max()) >= vocab_size or int(ids_T.min()) < 0):
        wrong = int(ids_T.max()) if int(ids_T.max()) >= vocab_size else int(ids_T.min())
        raise InputError(
            f"{where} holds token {wrong}, the tokenizer has 0 to {vocab_size - 1}",
            code="megatron-data.vocabulary",
            repair="give the tokenizer that made the data",
        )
