"""How a stored tensor is laid out from canonical tensors, as rectangles: one description for both directions.

A canonical tensor is a tensor of the Hugging Face checkpoint, seen as rows x columns (a vector has one column). A
stored tensor, on one rank of some layout, is tiled by pieces: rectangles of canonical tensors. Reading a layout and
writing it use the same pieces, so a layout described once is known in both directions, and two layouts compose through
the canonical tensor. Rows that no piece covers are padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple


class Part(NamedTuple):
    """A band of rows of a canonical tensor. `ndim` is 1 for vectors (which have one column)."""

    name: str
    row: int
    rows: int
    cols: int
    ndim: int = 2


class Piece(NamedTuple):
    """A rectangle of a canonical tensor (`row`, `col`, `rows`, `cols`) and its place in the stored tensor.

    A transposed piece occupies `cols` rows and `rows` columns of the stored tensor.
    """

    name: str
    row: int
    col: int
    rows: int
    cols: int
    at_row: int
    at_col: int = 0
    transposed: bool = False


class Local(NamedTuple):
    """A stored tensor on one rank: its size, its pieces, and how many of its last rows are padding.

    `declared` is the shape its file gives it, where that is not (rows, cols): the same bytes, seen otherwise.
    """

    rows: int
    cols: int
    ndim: int
    pieces: tuple[Piece, ...]
    pad_rows: int = 0
    declared: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.declared or ((self.rows,) if self.ndim == 1 else (self.rows, self.cols))


class Slot(NamedTuple):
    """A stored tensor with its bytes: row-major from `offset` of a file. `label` names it in messages."""

    path: Path
    offset: int
    dtype: str
    local: Local
    label: str


def whole(part: Part) -> Local:
    """Return the part stored as it is, on every rank."""
    return Local(part.rows, part.cols, part.ndim, (Piece(part.name, part.row, 0, part.rows, part.cols, 0),))


def stacked(parts: Sequence[Part], tp: int, rank: int) -> Local:
    """Return each part's rows cut into `tp`, and this rank's cuts stacked: gate and up never mix across ranks."""
    pieces, at_row = [], 0
    for part in parts:
        rows = part.rows // tp
        pieces.append(Piece(part.name, part.row + rank * rows, 0, rows, part.cols, at_row))
        at_row += rows
    return Local(at_row, parts[0].cols, parts[0].ndim, tuple(pieces))


def columns(part: Part, tp: int, rank: int) -> Local:
    """Return the part's columns cut into `tp`."""
    cols = part.cols // tp
    return Local(part.rows, cols, part.ndim, (Piece(part.name, part.row, rank * cols, part.rows, cols, 0),))


def grouped(query: Part, key: Part, value: Part, groups: int, tp: int, rank: int) -> Local:
    """Return query, key and value interleaved by key-value group; rank t owns groups t*groups/tp and on.

    Megatron's order: for each group its query heads, then its key head, then its value head.
    """
    pieces, at_row, own = [], 0, groups // tp
    for group in range(rank * own, (rank + 1) * own):
        for part in (query, key, value):
            rows = part.rows // groups
            pieces.append(Piece(part.name, part.row + group * rows, 0, rows, part.cols, at_row))
            at_row += rows
    return Local(at_row, query.cols, query.ndim, tuple(pieces))


def vocabulary(part: Part, padded_rows: int, tp: int, rank: int) -> Local:
    """Return the part's rows, padded to `padded_rows`, cut into `tp`. The last ranks may hold padding only."""
    rows = padded_rows // tp
    first = rank * rows
    real = max(0, min(rows, part.rows - first))
    pieces = (Piece(part.name, part.row + first, 0, real, part.cols, 0),) if real else ()
    return Local(rows, part.cols, part.ndim, pieces, rows - real)


def padded_vocabulary(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Return Megatron's padded vocabulary: the next multiple of `divisible_by * tp`."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple


def transposed(local: Local) -> Local:
    """Return a stored tensor with rows and columns exchanged (grouped GEMM keeps weights as [in, out])."""
    pieces = [
        piece._replace(at_row=piece.at_col, at_col=piece.at_row, transposed=not piece.transposed)
        for piece in local.pieces
    ]
    return Local(local.cols, local.rows, 2, tuple(pieces))


def below_each_other(locals_: Sequence[Local]) -> Local:
    """Return stored tensors of equal width put into one, rows after rows."""
    pieces: list[Piece] = []
    rows = 0
    for local in locals_:
        pieces += [piece._replace(at_row=rows + piece.at_row) for piece in local.pieces]
        rows += local.rows
    return Local(rows, locals_[0].cols, 2, tuple(pieces))


def declared(local: Local, shape: tuple[int, ...]) -> Local:
    """Return the same bytes under another shape."""
    assert prod(shape) == local.rows * local.cols
    return local._replace(declared=shape)
