"""What a pull would do: which source is meant, what it holds, and whether it is here already."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ferry.core.errors import InputError, UnavailableError, did_you_mean
from ferry.core.manifest import MANIFEST_NAME, Manifest, read_manifest
from ferry.core.plan import Plan, PlannedFile
from ferry.core.staging import check_target
from ferry.verbs.pull.builtin import open_builtin
from ferry.verbs.pull.catalogue import BUILTINS
from ferry.verbs.pull.config import PullConfig
from ferry.verbs.pull.gguf import open_gguf
from ferry.verbs.pull.hub import open_hub
from ferry.verbs.pull.local import open_directory
from ferry.verbs.pull.source import Source

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
MEMORY_BYTES = 120_000_000  # Python, numpy and a block of rows; it does not grow with the model


class Journey(NamedTuple):
    """A pull, thought through. `there` is the manifest of what is here already; then `source` may be None."""

    output: Path
    label: str
    source: Source | None
    there: Manifest | None
    choices: tuple[str, ...]


def plan(config: PullConfig) -> Plan:
    journey = prepare(config)
    source, there = journey.source, journey.there
    if there is not None:
        files = () if "wheel" in there.details["source"] else _planned(there)
        return _plan(journey, f"{journey.output} holds it already", there.config["source_state"], files)
    assert source is not None
    check_target(journey.output, source.write_bytes, overwrite=config.overwrite)
    return replace(
        _plan(journey, f"bring {journey.label} to {journey.output}", source.state, source.files),
        read_bytes=source.read_bytes,
        write_bytes=source.write_bytes,
        memory_bytes=MEMORY_BYTES,
    )


def _plan(journey: Journey, summary: str, state: str, files: tuple[PlannedFile, ...]) -> Plan:
    """Return a plan that is the same before and after the pull, so that a voyage can tell that it was done."""
    inputs = {"source": state}
    return Plan("pull", summary, inputs, str(journey.output), tuple(sorted(files)), choices=journey.choices)


def _planned(manifest: Manifest) -> tuple[PlannedFile, ...]:
    return tuple(PlannedFile(name, file.num_bytes) for name, file in manifest.files.items())


def prepare(config: PullConfig) -> Journey:
    """Find the source and look whether the output holds it already. Writes nothing."""
    output = config.output or Path(_name(config.source))
    there = None
    if (output / MANIFEST_NAME).is_file() and not config.overwrite:
        there = read_manifest(output)
    if there is not None and config.source in BUILTINS and there.config.get("source") == config.source:
        return Journey(output, config.source, None, there, ("it was pulled under this name",))
    try:
        source = open_source(config)
    except UnavailableError as error:
        asked = {"source": config.source, "revision": config.revision}
        if there is not None and {key: there.config.get(key) for key in asked} == asked:
            return Journey(output, config.source, None, there, (f"not compared with the hub: {error.message}",))
        raise
    if there is not None and there.config.get("source_state") == source.state:
        return Journey(output, source.label, source, there, ("the source has not changed since",))
    return Journey(output, source.label, source, None, source.choices)


def open_source(config: PullConfig) -> Source:
    """Return what the user's word for a source stands for."""
    word = config.source
    path = Path(word).expanduser()
    if word in BUILTINS:
        return open_builtin(BUILTINS[word])
    if path.is_dir():
        return open_directory(path)
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path, config.tokenizer)
    if HUB_ID.match(word) and not path.exists() and path.suffix != ".gguf":
        return open_hub(word, config.revision)
    found = "is neither a directory nor a .gguf file" if path.exists() else "is not there"
    raise InputError(
        f"{word} {found}{did_you_mean(word, list(BUILTINS))}",
        code="pull.source",
        repair=f"give a hub id (OWNER/NAME), a directory, a .gguf file, or a built-in name: {', '.join(BUILTINS)}",
    )


def _name(word: str) -> str:
    name = Path(word).expanduser().resolve().name
    return name.removesuffix(".gguf") or "model"
