"""A model on a hub that speaks Hugging Face's protocol.

huggingface_hub finds the files and moves the bytes. What has arrived is kept here, in $FERRY_HOME/cache: that package
throws a partial file away when its process ends, and a model of many gigabytes deserves better. Each file is checked by
hash, and when all are there they are linked into the output.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from ferry.core.errors import FerryError, InputError, IntegrityError, UnavailableError
from ferry.core.plan import PlannedFile
from ferry.core.progress import Reporter
from ferry.verbs.pull.cache import cache, locked
from ferry.verbs.pull.choose import check_complete, choose
from ferry.verbs.pull.digest import Digested, digest_file, git_blob_sha1
from ferry.verbs.pull.local import open_directory
from ferry.verbs.pull.source import Fetched, Source

ANSWER_TIMEOUT_S = 5.0


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


def open_hub(repo_id: str, revision: str) -> Source:
    """Ask the hub for a model; raise UnavailableError within seconds if it does not answer."""
    if _is_true(os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")):
        return _open_hub_cache(repo_id, revision)
    repository = _describe(repo_id, revision)
    chosen = choose([file.name for file in repository.files], f"{repo_id} on the hub")
    files = tuple(file for file in repository.files if file.name in chosen.files)
    repository = repository._replace(files=files)
    kept = sum(min(_kept_bytes(repository.folder / file.name), file.num_bytes) for file in files)
    left = sum(file.num_bytes for file in files) - kept
    return Source(
        label=f"{repo_id}@{repository.commit[:12]}",
        state=f"hub {repo_id}@{repository.commit}",
        files=tuple(PlannedFile(file.name, file.num_bytes) for file in files),
        read_bytes=left,
        write_bytes=left,
        fetch=lambda target, reporter: _fetch(repository, target, reporter),
        choices=(chosen.reason, *([f"resumes: {kept} bytes are here already"] if kept else [])),
    )


def _describe(repo_id: str, revision: str) -> Repository:
    hub = _import_hub()
    errors = hub.errors
    endpoint = _endpoint()
    try:
        info = hub.HfApi(endpoint=endpoint).model_info(
            repo_id, revision=revision, files_metadata=True, timeout=ANSWER_TIMEOUT_S
        )
    except errors.GatedRepoError:
        raise InputError(
            f"{repo_id} is gated", code="hub.gated", repair="accept its terms on the hub and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repo_id} has no revision {revision!r} on {endpoint}", code="hub.no-revision") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{repo_id} is not on {endpoint}, or is private",
            code="hub.not-found",
            repair="check the spelling; for a private one set HF_TOKEN",
        ) from None
    except _network_errors(hub) as error:
        raise UnavailableError(
            f"the hub {endpoint} does not answer ({_reason(error)})",
            code="hub.unreachable",
            repair="check the network, set HF_ENDPOINT to a mirror, or pull a directory or a GGUF file",
        ) from None
    files = tuple(_remote_file(sibling) for sibling in info.siblings or [])
    return Repository(repo_id, info.sha, files)


def _remote_file(sibling: Any) -> RemoteFile:
    name = sibling.rfilename
    if name.startswith("/") or ".." in Path(name).parts:
        raise InputError(f"the hub names a file {name!r} outside its repository", code="hub.file-name")
    return RemoteFile(name, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else "", sibling.blob_id or "")


@contextmanager
def _fetch(repository: Repository, target: Path, reporter: Reporter) -> Iterator[Fetched]:
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
    partial = path.with_name(f"{path.name}.partial")
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
    hub = _import_hub()
    from huggingface_hub.file_download import http_get

    partial.touch()
    if partial.stat().st_size > file.num_bytes:
        os.truncate(partial, 0)
    here = partial.stat().st_size
    if here == file.num_bytes:
        return
    url = hub.hf_hub_url(repository.id, file.name, revision=repository.commit, endpoint=_endpoint())
    # Compressed on the way, a file could not be resumed at a byte.
    headers = {**hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
    reporter.start(f"downloading {file.name}", file.num_bytes - here)
    try:
        with _ReportingFile(partial, reporter) as target, _no_progress_bars(hub):
            target.seek(here)
            # Its size check is left to ours: it refuses plain downloads of more than 50 GB.
            http_get(url, target, resume_size=here, headers=headers)
    except _network_errors(hub) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UnavailableError(
            f"the transfer of {file.name} stopped at byte {partial.stat().st_size} of {file.num_bytes} "
            f"({_reason(error)})",
            code="hub.interrupted",
            repair="pull again: it goes on from there",
        ) from None
    reporter.finish()
    if partial.stat().st_size < file.num_bytes:
        raise UnavailableError(
            f"the transfer of {file.name} stopped at byte {partial.stat().st_size} of {file.num_bytes}",
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


def _open_hub_cache(repo_id: str, revision: str) -> Source:
    """Take the model from huggingface_hub's own cache, where an earlier program may have put it."""
    hub = _import_hub()
    try:
        snapshot = Path(hub.snapshot_download(repo_id, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        raise UnavailableError(
            f"HF_HUB_OFFLINE is set and {repo_id} is not in the hub's cache",
            code="hub.offline",
            repair="unset it, or pull a directory or a GGUF file",
        ) from None
    source = open_directory(snapshot)

    def fetch(target: Path, reporter: Reporter) -> nullcontext[Fetched]:
        with source.fetch(target, reporter) as fetched:
            description = {"kind": "hub", "name": repo_id, "commit": snapshot.name}
            return nullcontext(replace(fetched, description=description))

    return replace(
        source,
        label=f"{repo_id}@{snapshot.name[:12]}",
        state=f"hub {repo_id}@{snapshot.name}",
        fetch=fetch,
        choices=("from the hub's cache: HF_HUB_OFFLINE is set", *source.choices),
    )


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _kept_bytes(path: Path) -> int:
    for candidate in (path, path.with_name(f"{path.name}.partial")):
        if candidate.is_file():
            return candidate.stat().st_size
    return 0


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _is_true(text: str | None) -> bool:
    return (text or "").upper() in ("1", "ON", "YES", "TRUE")


def _import_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UnavailableError(
            "reading from a hub needs the package huggingface_hub",
            code="hub.package",
            repair="pip install 'llmferry[pull]'",
        ) from None
    return huggingface_hub


def _network_errors(hub: Any) -> tuple[type[Exception], ...]:
    """Return what the client's HTTP library raises: requests' errors are OSErrors, httpx' have a base of their own."""
    return (hub.errors.HfHubHTTPError.__mro__[1], OSError)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _no_progress_bars(hub: Any) -> Iterator[None]:
    """Progress is the reporter's; the client's own bars stay off meanwhile."""
    were_off = hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            hub.utils.enable_progress_bars()
