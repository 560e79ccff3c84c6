"""`ferry convert gguf2hf`: a GGUF file as a Hugging Face directory, with a manifest like any other result."""

from __future__ import annotations

from pathlib import Path

from ferry.core.manifest import MANIFEST_NAME, FileDigest, Manifest, Node
from ferry.core.plan import Plan, PlannedFile
from ferry.core.progress import Reporter
from ferry.core.safetensors import read_header
from ferry.core.staging import StagedDirectory, check_apart, check_target
from ferry.core.verb import Result
from ferry.formats.fingerprint import file_sha256
from ferry.formats.gguf import WEIGHTS, GgufModel, gguf_plan
from ferry.formats.opening import sniff
from ferry.verbs.convert.config import ConvertConfig
from ferry.verbs.convert.paths import source_and_target
from ferry.verbs.convert.unused import refuse_layout

MEMORY_BYTES = 100_000_000


def is_gguf(config: ConvertConfig) -> bool:
    """Say whether the source is a GGUF file, by direction or by looking."""
    source, _ = source_and_target(config)
    return config.direction == "gguf2hf" or (config.direction == "auto" and sniff(source) == "gguf")


def plan_gguf(config: ConvertConfig) -> Plan:
    """Return what the conversion of a GGUF file would do."""
    source, target = source_and_target(config)
    check_apart(target, source, config.hf_assets)
    refuse_layout(config, "gguf2hf")
    model = gguf_plan(source, config.hf_assets)
    check_target(target, model.write_bytes, overwrite=config.overwrite)
    files = [PlannedFile(WEIGHTS, model.header.file_bytes)]
    files += [PlannedFile(name, len(content)) for name, content in model.assets.items()]
    return Plan(
        verb="convert",
        summary=f"GGUF -> Hugging Face: {model.source}, {len(model.tensors)} tensors as BF16",
        inputs={"source": file_sha256(source)},
        output=str(target),
        files=tuple(files),
        read_bytes=source.stat().st_size,
        write_bytes=model.write_bytes,
        memory_bytes=MEMORY_BYTES,
        choices=(_declared(model),),
        details={"direction": "gguf2hf", "output": str(target)},
    )


def run_gguf(config: ConvertConfig, reporter: Reporter) -> Result:
    """Write the directory and return where it is."""
    source, target = source_and_target(config)
    check_apart(target, source, config.hf_assets)
    refuse_layout(config, "gguf2hf")
    model = gguf_plan(source, config.hf_assets)
    digest = file_sha256(source)
    node = Node(digest, "gguf", source.name, "", model.source, "", "")
    with StagedDirectory(target, need_bytes=model.write_bytes, overwrite=config.overwrite) as staged:
        tensors = model.write(staged.work, reporter)
        manifest = Manifest(
            kind="hf-model",
            name=target.name,
            verb="convert",
            summary=f"{source.name} -> hf",
            tensors=dict(sorted(tensors.items())),
            files=_file_digests(staged.work),
            details={"source": {"name": source.name, "sha256": digest}, "layout": {"files": [WEIGHTS]}},
            changes=(_declared(model),),
            parents=(node.id,),
            lineage=(node,),
        )
        (staged.work / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        staged.commit()
    return {
        "artifact": str(target),
        "direction": "gguf2hf",
        "family": str(model.config["model_type"]),
        "layout": {"files": [WEIGHTS]},
        "tensors": len(tensors),
        "files": len(manifest.files),
        "bytes": model.write_bytes,
        "model_sha256": manifest.model_sha256,
        "parent_model_sha256": "",
        "same_as_parent": False,
        "tensors_checked": 0,
        "restored": False,
        "changes": list(manifest.changes),
        "choices": [],
    }


def _declared(model: GgufModel) -> str:
    return f"quantized values become BF16, rounded to nearest even ({model.source})"


def _file_digests(directory: Path) -> dict[str, FileDigest]:
    digests = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name == WEIGHTS:
            digests[name] = FileDigest(path.stat().st_size, read_header(path).sha256, "envelope")
        else:
            digests[name] = FileDigest(path.stat().st_size, file_sha256(path))
    return digests
