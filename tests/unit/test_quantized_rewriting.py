"""Which loss would this catch? A weight that is not what its integers mean, or integers that another format changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ferry
from ferry.core.errors import ConfigError, FerryError, InputError, IntegrityError, LayoutError, OutputError
from ferry.core.floats import from_float32
from ferry.core.manifest import MANIFEST_NAME, Manifest, read_manifest
from ferry.core.progress import Reporter
from ferry.core.quantized import Scheme, quantize
from ferry.core.quantized import dequantize as floats_of
from ferry.formats.quantized import integers_sha256, open_quantized
from ferry.verbs.quantize.repack import plan_repack, repack
from ferry.verbs.quantize.unquantize import dequantize, plan_dequantize, weight_windows
from models import Shelf, read_config, read_weights
from quantized_models import SCHEMES, W4, W4_SYMMETRIC, W8A8, W8A8_STATIC, Wish, float_weights, write_quantized

EVERY = [(name, scheme) for name, schemes in SCHEMES.items() for scheme in schemes]
QUIET = Reporter()


def weight_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def left_behind(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "mixtral", "chatglm3"])
@pytest.mark.parametrize(("format_name", "scheme"), [EVERY[0], EVERY[3], *EVERY[-2:]])
def test_a_float_model_holds_what_the_integers_mean_and_the_rest_bit_for_bit(
    name: str, format_name: str, scheme: Scheme, models: Shelf, tmp_path: Path
) -> None:
    made = write_quantized(models(name), tmp_path / "model", format_name, scheme)
    result = dequantize(Wish(made.directory, tmp_path / "float"), QUIET)
    original, found = read_weights(models(name)), read_weights(tmp_path / "float")
    assert set(found) == set(original)
    expected = float_weights(made.integers)
    for tensor, values in found.items():
        if tensor in expected:
            data = from_float32(expected[tensor], "BF16").view(np.int16)
            assert np.array_equal(values.view(torch.int16).numpy(), data)
        else:
            assert torch.equal(values, original[tensor])
    assert (result["dtype"], result["linears"]) == ("BF16", len(made.integers))
    assert "quantization_config" not in read_config(tmp_path / "float")
    assert not (tmp_path / "float" / "quant_model_description.json").exists()


@pytest.mark.parametrize("scheme", [W4, W8A8, W8A8_STATIC])
@pytest.mark.parametrize("items", [1, 64, 100, 10_000])
def test_a_weight_made_float_some_rows_at_a_time_is_the_same(scheme: Scheme, items: int) -> None:
    weight = np.random.default_rng(0).standard_normal((24, 32)).astype(np.float32)
    integers = quantize(weight, scheme, "BF16", input_scale=0.5)
    pieces = list(weight_windows("m", integers, "F32", items))
    assert len(pieces) == -(-24 // max(1, items // 32))
    assert np.array_equal(np.concatenate(pieces).view(np.float32), floats_of(integers))


def test_a_tensor_read_some_bytes_at_a_time_is_the_same(models: Shelf, tmp_path: Path) -> None:
    source = open_quantized(write_quantized(models("llama"), tmp_path / "model", "awq", W4).directory)
    name = "model.embed_tokens.weight"
    assert np.array_equal(np.concatenate(list(source.windows(name, 1000))), source.read(name).data)


@pytest.mark.parametrize(("format_name", "scheme"), EVERY)
def test_a_dequantized_model_is_an_artifact_that_verifies_and_knows_its_parent(
    format_name: str, scheme: Scheme, models: Shelf, tmp_path: Path
) -> None:
    made = write_quantized(models("llama"), tmp_path / "model", format_name, scheme)
    dequantize(Wish(made.directory, tmp_path / "float", max_shard_size=20_000), QUIET)
    assert ferry.verify(path=tmp_path / "float")["verified"]
    manifest = read_manifest(tmp_path / "float")
    parent = read_manifest(made.directory)
    assert (manifest.kind, manifest.parents) == ("hf-model", (parent.id,))
    assert manifest.changes[0].startswith(f"28 weights dequantized from {format_name}")
    assert len(weight_files(tmp_path / "float")) > 1
    assert ferry.inspect(path=tmp_path / "float")["format"] == "hf"


@pytest.mark.parametrize(("word", "dtype"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_the_dtype_of_the_float_model_can_be_chosen(word: str, dtype: str, models: Shelf, tmp_path: Path) -> None:
    made = write_quantized(models("llama"), tmp_path / "model", "compressed-tensors", W4)
    dequantize(Wish(made.directory, tmp_path / "float", dtype=word), QUIET)
    found = load_file(tmp_path / "float" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, word)}
    assert read_config(tmp_path / "float")["dtype"] == word
    for name, values in float_weights(made.integers).items():
        expected = from_float32(values, dtype).view(np.uint8)
        assert np.array_equal(found[name].view(torch.uint8).numpy(), expected)


def test_a_weight_too_large_for_the_chosen_dtype_is_refused_and_nothing_is_left(models: Shelf, tmp_path: Path) -> None:
    made = write_quantized(models("llama"), tmp_path / "model", "compressed-tensors", W8A8, manifest=False)
    item = open_quantized(made.directory).found["model.layers.2.mlp.up_proj.weight_scale"]
    with open(item.path, "r+b") as file:
        file.seek(item.offset)
        file.write(from_float32(np.array([1e6], np.float32), "BF16").tobytes())
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj has values that are not finite in F16") as raised:
        dequantize(Wish(made.directory, tmp_path / "float", dtype="float16"), QUIET)
    assert raised.value.code == "quantize.overflow"
    assert left_behind(tmp_path) == ["model"]


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2-tied"])
@pytest.mark.parametrize(
    ("first", "second", "scheme"), [("awq", "compressed-tensors", W4), ("compressed-tensors", "ascend", W8A8)]
)
def test_there_and_back_again_gives_the_same_files(
    name: str, first: str, second: str, scheme: Scheme, models: Shelf, tmp_path: Path
) -> None:
    made = write_quantized(models(name), tmp_path / "first", first, scheme)
    there = repack(Wish(made.directory, tmp_path / "second"), QUIET)
    assert (there["from"], there["format"]) == (first, second)
    assert open_quantized(tmp_path / "second").format.name == second
    repack(Wish(tmp_path / "second", tmp_path / "third", format=first), QUIET)
    assert weight_files(tmp_path / "third") == weight_files(tmp_path / "first")
    assert read_config(tmp_path / "third") == read_config(tmp_path / "first")


def test_symmetric_weights_keep_their_integers_and_bytes_through_awq(models: Shelf, tmp_path: Path) -> None:
    made = write_quantized(models("llama"), tmp_path / "first", "compressed-tensors", W4_SYMMETRIC)
    repack(Wish(made.directory, tmp_path / "awq"), QUIET)
    straight = write_quantized(models("llama"), tmp_path / "straight", "compressed-tensors", W4_SYMMETRIC)
    assert integers_sha256(open_quantized(tmp_path / "awq")) == integers_sha256(open_quantized(straight.directory))


def test_a_repacked_model_is_an_artifact_with_a_proof_that_its_integers_are_the_same(
    models: Shelf, tmp_path: Path
) -> None:
    made = write_quantized(models("llama"), tmp_path / "model", "awq", W4)
    parent = read_manifest(made.directory)
    proof = {"method": "awq", "whole": {"kl": 0.2}, "passed": True}
    (made.directory / "quantization.html").write_text("of the parent")
    (made.directory / MANIFEST_NAME).write_text(Manifest(**{**vars(parent), "proofs": (proof,)}).to_json())
    result = repack(Wish(made.directory, tmp_path / "other"), QUIET)
    assert ferry.verify(path=tmp_path / "other")["verified"]
    manifest = read_manifest(tmp_path / "other")
    assert (manifest.kind, manifest.parents) == ("quantized-model", (parent.id,))
    same = integers_sha256(open_quantized(made.directory))
    assert result["proofs"][0]["integers_sha256"] == integers_sha256(open_quantized(tmp_path / "other")) == same
    assert manifest.proofs[-1] == {**proof, "inherited_from": parent.id}
    assert ferry.inspect(path=tmp_path / "other")["proof"]["kl"] == 0.2
    assert not (tmp_path / "other" / "quantization.html").exists()
    assert any("quantization.html: added since the source was made" in change for change in result["changes"])


@pytest.mark.parametrize(
    ("format_name", "scheme", "wanted", "kind", "text"),
    [
        ("compressed-tensors", W8A8, "awq", LayoutError, "awq holds 4-bit weights in groups"),
        ("compressed-tensors", W8A8_STATIC, "ascend", LayoutError, "not W8A8 with a scale for a tensor"),
        ("compressed-tensors", W8A8_STATIC, "auto", LayoutError, "fits no other format"),
        ("awq", W4, "ascend", LayoutError, "ascend holds W8A8"),
        ("awq", W4, "awq", ConfigError, "is awq already"),
    ],
)
def test_a_format_that_cannot_hold_the_weights_is_refused_before_anything_is_written(
    format_name: str, scheme: Scheme, wanted: str, kind: type[FerryError], text: str, models: Shelf, tmp_path: Path
) -> None:
    made = write_quantized(models("llama"), tmp_path / "model", format_name, scheme)
    with pytest.raises(kind, match=text) as raised:
        plan_repack(Wish(made.directory, tmp_path / "out", format=wanted))
    assert raised.value.code == "quantize.format"
    assert left_behind(tmp_path) == ["model"]


def test_scales_that_awq_would_round_are_refused_by_the_plan(models: Shelf, tmp_path: Path) -> None:
    made = write_quantized(models("llama"), tmp_path / "model", "compressed-tensors", W4, manifest=False)
    item = open_quantized(made.directory).found["model.layers.2.mlp.up_proj.weight_scale"]
    with open(item.path, "r+b") as file:
        file.seek(item.offset)
        file.write(from_float32(np.array([1e-9], np.float32), "BF16").tobytes())
    with pytest.raises(
        LayoutError, match=r"layers\.2\.mlp\.up_proj has a scale without an exact value in F16"
    ) as raised:
        plan_repack(Wish(made.directory, tmp_path / "out"))
    assert raised.value.code == "quantized.inexact"


@pytest.mark.parametrize("action", [dequantize, repack])
def test_a_damaged_source_is_noticed_and_nothing_is_left(action: Any, models: Shelf, tmp_path: Path) -> None:
    made = write_quantized(models("llama"), tmp_path / "model", "awq", W4)
    item = open_quantized(made.directory).found["model.layers.3.mlp.up_proj.qweight"]
    with open(item.path, "r+b") as file:
        file.seek(item.offset + 5)
        file.write(b"\x00\xff\x00\xff")
    with pytest.raises(IntegrityError, match=r"1 of \d+ tensors differ .*: model\.layers\.3\.mlp\.up_proj\.qweight"):
        action(Wish(made.directory, tmp_path / "out"), QUIET)
    assert left_behind(tmp_path) == ["model"]


def test_a_source_without_a_manifest_becomes_a_parent_by_what_was_read(models: Shelf, tmp_path: Path) -> None:
    made = write_quantized(models("llama"), tmp_path / "model", "awq", W4, manifest=False)
    dequantize(Wish(made.directory, tmp_path / "float"), QUIET)
    (node,) = read_manifest(tmp_path / "float").lineage
    assert (node.kind, node.summary) == ("awq-model", "came without a manifest")
    assert node.model_sha256 == ferry.verify(path=made.directory)["model_sha256"]


@pytest.mark.parametrize("plan", [plan_dequantize, plan_repack])
def test_a_plan_names_every_file_and_its_size_and_refuses_a_target_that_exists(
    plan: Any, models: Shelf, tmp_path: Path
) -> None:
    made = write_quantized(models("llama"), tmp_path / "model", "awq", W4)
    wish = Wish(made.directory, tmp_path / "out", max_shard_size=20_000)
    planned = plan(wish)
    (dequantize if plan is plan_dequantize else repack)(wish, QUIET)
    written = {
        path.relative_to(tmp_path / "out").as_posix(): path.stat().st_size
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME
    }
    assert dict(planned.files) == written
    assert planned.write_bytes == sum(written.values())
    with pytest.raises(OutputError, match="exists already"):
        plan(wish)
    with pytest.raises(OutputError, match="is, or holds, the source"):
        plan(Wish(made.directory, made.directory, overwrite=True))


def test_an_index_of_the_source_does_not_survive_into_one_file(models: Shelf, tmp_path: Path) -> None:
    made = write_quantized(models("llama"), tmp_path / "model", "awq", W4, manifest=False)
    names = list(open_quantized(made.directory).found)
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (made.directory / "model.safetensors.index.json").write_text(json.dumps(index))
    repack(Wish(shutil.copytree(made.directory, tmp_path / "copy"), tmp_path / "out"), QUIET)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
