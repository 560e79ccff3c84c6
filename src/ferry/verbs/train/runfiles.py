"""The directory of a run: what lies where, whether it can be gone on with, and the documents in it.

run.json       what was asked for and decided; the identity says which runs may go on here
result.json    written last, when the run is done
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ferry.core.errors import InputError, OutputError, UnavailableError
from ferry.core.staging import write_file
from ferry.formats.fingerprint import damaged_files, manifest_of
from ferry.formats.training import list_steps
from ferry.verbs.train.claim import COMMAND, CREW, CREW_LIMIT_S, claim

RUN, RESULT = "run.json", "result.json"
JOIN_LIMIT_S, JOIN_POLL_S = 600.0, 0.2
RESULTS = ("model", "adapter", "merged", "megatron")
"""Directories of artifacts, made at the end."""


def check_output(output: Path, identity: Mapping[str, Any], *, overwrite: bool) -> str:
    """Refuse a directory that holds something else; return in words what would happen with a run that is there."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file, expected a directory", code="output.exists", repair="choose another")
    if overwrite or not output.exists() or not _holds_something(output):
        return ""
    earlier = read_document(output / RUN)
    if not earlier:
        raise OutputError(
            f"{output} exists and holds no training run", code="output.exists", repair="choose another, or remove it"
        )
    found = earlier.get("identity", {})
    differing = [key for key in identity if found.get(key) != identity[key]]
    if differing:
        raise OutputError(
            f"{output} holds a run with other settings: "
            f"{'; '.join(_difference(key, found, identity) for key in differing)}",
            code="output.exists",
            repair="choose another --output, or --overwrite to begin anew",
        )
    steps = list_steps(output / "checkpoints")
    return f"goes on with the run in {output.name}" + (f" after step {steps[0]}" if steps else "")


def _holds_something(directory: Path) -> bool:
    """Say whether a directory holds more than what a kill left of the first document."""
    return any(not (path.name.startswith(f".{RUN}.") and path.name.endswith(".tmp")) for path in directory.iterdir())


def _difference(key: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    left, right = found.get(key), wanted[key]
    if isinstance(left, dict) and isinstance(right, dict):
        parts = [
            f"{key}.{name} {left.get(name)} -> {right.get(name)}"
            for name in {**left, **right}
            if left.get(name) != right.get(name)
        ]
        return ", ".join(parts)
    return f"{key} {left} -> {right}"


def begin(output: Path, document: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make the directory of a run, or empty that of an earlier one, and write what the run is."""
    if overwrite and output.exists():
        if _holds_something(output) and not (output / RUN).is_file():
            raise OutputError(
                f"{output} holds no training run: it is not replaced", code="output.exists", repair="remove it by hand"
            )
        with claim(output / COMMAND), claim(output / CREW, CREW_LIMIT_S):
            pass  # nobody works in it any more
        retired = output.with_name(f".{output.name}.ferry-retired")
        shutil.rmtree(retired, ignore_errors=True)
        output.rename(retired)
        shutil.rmtree(retired)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_document(output / RUN, document)
    except OSError as error:
        raise OutputError(
            f"cannot write to {output}: {error.strerror}", code="output.unwritable", repair="choose another"
        ) from None


def await_begin(output: Path, identity: str) -> None:
    """Wait, on another node than the first, until the first has begun this run in the directory that all see."""
    deadline_s = time.monotonic() + JOIN_LIMIT_S
    while read_document(output / RUN).get("decided", {}).get("identity") != identity:
        if time.monotonic() > deadline_s:
            raise UnavailableError(
                f"the first node has not begun this run in {output} within {JOIN_LIMIT_S:.0f} s",
                code="train.node-lost",
                repair="start the same command on every node, with an output on a file system that all see",
            )
        time.sleep(JOIN_POLL_S)


def finished(output: Path, identity: str, steps: int, wanted: Collection[str]) -> dict[str, Any]:
    """Return the result of a run that is done, with all that is wanted of it there and whole; else nothing."""
    result = read_document(output / RESULT)
    made: dict[str, Any] = result.get("artifacts", {})
    if result.get("identity") != identity or result.get("steps") != steps or set(made) != set(wanted):
        return {}
    for name, item in made.items():
        manifest = manifest_of(output / name)
        if manifest is None or manifest.model_sha256 != item["sha256"] or damaged_files(output / name, manifest):
            return {}
        item["path"] = str(output / name)
    main = next(iter(made), None)
    return {**result, "output": str(output), "artifact": str(output / main) if main else None}


def identity_of(values: Mapping[str, Any], data_sha256: str) -> str:
    """Return one digest of everything two runs must share to go on with each other's checkpoints."""
    return hashlib.sha256(json.dumps({**values, "data": data_sha256}, sort_keys=True).encode()).hexdigest()


def read_document(path: Path) -> dict[str, Any]:
    """Return a JSON document of a run, or nothing if it is not there."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", code="train.run-file", repair="remove the run") from None
    return document


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    write_file(path, (json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n").encode())
