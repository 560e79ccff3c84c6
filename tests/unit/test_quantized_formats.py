"""Which loss would this catch? An integer, a scale or a zero point that a format writes down wrong, or reads wrong.

AWQ is judged by an unpacking written here from its published order, compressed-tensors by its own library
(`interop/test_quantized_compressed_tensors.py`).
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferry.core.dtypes import num_bytes
from ferry.core.errors import LayoutError
from ferry.core.quantized import PER_ROW, PER_TENSOR, Integers, Scheme, quantize
from ferry.formats.quantized import FORMATS
from quantized_models import SCHEMES, W4, W4_SYMMETRIC, W8A8

EVERY = [(name, scheme) for name, schemes in SCHEMES.items() for scheme in schemes]
FEW = settings(max_examples=20, deadline=None, derandomize=True, database=None)
MODULE = "model.layers.0.self_attn.q_proj"


def random_integers(scheme: Scheme, rows: int, cols: int, scale_dtype: str, seed: int) -> Integers:
    """Return integers that use the whole range: extremes of values, zeros and scales."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, cols)).astype(np.float32) * rng.uniform(1e-3, 10, (rows, 1)).astype(np.float32)
    static = float(np.float32(rng.uniform(1e-3, 1))) if scheme.activations == "tensor" else None
    found = quantize(weight, scheme, scale_dtype, input_scale=static)
    low, high = (0, 15) if scheme.bits == 4 else (-127, 127)
    found.values[:, 0], found.values[:, -1] = low, high
    return found


def equal(left: Integers, right: Integers) -> bool:
    same_zeros = (left.zeros is None) == (right.zeros is None)
    if left.zeros is not None and right.zeros is not None:
        same_zeros = np.array_equal(left.zeros, right.zeros)
    return (
        left.scheme == right.scheme
        and np.array_equal(left.values, right.values)
        and np.array_equal(left.scales, right.scales)
        and same_zeros
        and left.input_scale == right.input_scale
    )


@FEW
@given(
    case=st.sampled_from(EVERY), rows=st.integers(1, 5), groups=st.integers(1, 5),
    scale_dtype=st.sampled_from(["BF16", "F16", "F32"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_what_is_encoded_is_decoded_bit_for_bit_and_is_stored_as_promised(
    case: tuple[str, Scheme], rows: int, groups: int, scale_dtype: str, seed: int
) -> None:
    form, scheme = FORMATS[case[0]], case[1]
    rows, cols = rows * 8, groups * 16
    scale_dtype = form.scale_dtype or scale_dtype
    integers = random_integers(scheme, rows, cols, scale_dtype, seed)
    assert form.refuses(scheme, rows, cols) == ""
    encoded = form.encode(MODULE, integers)
    promised = form.stored(MODULE, rows, cols, scheme, scale_dtype)
    assert {name: (found.dtype, found.shape) for name, found in encoded.items()} == promised
    assert list(encoded) == list(promised)
    assert all(found.data.nbytes == num_bytes(found.dtype, found.shape) for found in encoded.values())
    decoded = form.decode(MODULE, encoded.__getitem__, scheme)
    assert equal(decoded, integers)
    assert decoded.scale_dtype == scale_dtype


def test_awq_unpacks_by_the_published_order() -> None:
    integers = random_integers(W4, 24, 32, "F16", seed=1)
    encoded = FORMATS["awq"].encode("m", integers)

    def unpacked(name: str) -> np.ndarray:
        words = encoded[name].data.view("<u4").reshape(encoded[name].shape)
        columns = np.empty((words.shape[0], words.shape[1] * 8), np.int64)
        for row in range(words.shape[0]):
            for word in range(words.shape[1]):
                for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                    columns[row, 8 * word + column] = int(words[row, word]) >> (4 * nibble) & 0xF
        return columns

    scales_GN = encoded["m.scales"].data.view(np.float16).reshape(2, 24)
    assert np.array_equal(unpacked("m.qweight").T, integers.values)
    assert np.array_equal(unpacked("m.qzeros").T, integers.zeros)
    assert np.array_equal(scales_GN.T.astype(np.float32), integers.scales)


def test_awq_writes_a_zero_point_of_eight_for_symmetric_weights() -> None:
    encoded = FORMATS["awq"].encode("m", random_integers(W4_SYMMETRIC, 8, 16, "F16", seed=2))
    assert set(encoded["m.qzeros"].data.tolist()) == {0x88}


def test_awq_refuses_a_scale_that_has_no_exact_value_in_half_precision() -> None:
    integers = quantize(np.full((8, 16), 1e-9, np.float32), W4_SYMMETRIC, "BF16")
    with pytest.raises(LayoutError, match=r"m\.scales: a scale has no exact value in F16") as raised:
        FORMATS["awq"].encode("m", integers)
    assert raised.value.code == "quantized.inexact"


@pytest.mark.parametrize(
    ("name", "scheme", "rows", "cols", "reason"),
    [
        ("awq", W8A8, 8, 32, "4-bit weights in groups"),
        ("awq", W4, 12, 32, "multiple of 8 rows, found 12"),
        ("awq", W4, 8, 40, "groups of 16 do not divide the 40"),
        ("awq", Scheme(4, PER_ROW, True, ""), 8, 32, "in groups"),
        ("ascend", W4, 8, 32, "W8A8 with a scale for each row and each token, not W4A16"),
        ("ascend", Scheme(8, PER_TENSOR, True, "token"), 8, 32, "not W8A8 with a scale for a tensor"),
        ("ascend", Scheme(8, PER_ROW, True, "tensor"), 8, 32, "not W8A8 with a scale for a tensor"),
        ("compressed-tensors", Scheme(8, PER_ROW, True, ""), 8, 32, "not W8A16"),
        ("compressed-tensors", Scheme(8, 32, True, "token"), 8, 32, "no groups"),
        ("compressed-tensors", W4, 12, 32, "packed by 8"),
        ("compressed-tensors", Scheme(4, PER_ROW, True, ""), 8, 32, "in groups"),
        ("compressed-tensors", W4, 8, 40, "groups of 16 do not divide the 40"),
    ],
)
def test_a_format_says_why_it_cannot_hold_a_weight(
    name: str, scheme: Scheme, rows: int, cols: int, reason: str
) -> None:
    assert reason in FORMATS[name].refuses(scheme, rows, cols)


def test_each_format_describes_itself_in_the_words_of_its_engines() -> None:
    kept = ["lm_head", "model.layers.1.mlp.down_proj"]
    awq = FORMATS["awq"].describe({"q": W4}, kept, ["q.qweight"])
    assert awq.config == {
        "quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": kept,
    }  # fmt: skip
    packed = FORMATS["compressed-tensors"].describe({"q": W4}, kept, ["q.weight_packed"]).config
    assert packed is not None
    assert (packed["quant_method"], packed["format"]) == ("compressed-tensors", "pack-quantized")
    assert packed["quantization_status"] == "compressed"
    assert packed["ignore"] == kept
    assert packed["config_groups"]["group_0"]["weights"]["strategy"] == "group"
    integers = FORMATS["compressed-tensors"].describe({"q": W8A8}, kept, ["q.weight"]).config
    assert integers is not None
    assert integers["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    ascend = FORMATS["ascend"].describe({"q": W8A8}, kept, ["q.weight", "q.weight_scale", "q.bias", "norm.weight"])
    assert ascend.config is None
    said = json.loads(ascend.files["quant_model_description.json"])
    assert said["q.weight"] == said["q.weight_scale"] == said["model_quant_type"] == "W8A8_DYNAMIC"
    assert said["q.bias"] == said["norm.weight"] == said["lm_head.weight"] == "FLOAT"
