"""Laws of the blocks: counted references, no block to two writers, nothing found but what is equal."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ferry.engines.native.blocks import Blocks, key_of

SIZE, NUM_BLOCKS = 4, 6
TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=16)


def keys_of(tokens: list[int]) -> list[bytes]:
    keys = [b""]
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        keys.append(key_of(keys[-1], np.array(tokens[start : start + SIZE], np.int32)))
    return keys[1:]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.booleans()), max_size=30), st.data())
def test_a_block_is_found_only_for_equal_beginnings_and_never_given_to_two(
    arrivals: list[tuple[list[int], bool]], data: st.DataObject
) -> None:
    blocks = Blocks(NUM_BLOCKS)
    content: dict[int, tuple[int, ...]] = {}
    held: list[list[int]] = []
    for tokens, is_named in arrivals:
        keys, found = keys_of(tokens), []
        for index, key in enumerate(keys):
            block = blocks.find(key)
            if block is None:
                break
            assert content[block] == tuple(tokens[: (index + 1) * SIZE])
            found.append(block)
        num_new = -(-len(tokens) // SIZE) - len(found)
        if num_new > blocks.num_free - blocks.num_kept(found):
            if held:
                blocks.give_back(held.pop(data.draw(st.integers(0, len(held) - 1))))
            continue
        blocks.share(found)
        new = blocks.take(num_new)
        assert not set(new) & {block for others in held for block in others}
        assert not set(new) & set(found)
        for index, block in enumerate(new, len(found)):
            content[block] = tuple(tokens[: (index + 1) * SIZE])
            if is_named and index < len(keys):
                blocks.name(block, keys[index])
        held.append(found + new)
        assert blocks.num_held == len({block for others in held for block in others})
    for others in held:
        blocks.give_back(others)
    assert blocks.num_free == NUM_BLOCKS
    assert sorted(blocks.take(NUM_BLOCKS)) == list(range(NUM_BLOCKS))


def test_memory_that_was_never_written_stays_so_while_there_is_other() -> None:
    blocks = Blocks(100)
    for _ in range(50):
        taken = blocks.take(3)
        assert taken == [0, 1, 2]
        blocks.give_back(taken)


def test_the_content_unused_for_longest_is_forgotten_first_and_ends_before_beginnings() -> None:
    blocks = Blocks(4)
    first, second = keys_of([0] * 8), keys_of([1] * 8)
    for keys in (first, second):
        taken = blocks.take(2)
        for block, key in zip(taken, keys, strict=True):
            blocks.name(block, key)
        blocks.give_back(taken)
    blocks.share([blocks.find(first[0]) or 0])
    blocks.give_back([blocks.find(first[0]) or 0])
    known = []
    for _ in range(4):
        known.append([blocks.find(key) is not None for key in (*first, *second)])
        blocks.take(1)
    assert known == [
        [True, True, True, True],
        [True, False, True, True],
        [True, False, True, False],
        [True, False, False, False],
    ]
