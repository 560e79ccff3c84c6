"""The scales file: what pass 1 finds and pass 2 needs, bound to its model and its text.

A safetensors file. Its metadata say what made it (`about`, JSON) and what was found for each layer (`layers`, JSON);
its tensors are, for each group of factors, `KEY.factors` (as they are applied) and `KEY.input_absmax`, for each linear
`MODULE.input_scale` (static activations) and `MODULE.clip` (4 bits: 20ths of the range of each scale).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ferry.core.errors import FerryError, InputError
from ferry.core.safetensors import read_header
from ferry.verbs.quantize.journal import read_tensors_file, write_tensors_file

FORMAT = "ferry.scales/1"
CLIP_STEPS = 20
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class LayerScales:
    """One layer: its digest, what was found (JSON values), and its arrays.

    `facts` has `digest`, `self_check_nmse`, `groups` (key -> strength or ratio, errors), `linears` (module -> error on
    kept rows, tokens seen), `experts` (expert, tokens, fell_back).
    """

    facts: dict[str, Any]
    arrays: Arrays


@dataclass(frozen=True)
class Scales:
    """All layers, and what they were made of: `about` has model, method, scheme, text, windows and strength."""

    about: dict[str, Any]
    layers: tuple[LayerScales, ...]

    @property
    def sha256(self) -> str:
        """Return one digest over what was found for all layers."""
        total = hashlib.sha256()
        for layer in self.layers:
            total.update(json.dumps(layer.facts, sort_keys=True).encode())
            for name, array in sorted(layer.arrays.items()):
                total.update(name.encode())
                total.update(np.ascontiguousarray(array).data.cast("B"))
        return total.hexdigest()

    def write(self, path: Path) -> None:
        """Write the file so that it appears whole."""
        arrays = {name: array for layer in self.layers for name, array in layer.arrays.items()}
        metadata = {
            "format": FORMAT,
            "about": json.dumps(self.about),
            "layers": json.dumps([layer.facts for layer in self.layers]),
        }
        write_tensors_file(path, arrays, metadata)


def read_scales(path: Path) -> Scales:
    """Return a scales file; refuse anything else."""
    try:
        metadata = read_header(path).metadata
        arrays = read_tensors_file(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, expected {FORMAT!r}")
        about, facts = json.loads(metadata["about"]), json.loads(metadata["layers"])
        keys = [tuple(found["owners"]) for found in facts]
        for name, array in arrays.items():
            if not (np.isfinite(array).all() and (array >= 0).all()):
                raise ValueError(f"{name} has values that are no scales")
    except (ValueError, KeyError, TypeError, FerryError) as error:
        raise InputError(
            f"{path} is no scales file of `ferry quantize`: {error}",
            code="quantize.scale-file",
            repair="make one with --generate-scale --scale-output FILE",
        ) from None
    owner_of = {owner: number for number, owners in enumerate(keys) for owner in owners}
    dealt: list[Arrays] = [{} for _ in facts]
    for name, array in arrays.items():
        dealt[owner_of[name.rpartition(".")[0]]][name] = array
    return Scales(about, tuple(LayerScales(found, own) for found, own in zip(facts, dealt, strict=True)))


def layer_digest(digests: Mapping[str, str], names: Sequence[str]) -> str:
    """Return one digest over the tensors of a layer."""
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(f"{name}\t{digests[name]}\n".encode())
    return total.hexdigest()


def check_layer(found: str, layer: LayerScales, number: int, path: object) -> None:
    """Refuse scales that were made for other weights."""
    if found != layer.facts["digest"]:
        raise InputError(
            f"the scales in {path} were made for another model: layer {number} has other weights",
            code="quantize.scale-mismatch",
            repair="make scales for this model with --generate-scale",
        )


def clip_to_steps(clip_NG: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    return np.rint(clip_NG * CLIP_STEPS).astype(np.uint8)


def clip_of_steps(steps_NG: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return np.asarray(steps_NG / np.float32(CLIP_STEPS), np.float32)
