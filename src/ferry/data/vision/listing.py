"""The pictures of a token file: which sample has which, in two files beside the tokens.

    DIRECTORY/pictures.bin          JSON, all samples behind each other: [[name, folder, sha256, rows, columns], ...]
    DIRECTORY/picture_offsets.bin   int64, where each sample begins, and one more: the end

Names are as the rows give them, and folders are numbers, so that the digest of the data does not depend on where it
lies; the folders themselves are kept in the index. Pixels are not stored: pictures are read when they are trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ferry.data.vision.pictures import Picture, is_same

BLOB, OFFSETS = "pictures.bin", "picture_offsets.bin"
PICTURE_FILES: dict[str, np.dtype[Any]] = {BLOB: np.dtype("u1"), OFFSETS: np.dtype("<i8")}
Pictures = tuple[Picture, ...]


class PictureWriter:
    """Turns the pictures of samples into what is appended to the two files."""

    def __init__(self) -> None:
        self._folders: dict[str, int] = {}
        self._num_bytes = self._num_pictures = 0

    def rows(self, samples: Sequence[Pictures]) -> dict[str, npt.NDArray[Any]]:
        """Return what each file gets for some samples."""
        texts = [self._text(pictures).encode() if pictures else b"" for pictures in samples]
        ends = self._num_bytes + np.cumsum([len(text) for text in texts], dtype=np.int64)
        self._num_bytes += sum(map(len, texts))
        self._num_pictures += sum(map(len, samples))
        return {BLOB: np.frombuffer(b"".join(texts), np.uint8), OFFSETS: ends}

    def described(self) -> dict[str, Any]:
        """Return what the index says."""
        return {
            "picture_folders": list(self._folders),
            "picture_bytes": self._num_bytes,
            "num_pictures": self._num_pictures,
        }

    def _text(self, pictures: Pictures) -> str:
        number = [self._folders.setdefault(picture.folder, len(self._folders)) for picture in pictures]
        rows = [picture._replace(folder=place) for picture, place in zip(pictures, number, strict=True)]  # type: ignore[arg-type]
        return json.dumps(rows, ensure_ascii=False)


class PictureList:
    """The pictures of an open token file."""

    def __init__(self, directory: Path, index: Mapping[str, Any]) -> None:
        self._folders: list[str] = index["picture_folders"]
        self._num_samples: int = index["num_samples"]
        has_any = index["picture_bytes"] > 0  # an empty file cannot be mapped
        self._blob = np.memmap(directory / BLOB, np.uint8, "r") if has_any else np.zeros(0, np.uint8)
        self._offsets = np.memmap(directory / OFFSETS, PICTURE_FILES[OFFSETS], "r")

    def of(self, index: int) -> Pictures:
        """Return the pictures of one sample, in their order."""
        first, last = int(self._offsets[index]), int(self._offsets[index + 1])
        if first == last:
            return ()
        rows = json.loads(self._blob[first:last].tobytes())
        return tuple(Picture(name, self._folders[folder], *rest) for name, folder, *rest in rows)

    def first_changed(self) -> str:
        """Return the name of the first picture that is not what it was, or "". Reads all of them."""
        known: set[tuple[str, str]] = set()
        for index in range(self._num_samples):
            for picture in self.of(index):
                if picture[:2] not in known and not is_same(picture):
                    return picture.name
                known.add(picture[:2])
        return ""


def picture_sizes(index: Mapping[str, Any]) -> dict[str, int]:
    """Return how large the two files must be."""
    return {BLOB: index["picture_bytes"], OFFSETS: PICTURE_FILES[OFFSETS].itemsize * (index["num_samples"] + 1)}
