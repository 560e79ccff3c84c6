"""What differs between an artifact and what was promised of it, in lines a person understands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ferry.core.carry import Spec, carry
from ferry.core.dtypes import num_bytes
from ferry.core.errors import IntegrityError
from ferry.core.layout import Slot
from ferry.core.manifest import MANIFEST_NAME, Manifest, TensorDigest
from ferry.core.progress import Reporter
from ferry.formats.fingerprint import file_digests

SHOWN = 8


def hashed(
    name: str, specs: Mapping[str, Spec], slots: Sequence[Slot], threads: int, reporter: Reporter
) -> dict[str, str]:
    """Return the sha256 of every tensor of a checkpoint, whatever its tensors are."""
    total = sum(num_bytes(spec.dtype, (spec.rows, spec.cols)) for spec in specs.values())
    reporter.start(f"hashing {name}", total)
    digests = carry(specs, slots, (), reporter=reporter, threads=threads)
    reporter.finish()
    return digests


def compare_tensors(expected: Mapping[str, TensorDigest], found: Mapping[str, TensorDigest], where: str) -> list[str]:
    """Return one line for every tensor that is missing, extra, or different."""
    lines = [f"tensor {name} is missing (it is in {where})" for name in expected if name not in found]
    lines += [f"tensor {name} is not in {where}" for name in found if name not in expected]
    for name, tensor in expected.items():
        if name in found and tensor.sha256 and found[name] != tensor:
            lines.append(f"tensor {name} differs from {where}")
    return lines


def compare_files(manifest: Manifest, directory: Path, slots: Iterable[Slot]) -> tuple[list[str], list[str]]:
    """Return what differs, and the files that the manifest does not know."""
    found = file_digests(directory, slots)
    lines = [f"file {name} is missing" for name in manifest.files if name not in found]
    for name, digest in manifest.files.items():
        if name in found and found[name] != digest:
            what = "the part outside its tensors" if digest.covers == "envelope" else "it"
            size = f" ({found[name].num_bytes} bytes, expected {digest.num_bytes})"
            lines.append(f"file {name}: {what} differs{size if found[name].num_bytes != digest.num_bytes else ''}")
    return lines, [name for name in found if name not in manifest.files and name != MANIFEST_NAME]


def refuse_problems(path: Path, problems: Sequence[str], reporter: Reporter) -> None:
    """Raise IntegrityError with everything that differs; do nothing if nothing does."""
    for problem in problems:
        reporter.event("problem", text=problem)
    if problems:
        raise IntegrityError(
            f"{path}: {len(problems)} {'differences' if len(problems) > 1 else 'difference'}: "
            f"{'; '.join(problems[:SHOWN])}{' ...' if len(problems) > SHOWN else ''}",
            code="verify.differs",
            repair="make or fetch the artifact again; its parents are named by `ferry lineage`",
        )
