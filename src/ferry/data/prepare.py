"""From what the user says about data to samples in an order: the one entry of this folder.

Everything that can be refused is refused here, before a model is loaded. What was decided is returned as sentences,
what was found as facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ferry.core.errors import ConfigError, InputError
from ferry.core.progress import Reporter
from ferry.data.mixture import Mixture, View
from ferry.data.orders import split
from ferry.data.rendering import renderer
from ferry.data.samples import Shown
from ferry.data.settings import DataSettings, parse_item
from ferry.data.tokenising import prepare_tokens, rendered_samples, rendering_spec
from ferry.data.tokenset import Samples, TokenSet


@dataclass(frozen=True)
class PreparedData:
    """Data ready to be trained on. For pretraining, `Stream(train, seq_len)` cuts it into sequences."""

    train: Mixture
    validation: Mixture | None
    examples: tuple[Shown, ...]
    """Three samples as spans of text, each with whether it is supervised."""
    facts: dict[str, Any]
    choices: tuple[str, ...]
    directories: tuple[Path, ...]
    """The token files of the training data, in the order of the items: what `divide` makes `train` of again."""
    validation_directories: tuple[Path, ...]


def prepare(settings: DataSettings, reporter: Reporter) -> PreparedData:
    """Read, check, tokenise and split the data."""
    items = [parse_item(text) for text in settings.data]
    held_out = [parse_item(text) for text in settings.validation_data]
    _check(settings, bool(items), any(item.weight is not None for item in held_out))
    sets = [prepare_tokens(item.path, settings, reporter) for item in items]
    validation_sets = [prepare_tokens(item.path, settings, reporter) for item in held_out]
    _refuse_overlap(sets, validation_sets)
    weighted = any(item.weight is not None for item in items)
    weights = [1.0 if item.weight is None else item.weight for item in items] if weighted else None
    train, validation = divide(sets, validation_sets, weights, settings.validation_fraction, settings.seed)
    return PreparedData(
        train=train,
        validation=validation,
        examples=tuple(rendered_samples(sets[0], settings)),
        facts=_facts(sets, validation_sets, train, validation),
        directories=tuple(part.directory for part in sets),
        validation_directories=tuple(part.directory for part in validation_sets),
        choices=tuple(_choices(sets, [item.path for item in items], train, validation, settings)),
    )


def _check(settings: DataSettings, has_data: bool, has_weighted_validation: bool) -> None:
    if not has_data:
        raise ConfigError("no training data is given", code="data.item", repair="give --data PATH")
    if not 0 <= settings.validation_fraction < 1:
        raise ConfigError(
            f"validation_fraction={settings.validation_fraction}: expected at least 0 and less than 1",
            code="data.validation",
        )
    if settings.validation_fraction and settings.validation_data:
        raise ConfigError(
            "validation_fraction and validation_data are both given", code="data.validation", repair="keep one"
        )
    if has_weighted_validation:
        raise ConfigError(
            "validation data has a weight, but is used whole", code="data.validation", repair="leave the weight out"
        )


def _refuse_overlap(sets: Sequence[TokenSet], validation_sets: Sequence[TokenSet]) -> None:
    trained = {source["sha256"] for part in sets for source in part.index["sources"]}
    for part in validation_sets:
        for source in part.index["sources"]:
            if source["sha256"] in trained:
                raise InputError(
                    f"the validation file {source['name']} is also trained on",
                    code="data.overlap",
                    repair="validate on other data, or use validation_fraction",
                )


def divide(
    sets: Sequence[TokenSet],
    validation_sets: Sequence[TokenSet],
    weights: list[float] | None,
    validation_fraction: float,
    seed: int,
) -> tuple[Mixture, Mixture | None]:
    """Return what is trained on and what is held out: own validation sets, or a part of each set."""
    if not validation_fraction:
        return Mixture(sets, weights), Mixture(validation_sets) if validation_sets else None
    kept: list[Samples] = []
    held_out: list[Samples] = []
    for number, part in enumerate(sets):
        indices, held_out_indices = split(part.num_samples, validation_fraction, seed, number)
        kept.append(View(part, indices))
        held_out += [View(part, held_out_indices)] if len(held_out_indices) else []
    if not held_out:
        raise InputError(
            "the data has one sample: nothing can be held out of it",
            code="data.validation",
            repair="give more data, or validation_fraction=0",
        )
    return Mixture(kept, weights), Mixture(held_out)


def _facts(
    sets: Sequence[TokenSet], validation_sets: Sequence[TokenSet], train: Mixture, validation: Mixture | None
) -> dict[str, Any]:
    return {
        "sets": [_set_facts(part) for part in sets],
        "validation_sets": [_set_facts(part) for part in validation_sets],
        "num_samples": train.num_samples,
        "num_tokens": int(train.lengths.sum()),
        "max_tokens": int(train.lengths.max()),
        "samples_an_epoch": train.counts(),
        "weights": train.weights,
        "sha256": train.sha256,
        "validation_num_samples": validation.num_samples if validation else 0,
        "validation_num_tokens": int(validation.lengths.sum()) if validation else 0,
        "validation_sha256": validation.sha256 if validation else "",
    }


def _set_facts(part: TokenSet) -> dict[str, Any]:
    names: tuple[str, ...] = ("num_samples", "num_tokens", "num_supervised", "sha256", "key")
    names += ("sources", "formats", "skipped_files", "rows")
    lengths = part.lengths
    middle = {"max_tokens": int(lengths.max()), "median_tokens": int(np.median(lengths))}
    return {**{name: part.index[name] for name in names}, **middle}


def _choices(
    sets: Sequence[TokenSet], paths: Sequence[Path], train: Mixture, validation: Mixture | None, settings: DataSettings
) -> list[str]:
    """Return what was decided, each with its reason."""
    found: list[str] = []
    for part, path, count in zip(sets, paths, train.counts(), strict=True):
        rows = part.index["rows"]
        for format_ in {(item["format"], item["reason"]): item for item in part.index["formats"]}.values():
            found.append(f"{path.name} is read as {format_['format']}: {format_['reason']}")
        if rows["num_bad"]:
            first = ", ".join(f"{where} ({what})" for where, what in rows["bad"][:3])
            found.append(f"{path.name}: {rows['num_bad']} bad rows of {rows['num_rows']} are left out: {first}")
        if rows["num_too_long"]:
            done = "cut" if settings.truncation == "cut" else "left out"
            found.append(f"{path.name}: {rows['num_too_long']} samples over {settings.seq_len} tokens are {done}")
        if rows["num_without_target"]:
            found.append(f"{path.name}: {rows['num_without_target']} samples have nothing to learn and are left out")
        if part.index.get("num_pictures"):
            rest = "" if settings.truncation == "drop" else "; samples of which a picture would be cut are left out"
            found.append(f"{path.name}: {part.index['num_pictures']} pictures{rest}")
        if part.index["skipped_files"]:
            found.append(f"{path.name}: no data files: {', '.join(part.index['skipped_files'][:5])}")
        if train.weights is not None:
            found.append(f"{path.name} gives {count} of {train.num_samples} samples an epoch, by its weight")
    if validation is not None and settings.validation_fraction:
        share = validation.num_samples / (validation.num_samples + train.num_samples)
        found.append(f"{validation.num_samples} samples ({share:.1%}) are held out, chosen by seed {settings.seed}")
    formats = {item["format"] for part in sets for item in part.index["formats"]}
    return found + renderer(rendering_spec(settings)).choices(formats)
