"""Which loss would this catch? A quantized directory taken for complete, for float, or for intact, that is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import ferry
from ferry.core.errors import FerryError, InputError, IntegrityError
from ferry.core.manifest import MANIFEST_NAME, Manifest, read_manifest
from ferry.core.quantized import Scheme
from ferry.families.registry import model_of
from ferry.formats.opening import open_checkpoint, sniff
from ferry.formats.quantized import float_modules, integers_sha256, open_quantized
from ferry.verbs.inspect.report import report
from models import Shelf, change_config, read_config
from quantized_models import SCHEMES, W4, W8A8, Made, write_quantized

KEPT = ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj")
EVERY = [(name, scheme) for name, schemes in SCHEMES.items() for scheme in schemes]


@pytest.fixture(scope="session")
def made(models: Shelf, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A Llama in W8A8 with two linears left float. Read it, never write into it."""
    target = tmp_path_factory.mktemp("quantized") / "model"
    return write_quantized(models("llama"), target, "compressed-tensors", W8A8, floats=KEPT)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    return shutil.copytree(made.directory, tmp_path / "copy")


def without_manifest(directory: Path) -> Path:
    (directory / MANIFEST_NAME).unlink()
    return directory


def change_tensors(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_awq_names_the_experts_of_a_float_layer_by_what_holds_them(models: Shelf, tmp_path: Path) -> None:
    """vLLM fuses them, and asks whether a name of the list is part of the name of all of them."""
    names = model_of(read_config(models("mixtral")), "test").canonical()
    floats = tuple(name.removesuffix(".weight") for name in names if ".layers.1." in name and ".experts." in name)
    assert floats
    written = write_quantized(models("mixtral"), tmp_path / "model", "awq", W4, floats=floats)
    kept = read_config(written.directory)["quantization_config"]["modules_to_not_convert"]
    fused = "model.layers.{}.block_sparse_moe.experts"
    assert any(name in fused.format(1) for name in kept)
    assert not any(name in fused.format(0) for name in kept)
    assert list(open_quantized(written.directory).schemes) == list(written.integers)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "mixtral", "chatglm3"])
@pytest.mark.parametrize(("format_name", "scheme"), EVERY)
def test_every_integer_is_read_back_in_every_format(
    name: str, format_name: str, scheme: Scheme, models: Shelf, tmp_path: Path
) -> None:
    written = write_quantized(models(name), tmp_path / "model", format_name, scheme)
    checkpoint = open_quantized(written.directory)
    assert sniff(written.directory) == "quantized"
    assert checkpoint.format.name == format_name
    assert list(checkpoint.schemes) == list(written.integers)
    # AWQ has no word for symmetric: its zero points say it.
    expected = scheme._replace(symmetric=False) if format_name == "awq" else scheme
    assert set(checkpoint.schemes.values()) == {expected}
    for module, integers in written.integers.items():
        found = checkpoint.integers(module)
        assert np.array_equal(found.values, integers.values)
        assert np.array_equal(found.scales, integers.scales)
        assert (found.zeros is None) == (integers.zeros is None)
        assert found.zeros is None or np.array_equal(found.zeros, integers.zeros)
        assert found.input_scale == integers.input_scale
    assert not any("router" in module or "lm_head" in module for module in checkpoint.schemes)


def test_routers_and_heads_are_named_among_what_stays_float(models: Shelf, tmp_path: Path) -> None:
    written = write_quantized(models("mixtral"), tmp_path / "model", "compressed-tensors", W8A8)
    ignored = read_config(written.directory)["quantization_config"]["ignore"]
    assert ignored == ["lm_head", *(f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(4))]
    checkpoint = open_quantized(written.directory)
    assert list(float_modules(checkpoint.model, checkpoint.schemes)) == ignored


def test_a_missing_an_unknown_and_a_misshapen_tensor_are_named(copy: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.0.self_attn.q_proj.weight_scale"]
        tensors["model.layers.0.self_attn.q_proj.g_idx"] = tensors["model.norm.weight"].clone()
        tensors["model.layers.3.mlp.up_proj.weight_scale"] = tensors["model.norm.weight"].clone()
        tensors["model.layers.3.mlp.gate_proj.weight"] = tensors["model.layers.3.mlp.gate_proj.weight"].float()

    change_tensors(without_manifest(copy), change)
    with pytest.raises(InputError) as raised:
        open_quantized(copy)
    assert raised.value.code == "quantized.tensors"
    for text in (
        "1 missing: model.layers.0.self_attn.q_proj.weight_scale",
        "1 unknown: model.layers.0.self_attn.q_proj.g_idx",
        "model.layers.3.mlp.up_proj.weight_scale BF16 [32], expected F32 [48, 1]",
        "model.layers.3.mlp.gate_proj.weight F32 [48, 32], expected I8 [48, 32]",
    ):
        assert text in raised.value.message


def test_a_float_linear_that_the_config_calls_quantized_is_refused(copy: Path) -> None:
    config = read_config(without_manifest(copy))["quantization_config"]
    config["ignore"].remove(KEPT[0])
    change_config(copy, quantization_config=config)
    with pytest.raises(InputError, match=f"1 linears are quantized which are float: {KEPT[0]}") as raised:
        open_quantized(copy)
    assert raised.value.code == "quantized.contradiction"


def test_patterns_in_the_ignore_list_are_understood(copy: Path) -> None:
    config = read_config(without_manifest(copy))["quantization_config"]
    change_config(copy, quantization_config={**config, "ignore": ["re:.*lm_head", r"re:.*layers\.[12]\.mlp\.down"]})
    assert set(KEPT).isdisjoint(open_quantized(copy).schemes)


@pytest.mark.parametrize(
    ("config", "code", "text"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized.unknown", "gptq"),
        ({"quant_method": "fp8"}, "quantized.unknown", "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemv"},
         "quantized.layout", "version gemv"),
        ({"quant_method": "awq", "bits": 8, "group_size": 16, "zero_point": True}, "quantized.layout", "bits 8"),
        ({"format": "float-quantized"}, "quantized.layout", "no group"),
        ({"format": "marlin-24"}, "quantized.layout", "format marlin-24"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "quantized.layout", "kv_cache_scheme"),
        ({"transform_config": {"groups": 1}}, "quantized.layout", "transform_config"),
        ({"config_groups": {"group_0": {}, "group_1": {}}}, "quantized.layout", "2 groups of layers"),
    ],
)  # fmt: skip
def test_other_layouts_are_refused_by_name(copy: Path, config: dict[str, Any], code: str, text: str) -> None:
    own = read_config(without_manifest(copy))["quantization_config"]
    own["config_groups"]["group_0"]["format"] = None
    if text == "no group":
        text = "format float-quantized"
    change_config(copy, quantization_config=config if "quant_method" in config else {**own, **config})
    with pytest.raises(InputError, match=text) as raised:
        open_quantized(copy)
    assert raised.value.code == code


def test_other_kinds_of_ascend_weights_are_refused_by_name(models: Shelf, tmp_path: Path) -> None:
    directory = write_quantized(models("llama"), tmp_path / "model", "ascend", W8A8, manifest=False).directory
    path = directory / "quant_model_description.json"
    path.write_text(path.read_text().replace('weight": "W8A8_DYNAMIC"', 'weight": "W4A8_DYNAMIC"', 1))
    with pytest.raises(InputError, match="W4A8_DYNAMIC tensors"):
        open_quantized(directory)


def test_shards_of_msmodelslim_are_found_by_their_own_index(models: Shelf, tmp_path: Path) -> None:
    directory = write_quantized(models("llama"), tmp_path / "model", "ascend", W8A8, manifest=False).directory
    before = integers_sha256(open_quantized(directory))
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"quant_model_weights-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        index |= dict.fromkeys(part, file)
    (directory / "quant_model_weights.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert integers_sha256(open_quantized(directory)) == before


@pytest.mark.parametrize("verb", ["convert", "train"])
def test_verbs_that_want_a_float_model_say_how_to_get_one(made: Made, verb: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"source": made.directory, "target": tmp_path / "out", "tp": 1, "pp": 1}
    if verb == "train":
        (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
        options = {"model": made.directory, "data": (str(tmp_path / "rows.jsonl"),), "output": tmp_path / "out"}
    with pytest.raises(InputError, match=r"is quantized \(compressed-tensors\), expected a float model") as raised:
        getattr(ferry, verb)(**options)
    assert raised.value.code == "input.quantized"
    assert "--dequantize --output OUT" in raised.value.repair
    assert not (tmp_path / "out").exists()


def test_an_unknown_quantization_is_not_promised_to_be_dequantized(copy: Path) -> None:
    change_config(copy, quantization_config={"quant_method": "gptq"})
    with pytest.raises(InputError) as raised:
        open_checkpoint(copy)
    assert raised.value.code == "quantized.unknown"


def test_verify_reads_every_stored_tensor(made: Made) -> None:
    result = ferry.verify(path=made.directory, against=made.directory)
    assert (result["verified"], result["same"], result["format"]) == (True, True, "compressed-tensors")
    assert result["tensors"] == len(load_file(made.directory / "model.safetensors"))


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj.weight", "model.layers.3.mlp.up_proj.weight_scale", "model.norm.weight"],
)
def test_verify_catches_a_flipped_byte_of_any_stored_tensor(copy: Path, name: str) -> None:
    item = open_quantized(copy).found[name]
    with open(item.path, "r+b") as file:
        file.seek(item.offset)
        byte = file.read(1)[0]
        file.seek(item.offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(IntegrityError, match=f"1 difference: tensor {name} differs from its manifest") as raised:
        ferry.verify(path=copy)
    assert raised.value.code == "verify.differs"


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_verify_names_a_file_that_was_changed_whatever_is_left_of_it(copy: Path, damage: str) -> None:
    path = copy / "config.json"
    if damage == "gone":
        path.unlink()
    else:
        text = path.read_text()
        path.write_text(text.replace('"quant_method"', '"method"') if damage == "changed" else text[:100])
    with pytest.raises(IntegrityError, match=r"config\.json"):
        ferry.verify(path=copy)


def test_verify_against_another_model_names_what_differs(made: Made, models: Shelf, tmp_path: Path) -> None:
    other = write_quantized(models("llama-wide-heads"), tmp_path / "other", "compressed-tensors", W8A8)
    with pytest.raises(FerryError, match=r"tensor .* differs from"):
        ferry.verify(path=made.directory, against=other.directory)


def test_inspect_shows_format_schemes_sizes_engines_and_proof(copy: Path) -> None:
    manifest = read_manifest(copy)
    whole = {"kl": 0.0108, "top1": 0.935, "perplexity": 24.45, "perplexity_original": 24.33, "tokens": 2044}
    proof = {"method": "smoothquant", "whole": whole, "passed": True}
    proven = Manifest(**{**vars(manifest), "proofs": (proof,)})
    (copy / MANIFEST_NAME).write_text(proven.to_json())
    result = ferry.inspect(path=copy)
    assert (result["format"], result["stored_as"]) == ("quantized", "compressed-tensors")
    assert result["schemes"] == [
        {"name": "W8A8", "bits": 8, "scale_for_each": "row", "symmetric": True, "activations": "token", "linears": 26}
    ]
    assert (result["quantized_linears"], result["float_linears"]) == (26, list(KEPT))
    assert 8 < result["bits_per_weight"] < 9
    assert result["proof"] == {**whole, "method": "smoothquant", "passed": True}
    assert {engine["engine"] for engine in result["engines"]} >= {"vllm-cpu", "vllm-cuda", "transformers"}
    screen = report(result)
    for text in (
        "quantized, compressed-tensors",
        "W8A8: 8 bits, a scale for each row, activations a scale for each token",
        "26 quantized, 2 float (model.layers.1.mlp.down_proj, model.layers.2.mlp.down_proj)",
        "KL 0.0108, top-1 93.5 %, perplexity 24.45 (original 24.33) on 2044 tokens, within its limits",
        "transformers (with compressed-tensors): runs",
    ):
        assert text in screen


def test_inspect_lists_the_stored_tensors_of_four_bit_weights(models: Shelf, tmp_path: Path) -> None:
    directory = write_quantized(models("llama"), tmp_path / "model", "awq", W4).directory
    result = ferry.inspect(path=directory, tensors=True)
    listed = {tensor["name"]: (tensor["dtype"], tensor["shape"]) for tensor in result["tensors"]}
    assert listed["model.layers.0.mlp.down_proj.qweight"] == ("I32", [48, 4])
    assert "model.layers.0.mlp.down_proj.qweight" in report(result)
    assert result["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 16)
