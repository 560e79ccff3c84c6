"""A quantized model in another format: the same integers, scales and zeros, bit for bit, under other names.

4-bit weights go between AWQ gemm and compressed-tensors, 8-bit ones between compressed-tensors and Ascend. One digest
over all integers, taken while reading and again from what was written, is the proof.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ferry.core.errors import ConfigError, IntegrityError, LayoutError
from ferry.core.floats import to_float32
from ferry.core.manifest import Manifest
from ferry.core.plan import Plan
from ferry.core.progress import Reporter
from ferry.core.verb import Result
from ferry.formats.hf_stream import Tensor, shard_headers
from ferry.formats.opening import open_promised_quantized
from ferry.formats.quantized import (
    FORMATS,
    WEIGHT,
    IntegersDigest,
    QuantizedCheckpoint,
    description,
    integers_sha256,
    open_quantized,
    with_description,
)
from ferry.formats.quantized_format import Format, fits
from ferry.verbs.quantize.rewriting import Pieces, Reader, Rewriting, Wish, altered_files, plan_of, small_files, write

AUTO = "auto"
DTYPES = {"bfloat16": "BF16", "float16": "F16"}
KIND = "quantized-model"


def plan_repack(config: Wish) -> Plan:
    """Return what would be written; refuse what would not be exact."""
    return plan_of(_prepare(config), config)


def repack(config: Wish, reporter: Reporter) -> Result:
    """Write the model in the other format; return where it is."""
    return write(_prepare(config), config, reporter)


def _prepare(config: Wish) -> Rewriting:
    assert config.model is not None, "checked by the config"
    assert config.output is not None, "checked by the config"
    source = open_promised_quantized(config.model)
    form = _target(source, config.format)
    scale_dtype = _scale_dtype(source, form)
    tensors = _tensors(source, form, scale_dtype)
    headers = shard_headers(tensors, config.max_shard_size)
    described = description(form, source.model, source.schemes, [name for name, _, _ in tensors])
    digest = IntegersDigest()
    old, new = source.format.name, form.name
    return Rewriting(
        source=source,
        target=config.output,
        kind=KIND,
        summary=f"{source.directory.resolve().name}: {old} -> {new}",
        headers=headers,
        small={**small_files(source, with_description(source.model.config, described), headers), **described.files},
        pieces=lambda reader: _pieces(reader, form, scale_dtype, digest),
        changes=(
            f"{len(source.schemes)} weights stored as {new} instead of {old}: the same integers and scales",
            *altered_files(source),
        ),
        choices=(f"scales in {scale_dtype}: it holds every one of them exactly",),
        details={"action": "repack", "from": old, "format": new},
        check=lambda directory, promised: _proofs(directory, digest, form, promised),
    )


def _target(source: QuantizedCheckpoint, asked: str) -> Format:
    """Return the format of the result; refuse one that cannot hold these weights."""
    others = [form for form in FORMATS.values() if form is not source.format]
    able = [form for form in others if not _refusal(source, form)]
    if asked == AUTO:
        if not able:
            raise LayoutError(
                f"{source.directory} ({source.format.name}) fits no other format: {_refusal(source, others[0])}",
                code="quantize.format",
                repair="quantize the original anew with the --format you need",
            )
        return able[0]
    if asked == source.format.name:
        raise ConfigError(
            f"{source.directory} is {asked} already",
            code="quantize.format",
            repair=f"ask for another --format: {', '.join(form.name for form in able) or 'none fits'}",
        )
    refusal = _refusal(source, FORMATS[asked])
    if refusal:
        raise LayoutError(
            f"{source.directory} cannot be written as {asked}: {refusal}",
            code="quantize.format",
            repair="quantize the original anew with this --format",
        )
    return FORMATS[asked]


def _refusal(source: QuantizedCheckpoint, form: Format) -> str:
    found = (form.refuses(scheme, *source.shape(module)) for module, scheme in source.schemes.items())
    return next((f"{reason}" for reason in found if reason), "")


def _scale_dtype(source: QuantizedCheckpoint, form: Format) -> str:
    """Return the dtype of the scales of the result, which must hold each of them exactly.

    Some formats fix it. Elsewhere it stays; but F32 becomes the model's own where that is exact: the scales may have
    come in it, and are F32 only because a format has no other.
    """
    if form.scale_dtype:
        _refuse_inexact(source, form.scale_dtype, form)
        return form.scale_dtype
    module = next(iter(source.schemes))
    found = source.found[f"{module}.{source.format.scales}"].dtype
    config = source.model.config
    own = DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    return own if found == "F32" and not _inexact(source, own) else found


def _refuse_inexact(source: QuantizedCheckpoint, dtype: str, form: Format) -> None:
    module = _inexact(source, dtype)
    if module:
        raise LayoutError(
            f"{module} has a scale without an exact value in {dtype}, in which {form.name} stores scales",
            code="quantized.inexact",
            repair="quantize the original anew with this --format: its scales are then rounded before they are used",
        )


def _inexact(source: QuantizedCheckpoint, dtype: str) -> str:
    """Return the first linear with a scale that a dtype does not hold exactly; "" if there is none."""
    for module in source.schemes:
        scales = source.read(f"{module}.{source.format.scales}")
        if not fits(to_float32(scales.data, scales.dtype), dtype):
            return module
    return ""


def _tensors(source: QuantizedCheckpoint, form: Format, scale_dtype: str) -> list[Tensor]:
    """Return every tensor of the result, in the order of the model; what is not of the model comes last."""
    tensors: list[Tensor] = []
    for name, module in _order(source):
        if module:
            stored = form.stored(module, *source.shape(module), source.schemes[module], scale_dtype)
            tensors += [(part, *typed) for part, typed in stored.items()]
        else:
            tensors.append((name, source.found[name].dtype, source.found[name].shape))
    return tensors


def _pieces(reader: Reader, form: Format, scale_dtype: str, digest: IntegersDigest) -> Pieces:
    for name, module in _order(reader.source):
        if module:
            integers = reader.integers(module)
            digest.add(module, integers)
            encoded = form.encode(module, replace(integers, scale_dtype=scale_dtype))
            yield from ((part, stored.data) for part, stored in encoded.items())
        else:
            yield from ((name, data) for data in reader.windows(name))


def _order(source: QuantizedCheckpoint) -> Iterator[tuple[str, str]]:
    """Return what is written one after another: a tensor's name, and its linear where that is quantized ("" else)."""
    canonical = source.model.canonical()
    for name in canonical:
        module = name.removesuffix(WEIGHT)
        yield name, module if module in source.schemes and name != module else ""
    integers = {name for module in source.schemes for name in source.tensors_of(module)}
    yield from ((name, "") for name in source.found if name not in integers and name not in canonical)


def _proofs(
    directory: Path, before: IntegersDigest, form: Format, promised: Manifest | None
) -> tuple[dict[str, Any], ...]:
    """Compare the integers of the result, read again, with those of the source; pass on what was proven of these."""
    after = integers_sha256(open_quantized(directory))
    if after != before.hexdigest():
        raise IntegrityError(
            f"the integers written as {form.name} are not those that were read",
            code="quantize.repack",
            repair="nothing was kept; this is a defect of Ferry or of the disk: report it",
        )
    same = {"check": "integers, scales and zeros equal those of the parent", "integers_sha256": after}
    if promised is None:
        return (same,)
    return (same, *({**proof, "inherited_from": promised.id} for proof in promised.proofs if "whole" in proof))
