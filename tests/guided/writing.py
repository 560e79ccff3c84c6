"""How tests ask a grammar: bytes instead of a model's tokens, and every spelling of a value."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher

from ferry.guided.building import build
from ferry.guided.byte_tokenizer import byte_tokenizer
from ferry.guided.request import Constraint

MAX_SPELLINGS = 2000


def automaton(schema: Any, whitespace: str | None = None, *, unlisted: bool = True) -> LLMatcher:
    """Return the automaton of a schema over bytes: of exactly the schema, or of what is written of it."""
    constraint = Constraint("json", json.dumps(schema), "guided_json", whitespace)
    lark = build(constraint, unlisted=unlisted).lark
    matcher = LLMatcher(byte_tokenizer(), LLMatcher.grammar_from_lark(lark), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def accepts(matcher: LLMatcher, text: str) -> bool:
    """Return whether a whole text is in the language."""
    copy = matcher.deep_copy()
    tokens = list(text.encode())
    return copy.try_consume_tokens(tokens) == len(tokens) and copy.is_accepting()


def writes(matcher: LLMatcher, value: Any) -> bool:
    """Return whether a grammar has some spelling of a value."""
    return any(accepts(matcher, text) for text in itertools.islice(spellings(value), MAX_SPELLINGS))


def spellings(value: Any) -> Iterator[str]:
    """Yield a value as compact JSON in each order of properties, whole numbers with and without a fraction."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        yield json.dumps(value, ensure_ascii=False)
    elif isinstance(value, (int, float)):
        yield from dict.fromkeys([json.dumps(value), format(Decimal(repr(value)), "f")])
        if value == int(value):
            yield from (str(int(value)), f"{int(value)}.0")
    elif isinstance(value, list):
        for items in itertools.product(*(list(spellings(item)) for item in value)):
            yield "[" + ",".join(items) + "]"
    else:
        for order in itertools.permutations(value.items()):
            names = [json.dumps(name, ensure_ascii=False) for name, _ in order]
            for inner in itertools.product(*(list(spellings(one)) for _, one in order)):
                yield "{" + ",".join(map(":".join, zip(names, inner, strict=True))) + "}"


def num_spellings(value: Any) -> int:
    """Return about how many spellings a value has."""
    if isinstance(value, list):
        return math.prod(map(num_spellings, value))
    if isinstance(value, dict):
        return math.factorial(len(value)) * math.prod(map(num_spellings, value.values()))
    return 3 if isinstance(value, (int, float)) else 1
