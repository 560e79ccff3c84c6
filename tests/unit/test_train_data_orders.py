"""Orders are pure functions: of a seed and a position, never of what was asked before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferry.core.errors import InputError
from ferry.data.mixture import Mixture, View
from ferry.data.orders import permutation, split
from ferry.data.stream import Stream
from ferry.data.tokenset import TokenSet, TokenWriter

SEEDS = st.integers(0, 2**63)


def token_set(directory: Path, lengths: list[int], first: int = 0) -> TokenSet:
    """Make a token file whose sample i holds the token `first + i` only."""
    directory.mkdir(parents=True)
    with TokenWriter(directory) as writer:
        for index, length in enumerate(lengths):
            writer.append(np.full(length, first + index, np.int32), np.ones(length, np.bool_), [length])
        writer.finish({})
    return TokenSet.open(directory)


def test_orders_are_the_same_on_every_machine_and_version() -> None:
    # If this changes, a run that is resumed sees other data than before.
    assert permutation(8, 1234, 1, 0).tolist() == [2, 0, 7, 6, 1, 4, 5, 3]
    assert permutation(0, 1).tolist() == []


@given(st.integers(0, 300), SEEDS, st.integers(0, 1000))
def test_an_order_holds_every_number_once_and_depends_on_the_epoch(num: int, seed: int, epoch: int) -> None:
    order = permutation(num, seed, 1, epoch)
    assert sorted(order.tolist()) == list(range(num))
    if num > 20:
        assert order.tolist() != permutation(num, seed, 1, epoch + 1).tolist()
        assert order.tolist() != permutation(num, seed + 1, 1, epoch).tolist()


@given(st.integers(0, 500), st.integers(0, 500), st.floats(0, 0.99), SEEDS)
def test_a_split_is_disjoint_complete_and_does_not_move_when_data_grow(
    num: int, further: int, fraction: float, seed: int
) -> None:
    kept, held_out = split(num, fraction, seed)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(num))
    if num >= 2 and fraction > 0:
        assert len(kept) >= 1
        assert len(held_out) >= 1
    grown = split(num + further, fraction, seed)[1]
    moved = set(held_out.tolist()) ^ {index for index in grown.tolist() if index < num}
    assert len(moved) <= 2  # only the one that is forced to keep a side from being empty


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[TokenSet]:
    top = tmp_path_factory.mktemp("sets")
    return [token_set(top / "a", [3] * 10), token_set(top / "b", [5] * 25, 100), token_set(top / "c", [2] * 5, 200)]


def test_sets_behind_each_other_keep_their_samples(three: list[TokenSet]) -> None:
    mixture = Mixture(three)
    assert mixture.num_samples == 40
    assert mixture.lengths.tolist() == [3] * 10 + [5] * 25 + [2] * 5
    assert [int(mixture.sample(index).ids_T[0]) for index in (0, 9, 10, 34, 35, 39)] == [0, 9, 100, 124, 200, 204]
    assert mixture.counts() == [10, 25, 5]
    assert sorted(mixture.epoch_order(7, 3).tolist()) == list(range(40))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=3, max_size=3), SEEDS)
def test_weights_decide_the_share_of_each_set_and_no_sample_comes_twice_in_a_round(
    three: list[TokenSet], weights: list[float], seed: int
) -> None:
    mixture = Mixture(three, weights)
    counts = mixture.counts()
    assert sum(counts) == mixture.num_samples
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - 40 * weight / sum(weights)) < 1
    drawn: list[list[int]] = [[], [], []]
    for epoch in range(4):
        order = mixture.epoch_order(seed, epoch)
        assert len(order) == 40
        assert order.tolist() == mixture.epoch_order(seed, epoch).tolist()
        parts = [mixture.locate(int(index)) for index in order]
        for part, number in enumerate(counts):
            mine = sorted(inner for found, inner in parts if found == part)
            assert len(mine) == number
            drawn[part] += mine
    for part, size in enumerate((10, 25, 5)):
        times = np.bincount(drawn[part], minlength=size)
        assert times.max() - times.min() <= 1  # rounds: every sample comes before any comes again


def test_a_mixture_is_named_by_its_parts_and_weights(three: list[TokenSet]) -> None:
    names = {
        Mixture(three).sha256,
        Mixture(three[:2]).sha256,
        Mixture(three, [1, 1, 1]).sha256,
        Mixture(three, [1, 1, 2]).sha256,
        Mixture([View(three[0], np.arange(9)), *three[1:]]).sha256,
    }
    assert len(names) == 5


def test_another_process_sees_the_same_order() -> None:
    code = "from ferry.data.orders import permutation; print(permutation(50, 5, 1, 2).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(permutation(50, 5, 1, 2).tolist())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 30), SEEDS, st.integers(0, 5))
def test_a_stream_is_the_documents_of_an_epoch_cut_into_equal_sequences(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, seed: int, epoch: int
) -> None:
    documents = Mixture([token_set(tmp_path_factory.mktemp("stream") / "a", lengths)])
    if sum(lengths) < seq_len:
        with pytest.raises(InputError, match="less than one sequence"):
            Stream(documents, seq_len)
        return
    sequences = Stream(documents, seq_len).epoch(seed, epoch)
    whole = np.concatenate([documents.sample(int(index)).ids_T for index in documents.epoch_order(seed, epoch)])
    assert sequences.num_sequences == sum(lengths) // seq_len
    for index in reversed(range(sequences.num_sequences)):
        ids_T, supervised_T, starts = sequences.sequence(index)
        assert ids_T.tolist() == whole[index * seq_len : (index + 1) * seq_len].tolist()
        assert supervised_T.all()
        changes = [0, *(np.flatnonzero(np.diff(ids_T)) + 1).tolist()]
        assert starts.tolist() == changes
    with pytest.raises(IndexError):
        sequences.sequence(sequences.num_sequences)
