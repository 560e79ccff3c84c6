"""Products of the kernels against numpy's, for every kind of weight and every instruction set that was built."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from ferry.core.floats import from_float32, to_float32
from ferry.core.quantized import PER_ROW, Scheme, quantize
from ferry.engines.native import library as kernels
from ferry.engines.native.library import INT8, KINDS, Library, Packed
from ferry.recipes.engines import cpu_features

W8A8 = Scheme(8, PER_ROW, True, "token")
SHAPES = [(1, 1, 1), (1, 70, 33), (2, 16, 8), (5, 17, 31), (6, 130, 64), (7, 48, 576), (13, 33, 65), (100, 40, 24)]
NAMES = ("avx2", "plain")


@pytest.fixture(params=NAMES)
def library(request: pytest.FixtureRequest) -> Library:
    # A machine without AVX2 has no such library to test; one without any compiler fails here, as it should.
    if request.param == "avx2" and not kernels.NEEDED["avx2"] <= cpu_features():
        pytest.skip("this processor has no AVX2: run it on an x86 machine of 2013 or later, as CI is")
    found = kernels.open_library(request.param)
    assert found is not None, f"the kernels for {request.param} were not built: is there a C++ compiler?"
    return found


def rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(library: Library, weight: np.ndarray, dtype: str) -> tuple[Packed, np.ndarray]:
    """Return a weight in packed form, and the values that it then has."""
    into = Packed.empty(KINDS[dtype], *weight.shape)
    data = from_float32(weight, dtype)
    library.pack(data.view(f"u{data.nbytes // weight.size}").reshape(weight.shape), into, 0)
    return into, to_float32(data, dtype).reshape(weight.shape)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_a_product_with_float_weights_is_numpys(library: Library, dtype: str, m: int, n: int, k: int) -> None:
    x, weight = rows(1, m, k), rows(2, n, k)
    into, values = packed(library, weight, dtype)
    into.bias = rows(3, n)
    work = library.workspace(1)
    found = library.linear(work, into, x)
    library.close(work)
    expected = x.astype(np.float64) @ values.astype(np.float64).T + into.bias
    assert np.abs(found - expected).max() < 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_a_product_with_integers_is_exact(library: Library, m: int, n: int, k: int) -> None:
    x, weight = rows(4, m, k), rows(5, n, k)
    integers = quantize(weight, W8A8, "F32")
    into = Packed.empty(INT8, n, k)
    library.pack(integers.values, into, 0)
    into.scales[:] = integers.scales[:, 0]
    work = library.workspace(1)
    found = library.linear(work, into, x)
    library.close(work)
    scales = (np.abs(x).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32)
    rounded = np.rint(x / scales).astype(np.int64)
    sums = rounded @ integers.values.astype(np.int64).T
    expected = sums.astype(np.float32) * scales * integers.scales[:, 0]
    assert np.array_equal(found, expected)


def test_the_largest_integers_do_not_overflow(library: Library) -> None:
    k = 4096
    into = Packed.empty(INT8, 16, k)
    library.pack(np.full((16, k), -127, np.int8), into, 0)
    into.scales[:] = 1
    work = library.workspace(1)
    found = library.linear(work, into, np.full((6, k), 127, np.float32))
    library.close(work)
    assert np.all(found == -127.0 * 127 * k)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "I8"])
def test_a_row_has_the_same_bits_whatever_is_beside_it_and_with_any_threads(library: Library, dtype: str) -> None:
    x, weight = rows(6, 203, 256), rows(7, 500, 256)
    if dtype == "I8":
        into = Packed.empty(INT8, *weight.shape)
        values, into.scales = library.round(weight)
        library.pack(values, into, 0)
    else:
        into, _ = packed(library, weight, dtype)
    one, three = library.workspace(1), library.workspace(3)
    whole = library.linear(three, into, x)
    for size in (1, 2, 3, 7, 13, 100):
        assert np.array_equal(library.linear(one, into, x[50 : 50 + size]), whole[50 : 50 + size])
    library.close(one)
    library.close(three)


def test_rounding_weights_is_that_of_quantize(library: Library) -> None:
    weight = rows(8, 40, 77)
    weight[3] = 0
    weight[4, :5] = [127, 0.5, 1.5, 2.5, -0.5]
    integers = quantize(weight, W8A8, "F32")
    values, scales = library.round(weight)
    assert np.array_equal(values, integers.values)
    assert np.array_equal(scales, integers.scales[:, 0])


def test_the_smallest_numbers_are_rounded_as_quantize_does(library: Library) -> None:
    # Scales below 2**-126 have few bits, so that a number may be more than 127 of them.
    weight = (np.arange(-200, 200, dtype=np.int64)[:, None] * np.arange(11)).astype(np.float32) * np.float32(2.0**-149)
    integers = quantize(weight, W8A8, "F32")
    values, scales = library.round(weight)
    assert np.array_equal(values, integers.values)
    assert np.array_equal(scales, integers.scales[:, 0])


WITHOUT_MEMORY = """
    import resource
    import numpy as np
    from ferry.engines.native.library import BFLOAT16, Packed, open_library

    def limit(further_bytes):
        now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (now + further_bytes if further_bytes else most, most))

    def fails(call, *given):
        try:
            call(*given)
        except MemoryError:
            return True
        return False

    library = open_library("NAME")
    work = library.workspace(4)
    weight = Packed.empty(BFLOAT16, 256, 1 << 17)
    x = np.ones((13, 1 << 17), np.float32)
    limit(4 << 20)
    assert fails(library.linear, work, weight, x), "8 MB for each of four threads were not to be had"
    assert fails(library.workspace, 64), "64 stacks were not to be had"
    limit(0)
    assert not library.linear(work, weight, x).any()
    library.close(work)
"""


def test_memory_that_runs_out_on_any_thread_is_an_error_and_no_more(library: Library) -> None:
    program = textwrap.dedent(WITHOUT_MEMORY).replace("NAME", library.name)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_gives_no_number(library: Library, bad: float) -> None:
    x = rows(9, 2, 40)
    x[1, 37] = bad
    into = Packed.empty(INT8, 16, 40)
    values, into.scales = library.round(rows(10, 16, 40))
    library.pack(values, into, 0)
    work = library.workspace(1)
    found = library.linear(work, into, x)
    library.close(work)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()


def test_rows_packed_in_parts_are_the_whole(library: Library) -> None:
    weight = rows(11, 50, 12)
    whole, _ = packed(library, weight, "F32")
    parts = Packed.empty(KINDS["F32"], 50, 12)
    for first, last in ((0, 7), (7, 40), (40, 50)):
        library.pack(weight[first:last].view(np.uint32), parts, first)
    assert np.array_equal(whole.data, parts.data)
