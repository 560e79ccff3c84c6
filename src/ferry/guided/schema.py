"""From a JSON Schema to the grammar that is exactly it.

Nothing is loosened on the way. What cannot be said is refused with its keyword and place; what is narrowed (spelling,
order of properties, names that are not listed, some formats) is said in the notes or in docs/design/0007-guided.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ferry.guided import grammar
from ferry.guided.algebra import Algebra
from ferry.guided.reading import Document
from ferry.guided.refusal import Refusal, wrong_schema

MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class SchemaRules:
    """The rules of a schema, the name of the first, and what the user should know."""

    start: str
    lines: str
    notes: tuple[str, ...]


def rules_of(
    schema: Any,
    prefix: str = "",
    check_time: Callable[[], None] = lambda: None,
    whitespace: str | None = None,
    *,
    unlisted: bool = False,
) -> SchemaRules:
    """Return the rules of a schema given as JSON values; `check_time` is called often and may raise.

    With `unlisted` the rules are exactly the schema, properties included that it neither lists nor speaks of.
    """
    if not isinstance(schema, (dict, bool)):
        raise wrong_schema("", "#", "must be an object or a boolean")
    try:
        text = json.dumps(schema, allow_nan=False)
        if len(text) > MAX_BYTES:
            raise Refusal(f"the schema has {len(text)} bytes, more than {MAX_BYTES}", code="guided.too_large")
        # Every subschema gets an identity of its own, even if the caller used one object twice.
        document = Document(json.loads(text))
        start, lines = grammar.rules(
            Algebra(document, check_time), document.root, prefix, whitespace, unlisted=unlisted
        )
    except RecursionError as error:
        raise Refusal("the schema is nested too deeply", code="guided.too_large") from error
    except (TypeError, ValueError) as error:
        raise Refusal(f"the schema is not JSON: {error}", code="guided.schema") from error
    return SchemaRules(start, lines, tuple(document.notes))
