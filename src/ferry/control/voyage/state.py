"""What a voyage remembers, in `OUTPUT/.ferry/voyage`, so that it can be continued after anything, a kill -9 included.

    voyage.json       whose directory this is
    lock              held while a voyage is under way
    steps/NAME.json   a finished step: identity, result, what it cost, what it made; written whole, when it is done
    claims/NAME.json  the target a step is about to make; removed when it is done
    logs/NAME.log     what a command wrote

A target is replaced only if this voyage made it: a finished step says so and its content is what was made, or a claim
says that the place was free before and the manifest there was written since.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ferry.control.voyage.identity import content_id
from ferry.control.voyage.voyage import Voyage
from ferry.core.errors import FerryError, OutputError
from ferry.core.manifest import MANIFEST_NAME, read_manifest
from ferry.core.staging import write_file

SCHEMA = "ferry.voyage/1"
REPORT_NAME = "report.html"
OUTPUT = "${output}"


class State:
    """The memory of one voyage. Reading needs no lock; writing happens inside `locked()`."""

    def __init__(self, voyage: Voyage) -> None:
        self.output = voyage.output
        self.name = voyage.name
        self.folder = voyage.output / ".ferry" / "voyage"

    def check(self) -> None:
        """Refuse a directory that belongs to another voyage, or holds a report that no voyage made."""
        owner = _read(self.folder / "voyage.json")
        if owner and owner.get("name") != self.name:
            text = f"{self.output} belongs to the voyage {owner.get('name')!r}, not to {self.name!r}"
            raise OutputError(text, code="run.foreign-output", repair="choose another with --output")
        if not owner and os.path.lexists(self.output / REPORT_NAME):
            text = f"{self.output / REPORT_NAME} exists and was not made by a voyage"
            raise OutputError(text, code="run.foreign-output", repair="choose another directory with --output")
        if self.output.exists() and not self.output.is_dir():
            raise OutputError(f"{self.output} is not a directory", code="run.foreign-output", repair="choose another")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the voyage for this process; the lock goes with the process, however it ends."""
        self.check()
        try:
            for folder in ("steps", "claims", "logs"):
                (self.folder / folder).mkdir(parents=True, exist_ok=True)
            lock_fd = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            text = f"cannot write {self.folder}: {error.strerror}"
            raise OutputError(text, code="output.unwritable", repair="choose another place with --output") from None
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(self.folder / "voyage.json", {"schema": SCHEMA, "name": self.name})
            yield
        except BlockingIOError:
            text = f"the voyage in {self.output} is under way in another process"
            raise OutputError(text, code="output.busy", repair="wait for it, or choose another --output") from None
        finally:
            os.close(lock_fd)

    def finished(self, step: str) -> dict[str, Any] | None:
        """Return what is remembered of a step that was finished, or None."""
        return _read(self.folder / "steps" / f"{step}.json", self.output)

    def finish(self, step: str, entry: dict[str, Any]) -> None:
        """Remember a finished step, for good."""
        _write(self.folder / "steps" / f"{step}.json", entry, self.output)
        (self.folder / "claims" / f"{step}.json").unlink(missing_ok=True)

    def claim(self, step: str, verb: str, target: Path) -> bool:
        """Note that a step is about to make a target; return whether the target is the voyage's to replace or make."""
        own = not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())) or self.is_ours(target)
        if own:
            claim = {"target": self._relative(target), "verb": verb, "since": _now()}
            _write(self.folder / "claims" / f"{step}.json", claim)
        return own

    def is_ours(self, target: Path) -> bool:
        """Return whether this voyage made what is at a target, and nobody changed it since."""
        place = self._relative(target)
        for path in sorted((self.folder / "steps").glob("*.json")):
            made = (_read(path) or {}).get("made") or {}
            if made.get("target") == place and made.get("content") == made_id(target):
                return True
        claims = [_read(path) or {} for path in sorted((self.folder / "claims").glob("*.json"))]
        return any(claim.get("target") == place and _made_since(target, claim) for claim in claims)

    def is_intact(self, entry: dict[str, Any]) -> bool:
        """Return whether the artifact that a finished step made or found is still there as it was."""
        artifact = entry.get("artifact") or {}
        if not artifact:
            return True
        path = self.output / artifact["target"]
        return path.exists() and made_id(path) == str(artifact["content"])

    def describe(self, target: Path) -> dict[str, str]:
        """Return how a finished step remembers an artifact."""
        return {"target": self._relative(target), "content": made_id(target)}

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path, self.output)


def made_id(path: Path) -> str:
    """Return the content id of an artifact; what cannot be read or was altered has none."""
    try:
        return content_id(path) if path.exists() else ""
    except FerryError:
        return ""


def _made_since(target: Path, claim: dict[str, Any]) -> bool:
    if not (target / MANIFEST_NAME).is_file():
        return False
    try:
        manifest = read_manifest(target)
    except FerryError:
        return False
    return manifest.verb == claim["verb"] and manifest.created >= str(claim["since"])


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _read(path: Path, output: Path | None = None) -> dict[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text.replace(OUTPUT, _quoted(output)) if output else text)
    except (OSError, ValueError):
        return None  # never written, or by another hand: then the step counts as not finished, which loses only time
    return document if isinstance(document, dict) else None


def _write(path: Path, document: dict[str, Any], output: Path | None = None) -> None:
    """Write a document; paths below the output are kept without it, so that the voyage's folder may be moved."""
    text = json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n"
    write_file(path, (text.replace(_quoted(output), OUTPUT) if output else text).encode())


def _quoted(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)[1:-1]
