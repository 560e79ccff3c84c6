"""Picture files: which one is meant, what it becomes, and whether it is still the same.

Pillow decodes, and the image processor of the model's own directory sizes, normalises and cuts into patches: the one
of transformers that works without torchvision, so that the same file gives the same numbers everywhere. A picture
that is missing or broken makes its row a bad one.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt

from ferry.core.errors import InputError, UnavailableError
from ferry.core.family import Model
from ferry.data.conversation import BadRow

PROCESSOR = "preprocessor_config.json"
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class VisionSpec:
    """What must be known of a model to put pictures into its rows; small enough to be sent to a worker."""

    directory: Path
    """Where the image processor's settings lie."""
    image_token: int
    video_token: int

    @property
    def processor_sha256(self) -> str:
        """Return the digest of the settings that decide what a picture becomes."""
        return hashlib.sha256(_settings_file(self.directory).read_bytes()).hexdigest()


def vision_spec(model: Model, directory: Path) -> VisionSpec | None:
    """Return how pictures enter a model, or None where they cannot. `directory` holds the processor's settings."""
    vision, config = model.family.vision, model.config
    if vision is None:
        return None
    return VisionSpec(directory, vision.token("image_token_id", config), vision.token("video_token_id", config))


class Picture(NamedTuple):
    """A picture as a row names it: its name, the folder that is relative to, its bytes' digest, its grid of tokens."""

    name: str
    folder: str
    sha256: str
    rows: int
    columns: int

    @property
    def path(self) -> Path:
        return place_of(self.name, self.folder)


class Patches(NamedTuple):
    """What the tower is given: N patches of C numbers, and how many patches high and wide the picture is."""

    pixels_NC: Float32
    high: int
    wide: int


@lru_cache(maxsize=2)
def processor(spec: VisionSpec) -> Any:
    """Return the model's image processor; loaded once in each process."""
    _pillow()
    from transformers import AutoImageProcessor

    _settings_file(spec.directory)
    load: Any = AutoImageProcessor.from_pretrained
    try:
        return load(str(spec.directory), local_files_only=True, backend="pil")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{spec.directory / PROCESSOR} makes no image processor: {' '.join(str(error).split())[:200]}",
            code="train.image-processor",
            repair="copy the file from the model it came with",
        ) from None


def place_of(name: str, folder: str) -> Path:
    """Return the file that a row names; relative ones lie beside the data file."""
    scheme = urlsplit(name).scheme if "://" in name or name.startswith("data:") else ""
    if scheme not in ("", "file"):
        raise BadRow(f"the picture {name[:60]!r} is not a file: pictures are read from files only")
    return Path(folder) / (unquote(urlsplit(name).path) if scheme == "file" else name)


def measured(name: str, folder: str, spec: VisionSpec) -> Picture:
    """Return a picture that was read and decoded whole; raise BadRow where that is not possible."""
    path = place_of(name, folder)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise BadRow(f"the picture {path.name} cannot be read: {getattr(error, 'strerror', '') or error}") from None
    _, high, wide = _patches(data, path, spec)
    merge = processor(spec).merge_size
    return Picture(name, folder, hashlib.sha256(data).hexdigest(), high // merge, wide // merge)


def patches(picture: Picture, spec: VisionSpec) -> Patches:
    """Read a picture for training; refuse one that is not what it was when the data were prepared."""
    try:
        data = picture.path.read_bytes()
    except OSError as error:
        raise _changed(picture.path, str(error.strerror)) from None
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise _changed(picture.path, "it has other bytes")
    return _patches(data, picture.path, spec)


def is_same(picture: Picture) -> bool:
    """Say whether a picture still has the bytes it had."""
    try:
        return hashlib.sha256(picture.path.read_bytes()).hexdigest() == picture.sha256
    except OSError:
        return False


def _patches(data: bytes, path: Path, spec: VisionSpec) -> Patches:
    try:
        made = processor(spec)(images=[_decoded(data, path)], return_tensors="np")
    except ValueError as error:
        raise error if isinstance(error, BadRow) else BadRow(f"the picture {path.name} is refused: {error}") from None
    _, high, wide = (int(number) for number in made["image_grid_thw"][0])
    return Patches(np.ascontiguousarray(made["pixel_values"], np.float32), high, wide)


def _decoded(data: bytes, path: Path) -> Any:
    """Return the picture upright and in RGB, as transformers loads one."""
    _pillow()
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRow(f"the picture {path.name} is broken: {' '.join(str(error).split())[:100]}") from None


def _pillow() -> None:
    from importlib.util import find_spec

    if find_spec("PIL") is None:
        raise UnavailableError(
            "pictures need the package Pillow", code="data.package", repair="pip install 'llmferry[vision]'"
        )


def _settings_file(directory: Path) -> Path:
    path = directory / PROCESSOR
    if not path.is_file():
        raise InputError(
            f"{directory} has no {PROCESSOR}: how pictures become numbers is not known",
            code="train.image-processor",
            repair="copy the file from the model it came with",
        )
    return path


def _changed(path: Path, what: str) -> InputError:
    return InputError(
        f"the picture {path} changed since the data were prepared: {what}",
        code="data.picture-changed",
        repair="bring it back, or train with --overwrite on the pictures as they are now",
    )
