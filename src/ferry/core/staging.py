"""Outputs appear whole or not at all.

A `StagedDirectory` is written under a temporary name beside its target, synced, and renamed at the end. A second writer
on the same target is refused by a lock; a stale temporary directory left by a killed process is removed by the next
writer, or taken up by one that `keeps` it. The target must not exist, unless `overwrite` is set: then the old one stays
until the new one is complete.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from ferry.core.errors import OutputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StagedDirectory:
    """A directory being made. Use as a context manager; `commit()` inside it makes the result visible.

    With `keeps`, what a killed or interrupted writer left is still there, and a full disk does not take it away: the
    writer says itself what of it counts. Other errors remove it.
    """

    def __init__(self, target: Path, *, need_bytes: int = 0, overwrite: bool = False, keeps: bool = False) -> None:
        self.target = Path(os.path.abspath(target))
        self.work = self.target.parent / f".{self.target.name}.ferry-partial"
        self._lock_path = self.target.parent / f".{self.target.name}.ferry-lock"
        self._need_bytes = need_bytes
        self._overwrite = overwrite
        self._keeps = keeps
        self._lock_fd = -1
        self._made_parents: list[Path] = []

    def __enter__(self) -> StagedDirectory:
        check_target(self.target, self._need_bytes, overwrite=self._overwrite)
        parent = self.target.parent
        self._made_parents = [path for path in (parent, *parent.parents) if not path.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._lock_fd = os.open(self._lock_path, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise OutputError(
                f"cannot write beside {self.target}: {error.strerror}",
                code="output.unwritable",
                repair="choose another",
            ) from None
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder removes the file: a lock on a removed file locks nothing.
            if os.fstat(self._lock_fd).st_ino != os.stat(self._lock_path).st_ino:
                raise BlockingIOError
        except OSError:
            os.close(self._lock_fd)
            raise OutputError(
                f"another process is writing {self.target}", code="output.busy", repair="wait for it, or choose another"
            ) from None
        # A second look under the lock: another writer may have finished between the check and the lock.
        try:
            check_target(self.target, self._need_bytes, overwrite=self._overwrite)
            if not self._keeps:
                self.clear()
            self.work.mkdir(exist_ok=True)
        except BaseException:
            self._release()
            raise
        return self

    def clear(self) -> None:
        """Throw away what was written so far."""
        shutil.rmtree(self.work, ignore_errors=True)

    def commit(self) -> None:
        """Sync everything that was written and give it its final name."""
        sync_tree(self.work)
        if self._overwrite and self.target.exists():
            retired = self.target.parent / f".{self.target.name}.ferry-retired"
            shutil.rmtree(retired, ignore_errors=True)
            os.rename(self.target, retired)
            os.rename(self.work, self.target)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.rename(self.work, self.target)
        sync_directory(self.target.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_full = isinstance(error, OSError) and error.errno in FULL
        stays = self._keeps and error is not None and (is_full or not isinstance(error, Exception))
        if not stays:
            self.clear()
        self._release()
        if error is not None and not stays:
            for path in self._made_parents:
                if path.exists() and not any(path.iterdir()):
                    path.rmdir()
        if stays:
            say_kept(error)
        check_full(error, self.target, kept=self.work.name if stays else "", need_bytes=self._need_bytes)

    def _release(self) -> None:
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock_fd)


def check_full(error: BaseException | None, target: Path, *, kept: str = "", need_bytes: int = 0) -> None:
    """Raise OutputError for an error that says that a disk, a quota or the largest size of a file is used up."""
    if not isinstance(error, OSError) or error.errno not in FULL:
        return
    what = "a file grew beyond what the system allows" if error.errno == errno.EFBIG else "the disk filled up"
    held = f"what is done is in {kept}" if kept else "nothing of it was kept"
    again = ", and run the same command again" if kept else ", or choose another place"
    room = "raise the limit (ulimit -f)" if error.errno == errno.EFBIG else f"free {_size(need_bytes)} there"
    raise OutputError(f"{what} while writing {target}; {held}", code="output.disk-full", repair=room + again) from None


def say_kept(error: BaseException | None) -> None:
    """Note on what stops a run that the same command goes on from here: the command line says so."""
    if error is not None and not isinstance(error, Exception):
        error.__dict__["ferry_kept"] = True


def check_target(target: Path, need_bytes: int = 0, *, overwrite: bool = False) -> None:
    """Refuse a target that exists, cannot be written, or lies on a disk with too little room. Writes nothing."""
    is_empty_directory = target.is_dir() and not any(target.iterdir())
    if os.path.lexists(target) and not overwrite and not is_empty_directory:
        raise OutputError(
            f"{target} exists already", code="output.exists", repair="choose another, remove it, or --overwrite"
        )
    above = next(path for path in target.parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK) or os.statvfs(above).f_flag & os.ST_RDONLY:
        raise OutputError(f"{above} is not writable", code="output.unwritable", repair="choose another place")
    free_bytes = shutil.disk_usage(above).free
    if need_bytes > free_bytes:
        raise OutputError(
            f"{target} needs {_size(need_bytes)}, {above} has {_size(free_bytes)} free",
            code="output.disk-full",
            repair="free some, or choose another place",
        )


def check_apart(target: Path, *inputs: Path | None) -> None:
    """Refuse a target that is, or holds, something to be read: with `overwrite` it would be removed."""
    real = Path(os.path.realpath(target))  # unlike Path.resolve, it says nothing of links that lead to themselves
    for path in inputs:
        if path is not None and Path(os.path.realpath(path)).is_relative_to(real):
            raise OutputError(
                f"{target} is, or holds, the source {path}", code="output.is-source", repair="choose another target"
            )


def write_file(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file, given in parts, so that it appears whole: temporary name, sync, rename."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync_directory(path.parent)


def sync_tree(top: Path) -> None:
    for folder, _, names in os.walk(top):
        for name in names:
            fd = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_directory(Path(folder))


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
