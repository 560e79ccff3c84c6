"""Small models, quantized to nearest and written down in each format, for tests of whoever reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ferry.core.floats import to_float32
from ferry.core.manifest import MANIFEST_NAME, Manifest
from ferry.core.progress import Reporter
from ferry.core.quantized import PER_ROW, PER_TENSOR, Integers, Scheme, dequantize, quantize
from ferry.formats.fingerprint import file_digests
from ferry.formats.hf import open_hf
from ferry.formats.hf_stream import INDEX, shard_headers, write_tensors
from ferry.formats.quantized import FORMATS, LINEAR_ROLES, WEIGHT, description, open_quantized, with_description
from ferry.verbs.quantize.rewriting import small_json

W8A8 = Scheme(8, PER_ROW, True, "token")
W8A8_STATIC = Scheme(8, PER_TENSOR, True, "tensor")
W4 = Scheme(4, 16, False, "")
W4_SYMMETRIC = Scheme(4, 16, True, "")
SCHEMES = {
    "compressed-tensors": (W8A8, W8A8_STATIC, Scheme(8, PER_ROW, True, "tensor"), W4, W4_SYMMETRIC),
    "awq": (W4, W4_SYMMETRIC),
    "ascend": (W8A8,),
}


class Made(NamedTuple):
    """A quantized model: where it is, and the integers it was written from."""

    directory: Path
    integers: dict[str, Integers]


@dataclass(frozen=True)
class Wish:
    """The options that these parts of `ferry quantize` read."""

    model: Path
    output: Path
    format: str = "auto"
    dtype: str = "auto"
    max_shard_size: int = 5_000_000_000
    overwrite: bool = False


def write_quantized(
    source: Path, target: Path, format_name: str, scheme: Scheme, *, floats: tuple[str, ...] = (), manifest: bool = True
) -> Made:
    """Quantize every linear of a model but `floats`, and write it, with a manifest."""
    checkpoint, form = open_hf(source), FORMATS[format_name]
    model = checkpoint.model
    target.mkdir()
    integers: dict[str, Integers] = {}
    tensors, pieces = [], []
    order = {name: place for place, name in enumerate(model.canonical())}
    for slot in sorted(checkpoint.slots, key=lambda slot: order.get(slot.label, len(order))):
        data = np.fromfile(slot.path, np.uint8, slot.local.rows * slot.local.cols * 2, offset=slot.offset)
        assert slot.dtype in ("BF16", "F16")
        module = slot.label.removesuffix(WEIGHT)
        if model.role_of(slot.label) in LINEAR_ROLES and module not in floats:
            weight = to_float32(data, slot.dtype).reshape(slot.local.shape)
            static = 0.0625 if scheme.activations == "tensor" else None
            scale_dtype = form.scale_dtype or slot.dtype
            integers[module] = quantize(weight, scheme, scale_dtype, input_scale=static)
            for name, stored in form.encode(module, integers[module]).items():
                tensors.append((name, stored.dtype, stored.shape))
                pieces.append((name, stored.data))
        else:
            tensors.append((slot.label, slot.dtype, slot.local.shape))
            pieces.append((slot.label, data))
    for name, (dtype, shape, content) in checkpoint.carried.items():
        tensors.append((name, dtype, shape))
        pieces.append((name, np.frombuffer(content, np.uint8)))
    headers = shard_headers(tensors, 1 << 30)
    digests = write_tensors(target, headers, pieces, Reporter())
    described = description(form, model, dict.fromkeys(integers, scheme), [name for name, _, _ in tensors])
    for name, path in checkpoint.assets.files.items():
        if name == INDEX:
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(path.read_bytes())
    (target / "config.json").write_bytes(small_json(with_description(model.config, described)))
    for name, content in described.files.items():
        (target / name).write_bytes(content)
    if manifest:
        files = file_digests(target, open_quantized(target).slots)
        made = Manifest("quantized-model", target.name, "quantize", "by a test", tensors=digests, files=files)
        (target / MANIFEST_NAME).write_text(made.to_json())
    return Made(target, integers)


def float_weights(integers: dict[str, Integers]) -> dict[str, np.ndarray]:
    """Return what the integers stand for, by tensor name."""
    return {name + WEIGHT: dequantize(found) for name, found in integers.items()}
