"""Another form of a model that is quantized already: read once, written tensor after tensor, with the lineage kept.

`unquantize` and `repack` say what is written; this file reads, hashes, compares with what was promised, writes, and
makes the result visible whole. Memory is that of one linear layer.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from ferry.core.dtypes import num_bytes
from ferry.core.errors import IntegrityError
from ferry.core.floats import Bytes
from ferry.core.layout import Slot, whole
from ferry.core.manifest import MANIFEST_NAME, Manifest, Node, TensorDigest
from ferry.core.plan import Plan, PlannedFile
from ferry.core.progress import Reporter
from ferry.core.quantized import Integers
from ferry.core.safetensors import Header
from ferry.core.staging import StagedDirectory, check_apart, check_target
from ferry.core.verb import Result
from ferry.formats.fingerprint import content_id, file_digests, file_sha256, manifest_of
from ferry.formats.hf import as_part
from ferry.formats.hf_stream import INDEX, index_of, write_tensors
from ferry.formats.quantized import WINDOW_BYTES, QuantizedCheckpoint
from ferry.formats.quantized_format import Stored

INTERPRETER_BYTES = 60_000_000
PROOF_FILES = ("quantization.json", "quantization.html")
"""They tell of the directory they were made for: the manifest keeps what they say."""
Pieces = Iterator[tuple[str, npt.NDArray[Any]]]


class Wish(Protocol):
    """The options these verbs' parts read; the config and the job of `ferry quantize` both have them."""

    @property
    def model(self) -> Path | None: ...
    @property
    def output(self) -> Path | None: ...
    @property
    def format(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def max_shard_size(self) -> int: ...
    @property
    def overwrite(self) -> bool: ...


class Reader:
    """Reads a quantized model and keeps the sha256 of every tensor that was read."""

    def __init__(self, source: QuantizedCheckpoint) -> None:
        self.source = source
        self.digests: dict[str, TensorDigest] = {}

    def read(self, name: str) -> Stored:
        stored = self.source.read(name)
        self._note(name, hashlib.sha256(stored.data.data).hexdigest())
        return stored

    def integers(self, module: str) -> Integers:
        return self.source.format.decode(module, self.read, self.source.schemes[module])

    def windows(self, name: str) -> Iterator[Bytes]:
        total = hashlib.sha256()
        for data in self.source.windows(name):
            total.update(data.data)
            yield data
        self._note(name, total.hexdigest())

    def _note(self, name: str, sha256: str) -> None:
        item = self.source.found[name]
        self.digests[name] = TensorDigest(item.dtype, item.shape, sha256)


@dataclass(frozen=True)
class Rewriting:
    """What is to be written. `pieces` yields every tensor of `headers` in order; `check` looks at the result."""

    source: QuantizedCheckpoint
    target: Path
    kind: str
    summary: str
    headers: dict[str, Header]
    small: dict[str, bytes | Path]
    pieces: Callable[[Reader], Pieces]
    changes: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    check: Callable[[Path, Manifest | None], tuple[dict[str, Any], ...]] | None = None

    @property
    def num_bytes(self) -> int:
        small = (item.stat().st_size if isinstance(item, Path) else len(item) for item in self.small.values())
        return sum(header.file_bytes for header in self.headers.values()) + sum(small)


def plan_of(rewriting: Rewriting, wish: Wish) -> Plan:
    """Return what would be written; refuse a place where it cannot be."""
    source, target = rewriting.source, rewriting.target
    check_apart(target, source.directory)
    check_target(target, rewriting.num_bytes, overwrite=wish.overwrite)
    files = [PlannedFile(name, header.file_bytes) for name, header in rewriting.headers.items()]
    for name, item in rewriting.small.items():
        files.append(PlannedFile(name, item.stat().st_size if isinstance(item, Path) else len(item)))
    largest = max((4 * rows * cols for rows, cols in map(source.shape, source.schemes)), default=0)
    return Plan(
        verb="quantize",
        summary=rewriting.summary,
        inputs={"model": content_id(source)},
        output=str(target),
        files=tuple(files),
        read_bytes=sum(num_bytes(item.dtype, item.shape) for item in source.found.values()),
        write_bytes=rewriting.num_bytes,
        memory_bytes=INTERPRETER_BYTES + largest + 2 * WINDOW_BYTES,
        choices=(*rewriting.choices, *rewriting.changes),
        details={**rewriting.details, "output": str(target)},
    )


def write(rewriting: Rewriting, wish: Wish, reporter: Reporter) -> Result:
    """Write it, prove it, make it visible; return where it is."""
    source, target = rewriting.source, rewriting.target
    check_apart(target, source.directory)
    for choice in rewriting.choices:
        reporter.event("choice", text=choice)
    promised = manifest_of(source.directory)
    need_bytes = rewriting.num_bytes
    with StagedDirectory(target, need_bytes=need_bytes, overwrite=wish.overwrite) as staged:
        reader = Reader(source)
        total = sum(header.file_bytes - header.data_start for header in rewriting.headers.values())
        reporter.start(rewriting.summary, total)
        tensors = write_tensors(staged.work, rewriting.headers, rewriting.pieces(reader), reporter)
        reporter.finish()
        _compare(source, reader, promised)
        for name, item in rewriting.small.items():
            path = staged.work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(item, Path):
                shutil.copyfile(item, path)
            else:
                path.write_bytes(item)
        proofs = rewriting.check(staged.work, promised) if rewriting.check is not None else ()
        manifest = _manifest(rewriting, staged.work, tensors, reader, promised, proofs)
        (staged.work / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        staged.commit()
    reporter.event("written", artifact=str(target), bytes=need_bytes, model_sha256=manifest.model_sha256)
    return {
        "artifact": str(target),
        **rewriting.details,
        "family": source.model.family.name,
        "tensors": len(tensors),
        "linears": len(source.schemes),
        "bytes": need_bytes,
        "model_sha256": manifest.model_sha256,
        "source_model_sha256": promised.model_sha256 if promised else "",
        "proofs": list(proofs),
        "changes": list(rewriting.changes),
        "choices": list(rewriting.choices),
    }


def small_files(
    source: QuantizedCheckpoint, config: dict[str, Any], headers: dict[str, Header]
) -> dict[str, bytes | Path]:
    """Return the files beside the weights: all of the source's but what told of its integers, and a new config.json."""
    left = (INDEX, "config.json", "quant_model_description.json", "quant_model_weights.safetensors.index.json")
    kept: dict[str, bytes | Path] = {
        name: path for name, path in source.assets.files.items() if name not in (*left, *PROOF_FILES)
    }
    return {**kept, "config.json": small_json(config), **index_of(headers)}


def small_json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def altered_files(source: QuantizedCheckpoint) -> list[str]:
    """Name the files beside the weights that are no longer what the source's manifest says."""
    manifest = manifest_of(source.directory)
    if manifest is None:
        return []
    promised = manifest.files
    found = [f"{name}: removed" for name in promised if not (source.directory / name).is_file()]
    for name, path in source.assets.files.items():
        if name not in promised or promised[name].sha256 != file_sha256(path):
            found.append(f"{name}: {'changed' if name in promised else 'added'}")
    return [f"{change} since the source was made" for change in sorted(found)]


def _compare(source: QuantizedCheckpoint, reader: Reader, promised: Manifest | None) -> None:
    """Refuse a source whose tensors are not those of its manifest."""
    if promised is None:
        return
    differing = [
        name
        for name, tensor in promised.tensors.items()
        if tensor.sha256 and name in reader.digests and reader.digests[name] != tensor
    ]
    if differing:
        raise IntegrityError(
            f"{source.directory}: {len(differing)} of {len(promised.tensors)} tensors differ from its manifest: "
            f"{', '.join(differing[:5])}{' ...' if len(differing) > 5 else ''}",
            code="quantize.source-damaged",
            repair="nothing was written; make or fetch the source again",
        )


def _manifest(
    rewriting: Rewriting,
    directory: Path,
    tensors: dict[str, TensorDigest],
    reader: Reader,
    promised: Manifest | None,
    proofs: tuple[dict[str, Any], ...],
) -> Manifest:
    source = rewriting.source
    parents = promised.ancestry() if promised else (_outsider(source, reader),)
    read = {"check": "digest of every tensor read equals the parent's manifest", "parent": parents[0].id}
    return Manifest(
        kind=rewriting.kind,
        name=rewriting.target.name,
        verb="quantize",
        summary=rewriting.summary,
        config={"model": source.directory.resolve().name, **rewriting.details},
        tensors=dict(sorted(tensors.items())),
        files=file_digests(directory, _slots(rewriting, directory)),
        details={"family": source.model.family.name, **rewriting.details},
        changes=rewriting.changes,
        proofs=(*([read] if promised else []), *proofs),
        parents=(parents[0].id,),
        lineage=parents,
    )


def _slots(rewriting: Rewriting, directory: Path) -> list[Slot]:
    return [
        Slot(directory / file, entry.start, entry.dtype, whole(as_part(name, entry.shape)), name)
        for file, header in rewriting.headers.items()
        for name, entry in header.tensors.items()
    ]


def _outsider(source: QuantizedCheckpoint, reader: Reader) -> Node:
    """Return a node for a source without a manifest: all that is known of it is what was just read."""
    kind = f"{source.format.name}-model"
    read = Manifest(kind=kind, name="", verb="", summary="", tensors=reader.digests)
    return Node(read.id, kind, source.directory.name, "", "came without a manifest", "", read.model_sha256)
