"""A token file: samples tokenised once, memory-mapped, hashed.

    DIRECTORY/tokens.bin       int32, all samples behind each other
    DIRECTORY/supervised.bin   uint8, one a token: 1 = to be learned
    DIRECTORY/offsets.bin      int64, where each sample begins, and one more: the end
    DIRECTORY/picture*.bin     pictures, where samples may have some (`vision/listing.py`)
    DIRECTORY/index.json       written last: schema, counts, sha256 of the files, and how they were made

A directory appears whole or not at all. Reading maps the files: memory does not grow with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ferry.core.errors import IntegrityError
from ferry.core.staging import write_file
from ferry.data.rendering import Tokens
from ferry.data.vision.listing import PICTURE_FILES, PictureList, PictureWriter, picture_sizes
from ferry.data.vision.pictures import Picture

SCHEMA = "ferry.tokens/1"
INDEX_NAME = "index.json"
FILES: dict[str, np.dtype[Any]] = {
    "tokens.bin": np.dtype("<i4"),
    "supervised.bin": np.dtype("u1"),
    "offsets.bin": np.dtype("<i8"),
}

Int64 = npt.NDArray[np.int64]


class Samples(Protocol):
    """Anything that gives samples by number: a token file, a part of one, several mixed."""

    @property
    def num_samples(self) -> int: ...

    @property
    def lengths(self) -> Int64: ...

    @property
    def sha256(self) -> str: ...

    def sample(self, index: int) -> Tokens: ...


class TokenSet:
    """An open token file."""

    def __init__(self, directory: Path, index: Mapping[str, Any]) -> None:
        self.directory = directory
        self.index = index
        self.num_samples: int = index["num_samples"]
        self.num_tokens: int = index["num_tokens"]
        self.num_supervised: int = index["num_supervised"]
        self.sha256: str = index["sha256"]
        maps = {name: np.memmap(directory / name, dtype=dtype, mode="r") for name, dtype in FILES.items()}
        self._tokens, self._supervised, self._offsets = (maps[name] for name in FILES)
        self.pictures = PictureList(directory, index) if "num_pictures" in index else None

    @classmethod
    def open(cls, directory: Path, *, digests: bool = False) -> TokenSet:
        """Open a token file; check its sizes, and with `digests` every byte."""
        index = read_index(directory)
        for name, num_bytes in _sizes(index).items():
            path = directory / name
            found = path.stat().st_size if path.is_file() else -1
            if found != num_bytes:
                raise _damaged(path, f"has {max(found, 0)} bytes, expected {num_bytes}")
            if digests and _digest(path) != index["files"][name]:
                raise _damaged(path, "has other bytes than were written")
        return cls(directory, index)

    @property
    def lengths(self) -> Int64:
        """Return the number of tokens of each sample."""
        return np.asarray(np.diff(self._offsets), np.int64)

    def sample(self, index: int) -> Tokens:
        """Return a copy of one sample."""
        first, last = int(self._offsets[index]), int(self._offsets[index + 1])
        ids_T, supervised_T = self._tokens[first:last], self._supervised[first:last]
        pictures = self.pictures.of(index) if self.pictures is not None else ()
        return Tokens(np.array(ids_T, np.int32), np.array(supervised_T, np.bool_), pictures)


class TokenWriter:
    """Writes a token file into a directory that exists. Use as a context manager, then `finish`."""

    def __init__(self, directory: Path, *, with_pictures: bool = False) -> None:
        self.directory = directory
        self.num_samples = self.num_tokens = self.num_supervised = 0
        self._pictures = PictureWriter() if with_pictures else None
        self._dtypes = {**FILES, **(PICTURE_FILES if with_pictures else {})}
        self._files = {name: open(directory / name, "wb") for name in self._dtypes}  # noqa: SIM115 - closed by __exit__
        self._digests = {name: hashlib.sha256() for name in self._dtypes}
        for name in self._dtypes:
            if name.endswith("offsets.bin"):
                self._write(name, np.zeros(1, np.int64))

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(
        self, ids_T: npt.NDArray[Any], supervised_T: npt.NDArray[Any], lengths: Sequence[int] | Int64,
        pictures: Sequence[tuple[Picture, ...]] = (),
    ) -> None:  # fmt: skip
        """Append samples that lie behind each other."""
        ends = self.num_tokens + np.cumsum(np.asarray(lengths, np.int64))
        assert int(np.sum(lengths)) == len(ids_T) == len(supervised_T)
        self._write("tokens.bin", ids_T)
        self._write("supervised.bin", supervised_T)
        self._write("offsets.bin", ends)
        if self._pictures is not None:
            for name, values in self._pictures.rows(pictures).items():
                self._write(name, values)
        self.num_samples += len(ends)
        self.num_tokens += len(ids_T)
        self.num_supervised += int(np.count_nonzero(supervised_T))

    def finish(self, described: Mapping[str, Any]) -> None:
        """Close the files and write the index."""
        self.__exit__()
        files = {name: digest.hexdigest() for name, digest in self._digests.items()}
        index = {
            "schema": SCHEMA,
            "sha256": hashlib.sha256("".join(files.values()).encode()).hexdigest(),
            "num_samples": self.num_samples,
            "num_tokens": self.num_tokens,
            "num_supervised": self.num_supervised,
            "files": files,
            **(self._pictures.described() if self._pictures is not None else {}),
            **described,
        }
        write_file(self.directory / INDEX_NAME, (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())

    def _write(self, name: str, values: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(values, self._dtypes[name]).tobytes()
        self._files[name].write(data)
        self._digests[name].update(data)


def read_index(directory: Path) -> dict[str, Any]:
    """Return the index of a token file."""
    path = directory / INDEX_NAME
    try:
        index: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path, f"cannot be read: {error}") from None
    if index.get("schema") != SCHEMA:
        raise _damaged(path, f"has schema {index.get('schema')!r}, expected {SCHEMA!r}")
    return index


def _sizes(index: Mapping[str, Any]) -> dict[str, int]:
    items = (index["num_tokens"], index["num_tokens"], index["num_samples"] + 1)
    sizes = {name: num * dtype.itemsize for (name, dtype), num in zip(FILES.items(), items, strict=True)}
    return sizes | (picture_sizes(index) if "num_pictures" in index else {})


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def _damaged(path: Path, what: str) -> IntegrityError:
    return IntegrityError(f"{path} {what}", code="data.token-file", repair="remove its directory: it is made again")
