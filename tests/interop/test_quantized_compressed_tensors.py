"""Which loss would this catch? Weights that the library of the format, or transformers, reads as something else.

The judge is compressed-tensors: its own packing, its own compressors, and the models that transformers makes with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from ferry.core.floats import from_float32
from ferry.core.progress import Reporter
from ferry.core.quantized import Integers, Scheme, quantize
from ferry.core.quantized import dequantize as floats_of
from ferry.formats.quantized import FORMATS
from ferry.formats.quantized_format import Stored
from ferry.verbs.quantize.unquantize import dequantize
from models import Shelf
from quantized_models import SCHEMES, W4, W4_SYMMETRIC, W8A8, W8A8_STATIC, Made, Wish, write_quantized

FORM = FORMATS["compressed-tensors"]
DTYPES = {
    "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
}  # fmt: skip
TOKENS = torch.arange(1, 25)[None]


def as_tensor(stored: Stored) -> torch.Tensor:
    return torch.frombuffer(bytearray(stored.data.tobytes()), dtype=DTYPES[stored.dtype]).reshape(stored.shape)


def library_scheme(scheme: Scheme) -> tuple[Any, Any]:
    """Return the library's reading of our configuration, and the compressor that it chooses."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = FORM.describe({"m": scheme}, ["lm_head"], ["m.weight"]).config
    read = QuantizationConfig.model_validate(config)
    return read.config_groups["group_0"], BaseCompressor.get_value_from_registry(read.format)


def weight(rows: int, cols: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((rows, cols)).astype(np.float32)


@pytest.mark.parametrize("scheme", SCHEMES["compressed-tensors"])
def test_the_library_decompresses_what_is_written_to_what_the_integers_mean(scheme: Scheme) -> None:
    integers = quantize(weight(24, 64), scheme, "BF16", input_scale=0.5 if scheme.activations == "tensor" else None)
    stored = {name.removeprefix("m."): as_tensor(item) for name, item in FORM.encode("m", integers).items()}
    read, compressor = library_scheme(scheme)
    assert set(compressor.compression_param_names(read)) == set(stored) - {"input_scale"}
    found = compressor.decompress(stored, read)["weight"]
    expected = torch.from_numpy(from_float32(floats_of(integers), "BF16").view(np.int16))
    assert torch.equal(found.view(torch.int16), expected)


@pytest.mark.parametrize("scheme", SCHEMES["compressed-tensors"])
def test_the_library_compresses_to_the_bytes_that_are_written(scheme: Scheme) -> None:
    integers = quantize(weight(24, 64), scheme, "F32", input_scale=0.5 if scheme.activations == "tensor" else None)
    read, compressor = library_scheme(scheme)
    given = {"weight": torch.from_numpy(floats_of(integers)), "weight_scale": torch.from_numpy(integers.scales)}
    if scheme.group == -1:
        given["weight_scale"] = given["weight_scale"].reshape(1)
    if integers.zeros is not None:
        given["weight_zero_point"] = torch.from_numpy((integers.zeros - 8).astype(np.int8))
    found = compressor.compress(given, read)
    for name, item in FORM.encode("m", integers).items():
        part = name.removeprefix("m.")
        if part != "input_scale":
            assert torch.equal(found[part], as_tensor(item)), part


@pytest.mark.parametrize("packed_dim", [0, 1])
def test_words_are_packed_as_the_library_packs_them(packed_dim: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    from ferry.formats.quantized_format import pack_nibbles, unpack_nibbles

    values = np.random.default_rng(3).integers(0, 16, (16, 24)).astype(np.int8)
    ours = pack_nibbles(values) if packed_dim == 1 else pack_nibbles(values.T).T
    theirs = pack_to_int32(torch.from_numpy(values - 8), 4, packed_dim=packed_dim)
    assert np.array_equal(ours, theirs.numpy())
    again = unpack_from_int32(torch.from_numpy(np.ascontiguousarray(ours)), 4, torch.Size(values.shape), packed_dim)
    assert np.array_equal(again.numpy() + 8, values)
    assert np.array_equal(unpack_nibbles(ours if packed_dim == 1 else ours.T), values if packed_dim == 1 else values.T)


def fake_quantized(scheme: Scheme, static: float) -> Any:
    """Return a hook that rounds what goes into a linear as int8 activations are rounded."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (values,) = args
        scale = values.abs().amax(-1, keepdim=True) / 127.5 if scheme.activations == "token" else torch.tensor(static)
        return (torch.clamp(torch.round(values / scale), -128, 127) * scale,)

    return hook


def logits(directory: Path, scheme: Scheme | None = None, **options: Any) -> torch.Tensor:
    """Return the logits of a model as transformers loads it; a scheme makes its activations int8."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    for name, module in model.named_modules():
        if scheme is not None and scheme.activations and isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(fake_quantized(scheme, 0.0625))
    with torch.no_grad():
        return model(TOKENS).logits.float()


def both(made: Made, target: Path, scheme: Scheme, dtype: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits by compressed-tensors, and those of our own float model."""
    dequantize(Wish(made.directory, target, dtype=dtype), Reporter())
    found = logits(made.directory, dtype=getattr(torch, dtype), **options)
    return found, logits(target, scheme, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
@pytest.mark.parametrize("scheme", [W8A8, W8A8_STATIC])
def test_transformers_computes_with_int8_what_the_float_model_does_with_rounded_activations(
    name: str, scheme: Scheme, models: Shelf, tmp_path: Path
) -> None:
    made = write_quantized(models(name), tmp_path / "model", "compressed-tensors", scheme)
    found, expected = both(made, tmp_path / "float", scheme, "float32")
    # The same float operations in the same order; an activation on the edge of two integers may fall to either side.
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_transformers_reads_symmetric_four_bit_weights_bit_for_bit(models: Shelf, tmp_path: Path) -> None:
    made = write_quantized(models("llama"), tmp_path / "model", "compressed-tensors", W4_SYMMETRIC)
    found, expected = both(made, tmp_path / "float", W4_SYMMETRIC, "bfloat16")
    assert torch.equal(found, expected)


def test_transformers_reads_zero_points_bit_for_bit_where_it_makes_weights_float_while_loading(
    models: Shelf, tmp_path: Path
) -> None:
    made = write_quantized(models("llama"), tmp_path / "model", "compressed-tensors", W4)
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    found, expected = both(made, tmp_path / "float", W4, "bfloat16", **options)
    assert torch.equal(found, expected)


def test_transformers_reads_experts_bit_for_bit(models: Shelf, tmp_path: Path) -> None:
    made = write_quantized(models("mixtral"), tmp_path / "model", "compressed-tensors", W4_SYMMETRIC)
    found, expected = both(made, tmp_path / "float", W4_SYMMETRIC, "bfloat16")
    assert torch.equal(found, expected)


def test_a_linear_that_stayed_float_is_left_alone_by_transformers(models: Shelf, tmp_path: Path) -> None:
    kept = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(4))
    made = write_quantized(models("llama"), tmp_path / "model", "compressed-tensors", W4_SYMMETRIC, floats=kept)
    found, expected = both(made, tmp_path / "float", W4_SYMMETRIC, "bfloat16")
    assert torch.equal(found, expected)


def test_the_librarys_own_reading_of_awq_gives_the_tensors_that_repacking_writes() -> None:
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    integers = quantize(weight(24, 64), W4, "F16")
    awq = {name: as_tensor(item) for name, item in FORMATS["awq"].encode("m", integers).items()}
    theirs = AutoAWQConverter(bits=4, group_size=16).process(awq)
    ours = FORM.encode("m", Integers(W4, integers.values, integers.scales, "F16", integers.zeros))
    assert set(theirs) == set(ours)
    for name, item in ours.items():
        assert torch.equal(theirs[name], as_tensor(item)), name
