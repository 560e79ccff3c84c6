"""Random schemas: what the grammar takes is what `jsonschema` calls valid, and no way through it ends in the middle."""

from __future__ import annotations

import json
from random import Random

import pytest
from llguidance import LLMatcher

from ferry.guided.refusal import Refusal
from ferry.guided.validate import TOO_DEEP, check_json
from guided import random_schemas
from guided.writing import automaton, num_spellings, writes

PER_BATCH = 60


@pytest.mark.parametrize("batch", range(5))
def test_a_grammar_takes_exactly_the_valid_values_of_its_schema(batch: int) -> None:
    judge_batch(batch * PER_BATCH, PER_BATCH)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(20))
def test_a_grammar_takes_exactly_the_valid_values_of_many_schemas(batch: int) -> None:
    judge_batch(10_000 + batch * 500, 500)


def judge_batch(first: int, count: int) -> None:
    num_built = num_judge_lost = 0
    for seed in range(first, first + count):
        random = Random(seed)
        schema = random_schemas.schema(random)
        values = [random_schemas.value(random) for _ in range(40)]
        try:
            num_built += judge(seed, schema, values)
        except RecursionError:
            # A loop of references that the judge cannot leave, and that the grammar need not enter.
            num_judge_lost += 1
    assert num_built > count / 2
    assert num_judge_lost <= count / 100


def judge(seed: int, schema: object, values: list[object]) -> bool:
    """Compare grammar and schema on values and on walks; return whether there is a grammar."""
    try:
        matcher = automaton(schema)
    except Refusal as refusal:
        if refusal.code == "guided.unsatisfiable":
            assert not [value for value in values if is_valid(schema, json.dumps(value))], (seed, schema)
        return False
    for value in values:
        if num_spellings(value) < 1000:
            assert writes(matcher, value) is is_valid(schema, json.dumps(value)), (seed, schema, value)
    # What is written without unlisted names is part of it, and never nothing.
    written = automaton(schema, unlisted=False)
    for trial in range(5):
        for each in (matcher, written):
            text = walk(each, Random(seed * 10 + trial))
            assert text is None or is_valid(schema, text), (seed, schema, text)
    return True


def is_valid(schema: object, text: str) -> bool:
    verdict = check_json(schema, text)
    if verdict.reason == TOO_DEEP:
        raise RecursionError
    return verdict.valid


def walk(matcher: LLMatcher, random: Random) -> str | None:
    """Return a text written by chance, or nothing if it grew too long; a dead end is an error."""
    matcher, written = matcher.deep_copy(), bytearray()
    while not matcher.is_stopped() and not (matcher.is_accepting() and random.random() < 0.3):
        mask = matcher.compute_bitmask()
        allowed = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
        assert allowed or matcher.is_accepting(), bytes(written)
        if not allowed:
            break
        ending = [byte for byte in allowed if byte in b'ab01}],"']
        plain = [byte for byte in allowed if byte < 128]
        byte = random.choice(ending if ending and random.random() < 0.8 else plain or allowed)
        assert matcher.consume_token(byte)
        written.append(byte)
        if len(written) > 300:
            return None
    return written.decode()
