"""Attention of packed sequences over paged keys and values, as an attention function of transformers.

transformers lets anyone register one by name; a model configured with that name calls it from each layer with its
queries, keys and values, and hands every keyword argument of `forward` on: the step travels as `ferry_step`. Masks are
not made, since no mask function has that name: who sees what follows from positions. The step says which rows are
answered together. Sequences with one query are answered in groups of like length, others one by one.

Legend: T packed tokens, G sequences of a group, Q queries, S keys, H heads, K heads of keys, D their sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from ferry.core.errors import InputError
from ferry.engines.native.executor import Batch

NAME = "ferry_paged"
STEP = "ferry_step"
PLAIN = frozenset(
    {"dropout", "scaling", "sliding_window", "softcap", "s_aux", "is_causal", "position_ids", "output_attentions",
     "use_cache", "return_dict", "output_hidden_states", "cache_position", STEP}
)  # fmt: skip
"""What a layer may say about its attention and is followed, or changes nothing."""
GROUP_GROWTH = 2.0
"""The longest sequence of a group has at most this many times the keys of the shortest."""


class LayerShape(NamedTuple):
    """What a layer keeps of each token, and how far back it looks (None = to the start)."""

    num_heads: int
    key_dim: int
    value_dim: int
    window: int | None


class Piece(NamedTuple):
    """Queries that are answered by one product.

    Decoding: `rows` [G], `slots` [G * S], `bias` [G, 1, 1, S] or None. A part of a prompt: `rows` is a slice of Q,
    `slots` [S] or None where all keys are among the packed ones, `bias` [Q, S] or None where causal order will do.
    """

    rows: torch.Tensor | slice
    slots: torch.Tensor | None
    num_keys: int
    bias: torch.Tensor | None


@dataclass
class Cache:
    """Keys and values of every layer, [slots, K * D]. The last slot stays zero: padding reads it."""

    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    block_size: int

    @property
    def empty_slot(self) -> int:
        return len(next(iter(self.keys.values()))) - 1


def make_cache(shapes: dict[int, LayerShape], num_blocks: int, block_size: int, dtype: torch.dtype) -> Cache:
    """Return a cache of zeros, whose memory is taken when it is written."""
    num_slots = num_blocks * block_size + 1
    keys = {layer: _zeros(num_slots, shape.num_heads * shape.key_dim, dtype) for layer, shape in shapes.items()}
    values = {layer: _zeros(num_slots, shape.num_heads * shape.value_dim, dtype) for layer, shape in shapes.items()}
    return Cache(keys, values, block_size)


def _zeros(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """torch writes its zeros; numpy gets pages that the system has not touched."""
    item_bytes = torch.empty(0, dtype=dtype).element_size()
    return torch.from_numpy(np.zeros((rows, cols * item_bytes), np.uint8)).view(dtype)


@dataclass
class Step:
    """One forward pass. Without a cache it is a trial: nothing is kept, and `seen` says what the layers asked for."""

    batch: Batch
    cache: Cache | None = None
    seen: dict[int, LayerShape] = field(default_factory=dict)
    _pieces: dict[int | None, list[Piece]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.slots_T = torch.from_numpy(self.batch.slots_T.astype(np.int64))

    def pieces(self, window: int | None, dtype: torch.dtype) -> list[Piece]:
        """Return how queries are answered in layers with this window."""
        if window not in self._pieces:
            assert self.cache is not None
            self._pieces[window] = _plan(self.batch, window, self.cache, dtype)
        return self._pieces[window]


def register() -> None:
    """Make the function known to transformers under `NAME`. It may be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged_attention)


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return [1, T, H, D] for query [1, H, T, D], key and value [1, K, T, D] of one layer."""
    step: Step = others[STEP]
    layer, scale = module.layer_idx, scaling if scaling is not None else query.shape[-1] ** -0.5
    if step.cache is None:
        _look(step, module, key, value, attention_mask, sliding_window, others)
        answer = _attend(query, key, value, None, scale, softcap, s_aux)
        return answer.transpose(1, 2), None
    keys, values = step.cache.keys[layer], step.cache.values[layer]
    num_tokens = query.shape[2]
    keys.index_copy_(0, step.slots_T, key[0].transpose(0, 1).reshape(num_tokens, -1))
    values.index_copy_(0, step.slots_T, value[0].transpose(0, 1).reshape(num_tokens, -1))
    answer_THD = query.new_empty(num_tokens, query.shape[1], value.shape[-1])
    num_heads = key.shape[1]
    for piece in step.pieces(sliding_window, query.dtype):
        queries = query[0, :, piece.rows]
        if piece.slots is None:
            assert isinstance(piece.rows, slice)
            found = _attend(queries[None], key[:, :, piece.rows], value[:, :, piece.rows], None, scale, softcap, s_aux)
            answer_THD[piece.rows] = found[0].transpose(0, 1)
            continue
        shape = (-1, piece.num_keys, num_heads)
        k = keys.index_select(0, piece.slots).view(*shape, key.shape[-1]).transpose(1, 2)
        v = values.index_select(0, piece.slots).view(*shape, value.shape[-1]).transpose(1, 2)
        if isinstance(piece.rows, slice):
            answer_THD[piece.rows] = _attend(queries[None], k, v, piece.bias, scale, softcap, s_aux)[0].transpose(0, 1)
        else:
            queries_GH1D = queries.transpose(0, 1)[:, :, None]
            answer_THD[piece.rows] = _attend(queries_GH1D, k, v, piece.bias, scale, softcap, s_aux)[:, :, 0]
    return answer_THD[None], None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    """Return [G, H, Q, D]. Without a bias, several queries are the last ones of as many keys, in causal order."""
    group, heads, num_queries, _ = query.shape
    repeats = heads // key.shape[1]
    is_causal = bias is None and num_queries > 1
    if softcap is not None or sinks_H is not None:
        if is_causal:
            bias = _causal(num_queries, query.dtype)
        return _by_hand(query, key, value, bias, scale, softcap, sinks_H)
    if num_queries == 1 and repeats > 1:
        # The heads that share keys become queries: nothing is repeated.
        folded = query.reshape(group, -1, repeats, query.shape[-1])
        answer = scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=scale)
        return answer.reshape(group, heads, 1, -1)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=is_causal, scale=scale, enable_gqa=repeats > 1
    )


def _by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
) -> torch.Tensor:
    group, heads, num_queries, _ = query.shape
    folded = query.reshape(group, key.shape[1], -1, num_queries, query.shape[-1])
    scores = torch.matmul(folded, key[:, :, None].transpose(3, 4)).reshape(group, heads, num_queries, -1) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if sinks_H is not None:
        sinks = sinks_H.to(scores.dtype).reshape(1, -1, 1, 1).expand(group, -1, num_queries, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks_H is not None:
        weights = weights[..., :-1]
    weights = weights.reshape(group, key.shape[1], -1, num_queries, key.shape[2])
    return torch.matmul(weights, value[:, :, None]).reshape(group, heads, num_queries, -1)


def _causal(num_queries: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((num_queries, num_queries), float("-inf"), dtype=dtype).triu(1)


def _plan(batch: Batch, window: int | None, cache: Cache, dtype: torch.dtype) -> list[Piece]:
    """Return the pieces of a step for layers with this window."""
    starts_B, lens_B = batch.query_starts_B1[:-1].astype(np.int64), batch.context_lens_B.astype(np.int64)
    counts_B = np.diff(batch.query_starts_B1)
    firsts_B = np.zeros_like(lens_B) if window is None else np.maximum(lens_B - counts_B + 1 - window, 0)
    num_keys_B = lens_B - firsts_B
    pieces = []
    single = np.flatnonzero(counts_B == 1)
    for group in _alike(single[np.argsort(num_keys_B[single], kind="stable")], num_keys_B):
        longest = int(num_keys_B[group[-1]])
        places_GS = firsts_B[group, None] + np.arange(longest)
        is_there_GS = places_GS < lens_B[group, None]
        slots_GS = _slots(batch.block_tables_BM[group], np.where(is_there_GS, places_GS, 0), cache.block_size)
        bias = None
        if not is_there_GS.all():
            slots_GS[~is_there_GS] = cache.empty_slot
            bias = _bias(is_there_GS, dtype)[:, None, None]
        pieces.append(Piece(torch.from_numpy(starts_B[group]), torch.from_numpy(slots_GS.reshape(-1)), longest, bias))
    for b in np.flatnonzero(counts_B > 1):
        rows = slice(int(starts_B[b]), int(starts_B[b] + counts_B[b]))
        length, count = int(lens_B[b]), int(counts_B[b])
        is_cut = window is not None and length > window
        if length == count and not is_cut:
            pieces.append(Piece(rows, None, count, None))
            continue
        places_S = np.arange(int(firsts_B[b]), length)
        places_Q1 = np.arange(length - count, length)[:, None]
        sees_QS = places_S <= places_Q1
        if window is not None:
            sees_QS &= places_S > places_Q1 - window
        slots_S = _slots(batch.block_tables_BM[b : b + 1], places_S[None], cache.block_size)[0]
        pieces.append(Piece(rows, torch.from_numpy(slots_S), len(places_S), _bias(sees_QS, dtype)))
    return pieces


def _alike(order: np.ndarray[Any, np.dtype[np.int64]], num_keys_B: np.ndarray[Any, Any]) -> list[Any]:
    """Return groups of sequences of like length; `order` is ascending."""
    groups, begun = [], 0
    for place in range(1, len(order) + 1):
        if place == len(order) or num_keys_B[order[place]] > GROUP_GROWTH * num_keys_B[order[begun]]:
            groups.append(order[begun:place])
            begun = place
    return groups


def _slots(tables_GM: np.ndarray[Any, Any], places_GS: np.ndarray[Any, Any], block_size: int) -> Any:
    """Return where the tokens at these places of their sequences lie."""
    blocks_GS = np.take_along_axis(tables_GM.astype(np.int64), places_GS // block_size, axis=1)
    return blocks_GS * block_size + places_GS % block_size


def _bias(sees: np.ndarray[Any, np.dtype[np.bool_]], dtype: torch.dtype) -> torch.Tensor:
    """Return 0 where a query sees a key, minus infinity elsewhere."""
    return torch.from_numpy(np.where(sees, np.float32(0), np.float32(-np.inf))).to(dtype)


def _look(
    step: Step,
    module: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    window: int | None,
    others: dict[str, Any],
) -> None:
    """Note what a layer keeps, and refuse what is not followed."""
    layer = getattr(module, "layer_idx", None)
    unknown = sorted(name for name, item in others.items() if name not in PLAIN and isinstance(item, torch.Tensor))
    complaint = ""
    if unknown:
        complaint = f"gives its attention {', '.join(unknown)}"
    elif mask is not None:
        complaint = "makes masks of its own"
    elif layer is None or layer in step.seen:
        complaint = f"attends more than once in layer {layer}" if layer is not None else "does not number its layers"
    elif not others.get("is_causal", getattr(module, "is_causal", True)):
        complaint = "lets tokens see those after them"
    if complaint:
        raise InputError(
            f"{type(module).__name__} {complaint}, which the native engine does not follow",
            code="engine.model",
            repair="use another engine",
        )
    step.seen[int(layer)] = LayerShape(key.shape[1], key.shape[-1], value.shape[-1], window)  # type: ignore[arg-type]
