"""The files of a hub repository, brought into Ferry's cache, checked, and linked into the output.

What has arrived is kept in $FERRY_HOME/cache until the output is visible: huggingface_hub throws a partial file away
when its process ends, and a model of many gigabytes deserves better.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from ferry.core.errors import FerryError, IntegrityError, UnavailableError
from ferry.core.progress import Reporter
from ferry.verbs.pull.cache import cache, locked
from ferry.verbs.pull.choose import check_complete
from ferry.verbs.pull.client import endpoint, import_hub, network_errors, no_progress_bars, reason
from ferry.verbs.pull.digest import Digested, digest_file, git_blob_sha1
from ferry.verbs.pull.source import Fetched


class RemoteFile(NamedTuple):
    """A file as the hub describes it: the sha256 of large files, the git id of small ones."""

    name: str
    num_bytes: int
    sha256: str
    blob_id: str


class Repository(NamedTuple):
    """A repository at one commit."""

    id: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def folder(self) -> Path:
        return cache() / "hub" / self.id.replace("/", "--") / self.commit


def kept_bytes(path: Path) -> int:
    for candidate in (path, path.with_name(f".partial-{path.name}")):
        if candidate.is_file():
            return candidate.stat().st_size
    return 0


@contextmanager
def fetch_repository(repository: Repository, target: Path, reporter: Reporter) -> Iterator[Fetched]:
    folder = repository.folder
    with locked(folder):
        digests: dict[str, Digested] = {}
        for file in repository.files:
            digests[file.name] = _bring(repository, file, reporter)
        for file in repository.files:
            _link(folder / file.name, target / file.name)
        weights = {name: found.tensors for name, found in digests.items() if name.endswith(".safetensors")}
        description = {"kind": "hub", "name": repository.id, "commit": repository.commit}
        files = {name: found.file for name, found in digests.items()}
        yield Fetched(check_complete(target, weights), files, description)
        shutil.rmtree(folder)


def _bring(repository: Repository, file: RemoteFile, reporter: Reporter) -> Digested:
    """Return the digests of a file that is complete in the cache and is what the hub promises."""
    path = repository.folder / file.name
    partial = path.with_name(f".partial-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _download(repository, file, partial, reporter)
    arrived = path if path.exists() else partial
    reporter.start(f"checking {file.name}", file.num_bytes)
    try:
        digested = digest_file(arrived, reporter, whole=bool(file.sha256))
        _compare(file, arrived, digested)
    except FerryError as error:
        arrived.unlink()
        raise IntegrityError(
            f"{file.name} of {repository.id} did not arrive as promised: {error.message}",
            code="pull.hash",
            repair="it was removed: pull again; if it happens again the hub's copy is damaged",
        ) from None
    reporter.finish()
    os.rename(arrived, path)
    reporter.event("checked", file=file.name, sha256=digested.sha256 or digested.file.sha256)
    return digested


def _compare(file: RemoteFile, path: Path, digested: Digested) -> None:
    found, promised = "", ""
    if file.sha256:
        found, promised = digested.sha256, file.sha256
    elif file.blob_id:
        found, promised = git_blob_sha1(path), file.blob_id
    if digested.file.num_bytes != file.num_bytes or found != promised:
        raise IntegrityError(
            f"{digested.file.num_bytes} bytes with hash {found}, expected {file.num_bytes} with {promised}",
            code="pull.hash",
        )


def _download(repository: Repository, file: RemoteFile, partial: Path, reporter: Reporter) -> None:
    """Bring the bytes that are missing from a partial file."""
    hub = import_hub()
    from huggingface_hub.file_download import http_get

    partial.touch()
    if partial.stat().st_size > file.num_bytes:
        os.truncate(partial, 0)
    here = partial.stat().st_size
    if here == file.num_bytes:
        return
    url = hub.hf_hub_url(repository.id, file.name, revision=repository.commit, endpoint=endpoint())
    # Compressed on the way, a file could not be resumed at a byte.
    headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
    reporter.start(f"downloading {file.name}", file.num_bytes - here)
    try:
        with _ReportingFile(partial, reporter) as target, no_progress_bars(hub):
            target.seek(here)
            # Its size check is left to ours: it refuses plain downloads of more than 50 GB.
            http_get(url, target, resume_size=here, headers=headers)
    except network_errors(hub) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _interrupted(file, partial, reason(error)) from None
    reporter.finish()
    if partial.stat().st_size < file.num_bytes:
        raise _interrupted(file, partial, "the server closed the connection")


def _interrupted(file: RemoteFile, partial: Path, why: str) -> UnavailableError:
    here = partial.stat().st_size
    return UnavailableError(
        f"the transfer of {file.name} stopped at byte {here} of {file.num_bytes} ({why})",
        code="hub.interrupted",
        repair="pull again: it goes on from there",
    )


class _ReportingFile(FileIO):
    """A file that tells a reporter how many bytes were written."""

    def __init__(self, path: Path, reporter: Reporter) -> None:
        super().__init__(path, "r+b")
        self._reporter = reporter

    def write(self, data: Any) -> int:
        written = super().write(data)
        self._reporter.advance(written)
        return written


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
