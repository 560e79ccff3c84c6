"""Brings a model here: fetch into a staged directory, write the manifest, make both visible at once."""

from __future__ import annotations

import os
from pathlib import Path

from ferry.core.errors import IntegrityError
from ferry.core.manifest import MANIFEST_NAME, Manifest
from ferry.core.progress import Reporter
from ferry.core.staging import StagedDirectory
from ferry.core.verb import Result
from ferry.verbs.pull.config import PullConfig
from ferry.verbs.pull.plan import Journey, prepare
from ferry.verbs.pull.source import Fetched, Source


def run(config: PullConfig, reporter: Reporter) -> Result:
    journey = prepare(config)
    for choice in journey.choices:
        reporter.event("chosen", choice=choice)
    if journey.there is not None:
        check_sizes(journey.output, journey.there)
        return _result(journey, journey.there, already_there=True)
    assert journey.source is not None
    need_bytes = journey.source.write_bytes
    with (
        StagedDirectory(journey.output, need_bytes=need_bytes, overwrite=config.overwrite) as staged,
        journey.source.fetch(staged.work, reporter) as fetched,
    ):
        manifest = _manifest(config, journey.source, fetched, journey.output.name)
        (staged.work / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        staged.commit()
    return _result(journey, manifest, already_there=False)


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Refuse a directory that does not hold every file of its manifest in its size. Reads nothing."""
    for name, file in manifest.files.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != file.num_bytes:
            text = "is missing" if found is None else f"has {found} bytes"
            raise IntegrityError(
                f"{path} {text}, its manifest promises {file.num_bytes} bytes",
                code="pull.altered",
                repair="`ferry pull --overwrite` brings it again",
            )


def _manifest(config: PullConfig, source: Source, fetched: Fetched, name: str) -> Manifest:
    parent = fetched.parent
    return Manifest(
        kind="hf-model",
        name=name,
        verb="pull",
        summary=f"pulled from {fetched.description['kind']} {fetched.description['name']}",
        config={
            # A path says nothing on another machine, and no manifest holds one.
            "source": config.source if _is_name(fetched) else os.path.basename(source.label),
            "revision": config.revision,
            "source_state": source.state,
        },
        tensors=fetched.tensors,
        files=fetched.files,
        details={"source": fetched.description, "layout": {"files": _weight_files(fetched)}},
        changes=fetched.changes,
        parents=(parent.id,) if parent else (),
        lineage=parent.ancestry() if parent else (),
    )


def _weight_files(fetched: Fetched) -> list[str]:
    return sorted(name for name in fetched.files if name.endswith((".safetensors", ".bin")))


def _is_name(fetched: Fetched) -> bool:
    return fetched.description["kind"] == "hub" or "wheel" in fetched.description


def _result(journey: Journey, manifest: Manifest, *, already_there: bool) -> Result:
    return {
        "artifact": str(journey.output),
        "kind": manifest.kind,
        "source": journey.label,
        "choices": list(journey.choices),
        "bytes": sum(file.num_bytes for file in manifest.files.values()),
        "files": len(manifest.files),
        "tensors": len(manifest.tensors),
        "model_sha256": manifest.model_sha256,
        "already_there": already_there,
    }
