"""What a killed run leaves behind so that the next one goes on: a line for each block, and the states before the next.

A block counts once its line is there, and a line is written only after everything it tells of is on the disk. Of the
states (hidden activations between blocks) one file is kept, that of the last block that counts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ferry.core.errors import IntegrityError
from ferry.core.safetensors import make_header, read_header
from ferry.core.staging import sync_directory, write_file

Float32 = npt.NDArray[np.float32]
NUMPY_DTYPES = {"F32": np.float32, "U8": np.uint8}
LINES = "blocks.jsonl"


class WindowFile:
    """Hidden states [windows, tokens, channels] in float32 on the disk, read and written a window at a time.

    Calibration text may be long: what is in memory does not grow with it.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape
        self._window_bytes = 4 * shape[1] * shape[2]

    def read(self, window: int) -> Float32:
        """Return one window [T, H]."""
        count = self.shape[1] * self.shape[2]
        flat = np.fromfile(self.path, np.float32, count, offset=window * self._window_bytes)
        if len(flat) != count:
            raise IntegrityError(
                f"{self.path} ends inside window {window}",
                code="quantize.states",
                repair=f"remove {self.path.parent} and start again",
            )
        return flat.reshape(self.shape[1:])

    def write(self, window: int, values: Float32) -> None:
        """Put one window [T, H] into its place."""
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.seek(window * self._window_bytes)
            file.write(np.ascontiguousarray(values, np.float32).data.cast("B"))

    def publish(self, path: Path) -> None:
        """Sync the file and give it its final name."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        os.rename(self.path, path)
        sync_directory(path.parent)
        self.path = path


def journal_of(target: Path) -> Path:
    """Return where the journals of a run that makes `target` lie: hidden, beside it."""
    return target.parent / f".{target.name}.ferry-journal"


class Journal:
    """The lines and states of one pass, in a directory of their own.

    `identity` is a digest of all that decides the result: a journal of another one is thrown away.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        self.directory, self.identity = directory, identity
        self.lines: list[dict[str, Any]] = []
        head, *found = self._read() if (directory / LINES).is_file() else [{}]
        if head.get("identity") == identity and self._has_all_of(found):
            self.lines = [entry["line"] for entry in found]
        else:
            self.restart()

    def restart(self) -> None:
        """Begin anew: nothing of before counts."""
        self.lines = []
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        self._append({"identity": self.identity})

    @property
    def num_done(self) -> int:
        return len(self.lines)

    def add(self, line: Mapping[str, Any], states: Mapping[str, npt.NDArray[Any]] | WindowFile) -> None:
        """Let a block count: its states first, then its line; then the states before it are not needed any more."""
        if isinstance(states, WindowFile):
            states.publish(self._state(self.num_done + 1))
        elif states:
            write_tensors_file(self._state(self.num_done + 1), states)
        self._append({"line": dict(line), "states": bool(states)})
        self.lines.append(dict(line))
        self._state(self.num_done - 1).unlink(missing_ok=True)

    @property
    def has_states(self) -> bool:
        return self._state(self.num_done).is_file()

    def states(self) -> dict[str, npt.NDArray[Any]]:
        """Return the states behind the last block that counts."""
        return read_tensors_file(self._state(self.num_done))

    def windows(self, shape: tuple[int, int, int]) -> WindowFile:
        """Return the states behind the last block that counts, as windows on the disk."""
        return WindowFile(self._state(self.num_done), shape)

    def new_windows(self, shape: tuple[int, int, int]) -> WindowFile:
        """Return an empty file of windows, for the next `add`."""
        path = self.directory / "windows.partial"
        path.unlink(missing_ok=True)
        return WindowFile(path, shape)

    def _state(self, number: int) -> Path:
        return self.directory / f"states-{number:05}.safetensors"

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.directory / LINES, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self.directory)

    def _has_all_of(self, entries: list[dict[str, Any]]) -> bool:
        """Say whether the states behind the last line are there, if it had any."""
        return not entries or not entries[-1]["states"] or self._state(len(entries)).is_file()

    def _read(self) -> list[dict[str, Any]]:
        """Return all whole lines, the first with the identity; what a kill left behind them is cut off."""
        path = self.directory / LINES
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        os.truncate(path, end)
        try:
            return [json.loads(line) for line in data[:end].splitlines()] or [{}]
        except ValueError:
            return [{}]  # a disk that lost power may keep zeros: as good as no journal


def write_tensors_file(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], metadata: dict[str, str] | None = None
) -> None:
    """Write small named arrays (float32 and uint8) as a safetensors file that appears whole."""
    names = {np.dtype(kind): name for name, kind in NUMPY_DTYPES.items()}
    # Wide items first: every tensor then begins at a multiple of its items.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header = make_header(((name, names[array.dtype], array.shape) for name, array in ordered), metadata or {})
    write_file(path, header.raw, *(np.ascontiguousarray(array).data.cast("B") for _, array in ordered))


def read_tensors_file(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a file that `write_tensors_file` wrote."""
    found: dict[str, npt.NDArray[Any]] = {}
    header = read_header(path)
    for name, entry in header.tensors.items():
        if entry.dtype not in NUMPY_DTYPES:
            raise IntegrityError(f"{path}: {name} is {entry.dtype}, expected F32 or U8", code="quantize.states")
        count = (entry.end - entry.start) // np.dtype(NUMPY_DTYPES[entry.dtype]).itemsize
        flat = np.fromfile(path, NUMPY_DTYPES[entry.dtype], count, offset=entry.start)
        found[name] = flat.reshape(entry.shape)
    return found
