"""Where pictures lie in a row of tokens: placeholders, one a token of the picture, and their positions on three axes.

A template writes one placeholder a picture; here it becomes as many as the picture has tokens. Text counts on along all
three axes (time, height, width) together; inside a picture height and width count its rows and columns, and the text
behind it goes on after the larger of the two (Wang et al. 2024, arXiv 2409.12191, section 2.1). T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ferry.data.conversation import BadRow

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class Grid(NamedTuple):
    """The tokens of a picture: rows and columns."""

    rows: int
    columns: int


def expanded(ids_T: Int32, supervised_T: Bool, grids: Sequence[Grid], image_token: int) -> tuple[Int32, Bool]:
    """Return the tokens with each placeholder repeated for its picture; placeholders are never learned."""
    is_place_T = ids_T == image_token
    times_T = np.ones(len(ids_T), np.int64)
    times_T[is_place_T] = [grid.rows * grid.columns for grid in grids]
    return np.repeat(ids_T, times_T), np.repeat(supervised_T & ~is_place_T, times_T)


def check_count(ids_T: Int32, num_pictures: int, image_token: int) -> None:
    """Refuse a row whose template has not written one placeholder a picture."""
    num_places = int((ids_T == image_token).sum())
    if num_places != num_pictures:
        raise BadRow(f"pictures and places for them differ: the row names {num_pictures}, its turns have {num_places}")


def axes(ids_T: Int64, positions_T: Int64, grids: Sequence[Grid], image_token: int) -> Int64:
    """Return positions [3, T]: those of the text, and for each picture in its order those of its grid.

    Samples of a packed row begin where `positions_T` is 0, and count from 0 each.
    """
    axes_3T = np.empty((3, len(ids_T)), np.int64)
    bounds = [*np.flatnonzero(positions_T == 0).tolist(), len(ids_T)]
    waiting = deque(grids)
    for start, end in pairwise(bounds):
        at, later = start, -start  # the next token, and what is added to its place to make its position
        while (found := np.flatnonzero(ids_T[at:end] == image_token)).size:
            place, grid = at + int(found[0]), waiting.popleft()
            behind = place + grid.rows * grid.columns
            assert behind <= end, "a picture is cut"
            assert (ids_T[place:behind] == image_token).all(), "fewer placeholders than a picture has tokens"
            axes_3T[:, at:place] = np.arange(at, place) + later
            axes_3T[:, place:behind] = _inside(grid) + place + later
            at, later = behind, later + max(grid) - grid.rows * grid.columns
        axes_3T[:, at:end] = np.arange(at, end) + later
    assert not waiting, "more pictures than placeholders"
    return axes_3T


def _inside(grid: Grid) -> Int64:
    """Return time, height and width inside a picture [3, tokens], row by row."""
    height, width = np.divmod(np.arange(grid.rows * grid.columns), grid.columns)
    return np.stack([np.zeros_like(height), height, width])
