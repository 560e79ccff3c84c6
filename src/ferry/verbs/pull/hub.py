"""A model on a hub that speaks Hugging Face's protocol: found, described at one commit, its files chosen."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from ferry.core.errors import InputError, UnavailableError
from ferry.core.plan import PlannedFile
from ferry.core.progress import Reporter
from ferry.verbs.pull.choose import choose
from ferry.verbs.pull.client import endpoint, import_hub, is_true, network_errors, reason
from ferry.verbs.pull.local import open_directory
from ferry.verbs.pull.source import Fetched, Source
from ferry.verbs.pull.transfer import RemoteFile, Repository, fetch_repository, kept_bytes

ANSWER_TIMEOUT_S = 5.0


def open_hub(repo_id: str, revision: str) -> Source:
    """Ask the hub for a model; raise UnavailableError within seconds if it does not answer."""
    if is_true(os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")):
        return _open_hub_cache(repo_id, revision)
    repository = _describe(repo_id, revision)
    chosen = choose([file.name for file in repository.files], f"{repo_id} on the hub")
    files = tuple(file for file in repository.files if file.name in chosen.files)
    repository = repository._replace(files=files)
    kept = sum(min(kept_bytes(repository.folder / file.name), file.num_bytes) for file in files)
    left = sum(file.num_bytes for file in files) - kept
    return Source(
        label=f"{repo_id}@{repository.commit[:12]}",
        state=f"hub {repo_id}@{repository.commit}",
        files=tuple(PlannedFile(file.name, file.num_bytes) for file in files),
        read_bytes=left,
        write_bytes=left,
        fetch=lambda target, reporter: fetch_repository(repository, target, reporter),
        choices=(chosen.reason, *([f"resumes: {kept} bytes are here already"] if kept else [])),
    )


def _describe(repo_id: str, revision: str) -> Repository:
    hub = import_hub()
    errors = hub.errors
    where = endpoint()
    try:
        info = hub.HfApi(endpoint=where).model_info(
            repo_id, revision=revision, files_metadata=True, timeout=ANSWER_TIMEOUT_S
        )
    except errors.GatedRepoError:
        raise InputError(
            f"{repo_id} is gated", code="hub.gated", repair="accept its terms on the hub and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{repo_id} has no revision {revision!r} on {where}", code="hub.no-revision") from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{repo_id} is not on {where}, or is private",
            code="hub.not-found",
            repair="check the spelling; for a private one set HF_TOKEN",
        ) from None
    except network_errors(hub) as error:
        raise UnavailableError(
            f"the hub {where} does not answer ({reason(error)})",
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


def _open_hub_cache(repo_id: str, revision: str) -> Source:
    """Take the model from huggingface_hub's own cache, where an earlier program may have put it."""
    hub = import_hub()
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
