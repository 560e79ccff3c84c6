"""A model directory on this machine, copied file by file and hashed on the way."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from ferry.core.errors import InputError, IntegrityError
from ferry.core.manifest import MANIFEST_NAME, Manifest, TensorDigest, read_manifest
from ferry.core.plan import PlannedFile
from ferry.core.progress import Reporter
from ferry.verbs.pull.choose import check_complete, choose
from ferry.verbs.pull.digest import digest_file
from ferry.verbs.pull.source import Fetched, Source, state_of


def open_directory(directory: Path) -> Source:
    names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    chosen = choose(names, str(directory))
    files = tuple(PlannedFile(name, (directory / name).stat().st_size) for name in chosen.files)
    total = sum(file.num_bytes for file in files)
    return Source(
        label=str(directory),
        state=state_of(directory, [directory / name for name in chosen.files]),
        files=files,
        read_bytes=total,
        write_bytes=total,
        fetch=lambda target, reporter: nullcontext(_copy(directory, files, target, reporter)),
        choices=(chosen.reason,),
    )


def _copy(directory: Path, files: tuple[PlannedFile, ...], target: Path, reporter: Reporter) -> Fetched:
    digests, tensors = {}, {}
    reporter.start(f"copying {directory.name}", sum(file.num_bytes for file in files))
    for name, _ in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        found = digest_file(directory / name, reporter, copy_to=target / name)
        digests[name] = found.file
        if name.endswith(".safetensors"):
            tensors[name] = found.tensors
    reporter.finish()
    merged = check_complete(target, tensors)
    description = {"kind": "directory", "name": directory.name}
    return Fetched(merged, digests, description, parent=_parent(directory, merged))


def _parent(directory: Path, tensors: dict[str, TensorDigest]) -> Manifest | None:
    """Return the manifest of a directory that is an artifact already, if its promise still holds."""
    if not (directory / MANIFEST_NAME).is_file():
        return None
    parent = read_manifest(directory)
    if parent.kind != "hf-model":
        raise InputError(
            f"{directory} is a {parent.kind}, expected a Hugging Face model",
            code="pull.kind",
            repair="convert it first",
        )
    wrong = sorted(name for name in {*parent.tensors, *tensors} if parent.tensors.get(name) != tensors.get(name))
    if wrong and parent.model_sha256:
        raise IntegrityError(
            f"tensor {wrong[0]} of {directory} is not what its {MANIFEST_NAME} promises ({len(wrong)} such tensors)",
            code="pull.altered",
            repair="`ferry verify` it, or remove its manifest to take it as it is",
        )
    return parent
