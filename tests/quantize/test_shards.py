"""Which loss would this catch? A tensor in a place where its dtype cannot begin, or where nobody finds it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from ferry.core.dtypes import ITEM_BYTES, num_bytes
from ferry.core.errors import LayoutError
from ferry.verbs.quantize.shards import Piece, Shards, Unit, sorted_for_alignment

DTYPES = {"I8": np.int8, "F16": np.float16, "F32": np.float32, "I64": np.int64}


def piece(name: str, dtype: str, *shape: int) -> Piece:
    values = np.random.default_rng(len(name)).integers(0, 100, shape).astype(DTYPES[dtype])
    return Piece(name, dtype, shape, [values.reshape(-1).view(np.uint8)])


def unit(pieces: list[Piece]) -> Unit:
    typed = {item.name: (item.dtype, item.shape) for item in pieces}
    return Unit("block", (typed,), typed)


def layer(number: int) -> list[Piece]:
    """One scale for each of seven weights in 16 bits, and one for each input in 32."""
    linears = range(7)
    return [
        *[piece(f"{number}.{linear}.weight", "I8", 6, 6) for linear in linears],
        *[piece(f"{number}.{linear}.weight_scale", "F16", 1) for linear in linears],
        *[piece(f"{number}.{linear}.input_scale", "F32", 1) for linear in linears],
        piece(f"{number}.norm", "F16", 6),
    ]


@pytest.mark.parametrize("limit", [100, 700, 10**6])
def test_layers_with_an_odd_number_of_narrow_scales_are_written_and_found(limit: int, tmp_path: Path) -> None:
    layers = [layer(number) for number in range(5)]
    shards = Shards(tmp_path, [unit(item) for item in layers], limit)
    entries = [entry for number, item in enumerate(layers) for entry in shards.write(number, item)]
    for entry in entries:
        assert not entry.offset % ITEM_BYTES[entry.dtype]
    headers = shards.finish(entries)
    found = {name: value for file in headers for name, value in load_file(tmp_path / file).items()}
    pieces = [item for own in layers for item in own]
    assert set(found) == {item.name for item in pieces}
    for item in pieces:
        assert np.array_equal(found[item.name].reshape(-1).view(np.uint8), item.parts[0])  # type: ignore[index]
    assert len(headers) == {100: 5, 700: 3, 10**6: 1}[limit]


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.integers(1, 5)), max_size=12),
    st.integers(0, 64).map(lambda number: 8 * number),
)
def test_from_an_even_place_every_piece_has_its_place(sizes: list[tuple[str, int]], start: int) -> None:
    pieces = [piece(str(number), dtype, size) for number, (dtype, size) in enumerate(sizes)]
    ordered = sorted_for_alignment(pieces, start)
    assert sorted(item.name for item in ordered) == sorted(item.name for item in pieces)
    for item in ordered:
        assert not start % ITEM_BYTES[item.dtype]
        start += num_bytes(item.dtype, item.shape)


def test_what_has_no_place_is_refused(tmp_path: Path) -> None:
    layers = [[piece("a", "I8", 3)], [piece("b", "F32", 1)]]
    shards = Shards(tmp_path, [unit(item) for item in layers], 10**6)
    shards.write(0, layers[0])
    with pytest.raises(LayoutError, match="b would begin at byte 3") as raised:
        shards.write(1, layers[1])
    assert raised.value.code == "quantize.alignment"


def test_files_that_are_gone_or_shorter_do_not_hold_what_was_written(tmp_path: Path) -> None:
    layers = [layer(0), layer(1)]
    shards = Shards(tmp_path, [unit(item) for item in layers], 10**6)
    entries = shards.write(0, layers[0])
    assert shards.hold(entries)
    path = shards.path(0)
    path.write_bytes(path.read_bytes()[:-1])
    assert not shards.hold(entries)
    path.unlink()
    assert not shards.hold(entries)
    assert shards.hold([])
