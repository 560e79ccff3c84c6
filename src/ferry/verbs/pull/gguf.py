"""A GGUF file, written as a complete Hugging Face directory."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path

from ferry.core.manifest import FileDigest
from ferry.core.plan import PlannedFile
from ferry.core.progress import Reporter
from ferry.formats.gguf import WEIGHTS, GgufModel, gguf_plan
from ferry.verbs.pull.digest import digest_file
from ferry.verbs.pull.source import Fetched, Source, state_of


def open_gguf(path: Path, tokenizer: Path | None) -> Source:
    model = gguf_plan(path, tokenizer)
    assets = [PlannedFile(name, len(asset)) for name, asset in model.assets.items()]
    return Source(
        label=str(path),
        state=state_of(path.parent, [path]),
        files=(PlannedFile(WEIGHTS, model.header.file_bytes), *assets),
        read_bytes=path.stat().st_size,
        write_bytes=model.write_bytes,
        fetch=lambda target, reporter: nullcontext(write_gguf(model, target, reporter)),
        choices=("weights as bfloat16: what the quantized values stand for, rounded to nearest even",),
    )


def write_gguf(model: GgufModel, target: Path, reporter: Reporter) -> Fetched:
    """Write the directory; the GGUF file's own sha256 goes into the description."""
    path = model.file.path
    reporter.start(f"hashing {path.name}", path.stat().st_size)
    sha256 = digest_file(path, reporter, whole=True).sha256
    reporter.finish()
    tensors = model.write(target, reporter)
    header = model.header
    files = {WEIGHTS: FileDigest(header.file_bytes, header.sha256, "envelope")}
    files |= {name: FileDigest(len(data), hashlib.sha256(data).hexdigest()) for name, data in model.assets.items()}
    description = {"kind": "gguf", "name": path.name, "sha256": sha256, "holds": model.source}
    change = f"weights are the values of {model.source}, computed in float32 and rounded to bfloat16"
    return Fetched(tensors, files, description, changes=(change,))
