"""What the user says about training data, as one frozen value, and how `PATH:WEIGHT` is read.

Nothing here touches a file except to see whether a path exists: a path may itself hold a colon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ferry.core.errors import ConfigError, InputError
from ferry.data.vision.pictures import VisionSpec

Method = Literal["sft", "lora", "pretrain"]
Truncation = Literal["refuse", "cut", "drop"]
TrainOn = Literal["assistant", "last", "all"]

MEGATRON_ENDINGS = ("_text_document", "_packed_input_ids_document")
"""What Megatron's preprocessing adds to the prefix it is given."""


@dataclass(frozen=True)
class DataSettings:
    """Everything that decides which tokens are seen, and in which order."""

    data: tuple[str, ...]
    """Training data, each `PATH` or `PATH:WEIGHT`."""
    tokenizer_dir: Path
    cache_dir: Path
    """Where token files are kept between runs."""
    method: Method = "sft"
    seq_len: int = 2048
    handler: str = ""
    """The format of the rows, or one of the manual's handler names; "" = look at the rows."""
    train_on: TrainOn = "assistant"
    truncation: Truncation = "refuse"
    """What happens to a sample longer than `seq_len`. Pretraining cuts its own sequences and never asks."""
    validation_fraction: float = 0.0
    validation_data: tuple[str, ...] = ()
    max_bad_fraction: float = 0.01
    num_workers: int | None = None
    """Worker processes; 0 = none, None = by the size of the data."""
    seed: int = 1234
    chat_template: Path | None = None
    trust_remote_code: bool = False
    vision: VisionSpec | None = None
    """How pictures enter the model, where they can."""


class DataItem(NamedTuple):
    """One place of data. `weight` is None where none was given."""

    path: Path
    weight: float | None


def parse_item(text: str) -> DataItem:
    """Return `PATH` or `PATH:WEIGHT` as an item. A path that exists is taken whole, whatever colons it holds."""
    if not text:
        raise ConfigError("an item of data is empty", code="data.item", repair="give PATH or PATH:WEIGHT")
    if _exists(Path(text)):
        return DataItem(Path(text), None)
    path, colon, word = text.rpartition(":")
    if not colon or not path or not _exists(Path(path)):
        missing = path if colon and path and _number(word) is not None else text
        raise InputError(
            f"training data {missing} is not there", code="data.missing", repair="give a file or a directory"
        )
    weight = _number(word)
    if weight is None or not math.isfinite(weight) or weight <= 0:
        raise ConfigError(
            f"{word!r} is no weight for {path}, expected a number above 0", code="data.weight", repair="write PATH:0.5"
        )
    return DataItem(Path(path), weight)


def _exists(path: Path) -> bool:
    """Return whether the path is there, also as the prefix of Megatron files."""
    return path.exists() or any(Path(f"{path}{ending}.idx").exists() for ending in ("", *MEGATRON_ENDINGS))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
