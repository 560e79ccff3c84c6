"""The manifest of an artifact: `ferry.json`, the last file written into a directory.

An artifact is a directory with a manifest. The manifest holds the sha256 of every tensor in its canonical (Hugging
Face) form, a digest of every file, the resolved config that made it, and the whole lineage as compact nodes. Two
artifacts with the same `model_sha256` hold the same model, whatever their layouts: that is what "nothing was lost"
means. No absolute path is ever written here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ferry import __version__
from ferry.core.environment import hardware
from ferry.core.errors import InputError, IntegrityError

MANIFEST_NAME = "ferry.json"
SCHEMA = "ferry.artifact/1"


@dataclass(frozen=True)
class TensorDigest:
    """A canonical tensor: safetensors dtype name, shape, sha256 of its row-major bytes ("" = not taken)."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class FileDigest:
    """A file of the artifact.

    `sha256` covers the whole file where `covers` is "file". For weight files `covers` is "envelope": every byte outside
    the tensor payloads, whose bytes are covered by the tensor digests instead.
    """

    num_bytes: int
    sha256: str
    covers: str = "file"


@dataclass(frozen=True)
class Node:
    """One artifact in a lineage graph: how it was made and which artifacts (by id) it was made from."""

    id: str
    kind: str
    name: str
    verb: str
    summary: str
    created: str
    model_sha256: str
    parents: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything Ferry promises about one directory."""

    kind: str
    name: str
    verb: str
    summary: str
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorDigest] = field(default_factory=dict)
    files: dict[str, FileDigest] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()
    """Declared differences from the parents: what was not carried bit for bit, and why."""
    proofs: tuple[dict[str, Any], ...] = ()
    parents: tuple[str, ...] = ()
    lineage: tuple[Node, ...] = ()
    """Every ancestor, parents first."""
    hardware: dict[str, Any] = field(default_factory=hardware)
    version: str = __version__
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def model_sha256(self) -> str:
        """Return one digest over names, dtypes, shapes and digests of all tensors; "" if any was not taken."""
        if not self.tensors or not all(tensor.sha256 for tensor in self.tensors.values()):
            return ""
        total = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            total.update(f"{name}\t{tensor.dtype}\t{list(tensor.shape)}\t{tensor.sha256}\n".encode())
        return total.hexdigest()

    @property
    def id(self) -> str:
        """Return the identity of this artifact: its kind, tensors, files and details, not when or where it was made."""
        same = {"kind": self.kind, "details": self.details}
        same["tensors"] = {name: asdict(tensor) for name, tensor in sorted(self.tensors.items())}
        same["files"] = {name: asdict(file) for name, file in sorted(self.files.items())}
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()

    def node(self) -> Node:
        made = (self.verb, self.summary, self.created, self.model_sha256)
        return Node(self.id, self.kind, self.name, *made, self.parents, self.changes)

    def ancestry(self) -> tuple[Node, ...]:
        """Return this artifact's node and all its ancestors: what a child stores as its `lineage`."""
        return (self.node(), *self.lineage)

    def to_json(self) -> str:
        document = {"schema": SCHEMA, "id": self.id, "model_sha256": self.model_sha256, **asdict(self)}
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    def digest_of_itself(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of an artifact; raise InputError if there is none, IntegrityError if it was altered."""
    path = directory / MANIFEST_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{directory} has no {MANIFEST_NAME}",
            code="manifest.missing",
            repair="`ferry pull` makes one for a model directory, `ferry convert` for what it writes",
        ) from None
    except ValueError as error:
        raise IntegrityError(f"{path} is not JSON: {error}", code="manifest.unreadable") from None
    if document.get("schema") != SCHEMA:
        found = document.get("schema")
        raise InputError(f"{path} has schema {found!r}, expected {SCHEMA!r}", code="manifest.schema")
    manifest = _from_document(document)
    if manifest.id != document["id"] or manifest.model_sha256 != document["model_sha256"]:
        raise IntegrityError(f"{path} was altered: its id does not match its content", code="manifest.altered")
    return manifest


def _node(item: dict[str, Any]) -> Node:
    return Node(**{**item, "parents": tuple(item["parents"]), "changes": tuple(item["changes"])})


def _from_document(document: dict[str, Any]) -> Manifest:
    fields = {key: value for key, value in document.items() if key not in ("schema", "id", "model_sha256")}
    fields["tensors"] = {
        name: TensorDigest(item["dtype"], tuple(item["shape"]), item["sha256"])
        for name, item in document["tensors"].items()
    }
    fields["files"] = {name: FileDigest(**item) for name, item in document["files"].items()}
    fields["lineage"] = tuple(_node(item) for item in document["lineage"])
    for key in ("changes", "proofs", "parents"):
        fields[key] = tuple(document[key])
    return Manifest(**fields)
