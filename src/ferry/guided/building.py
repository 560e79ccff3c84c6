"""A constraint as the one text that llguidance reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ferry.guided import regexes
from ferry.guided.refusal import Refusal
from ferry.guided.request import Constraint
from ferry.guided.schema import rules_of

HEAD = "%llguidance {}\n"
_LARK = re.compile(r"(?m)^\s*\??start\s*:(?!:=)")


@dataclass(frozen=True)
class Grammar:
    """A grammar in llguidance's Lark, and what the user should know about it."""

    lark: str
    notes: tuple[str, ...] = ()


def build(constraint: Constraint, check_time: Callable[[], None] = lambda: None, *, unlisted: bool = False) -> Grammar:
    """Return the grammar of a constraint; `check_time` is called often and may raise.

    `unlisted`: also write properties that a schema neither lists nor speaks of; see `schema.rules_of`.
    """
    if constraint.form == "json":
        # A whitespace pattern goes into the words themselves: llguidance repeats what it ignores.
        whitespace = constraint.whitespace and _slashed(constraint.whitespace)
        schema = json.loads(constraint.source)
        rules = rules_of(schema, check_time=check_time, whitespace=whitespace, unlisted=unlisted)
        return Grammar(f"{HEAD}start: {rules.start}\n{rules.lines}", (*constraint.notes, *rules.notes))
    if constraint.form == "choice":
        options = " | ".join(f"/{_slashed(regexes.exactly(one))}/" for one in json.loads(constraint.source))
        return Grammar(f"{HEAD}start: CHOICE\nCHOICE: {options}\n", constraint.notes)
    if constraint.form == "regex":
        return Grammar(f"{HEAD}start: TEXT\nTEXT: /{_slashed(_whole(constraint.source))}/\n", constraint.notes)
    if constraint.form == "grammar":
        return _of_grammar(constraint, check_time)
    return _of_tags(constraint, check_time)


def _of_grammar(constraint: Constraint, check_time: Callable[[], None]) -> Grammar:
    """Return a Lark or EBNF grammar; JSON Schemas inside it become rules of ours."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        text = constraint.source if _LARK.search(constraint.source) else any_to_lark(constraint.source)
    except Exception as error:
        raise Refusal(
            f"{constraint.field} is neither Lark nor EBNF: {error}", code="guided.grammar", keyword=constraint.field
        ) from error
    parts, notes, more = text.split("%json"), list(constraint.notes), []
    for index, part in enumerate(parts[1:], 1):
        rest = part.lstrip()
        try:
            schema, end = json.JSONDecoder().raw_decode(rest)
        except ValueError as error:
            raise Refusal(
                f"%json in {constraint.field} is not followed by JSON: {error}", code="guided.grammar"
            ) from error
        rules = rules_of(schema, f"json{index}_", check_time)
        more.append(rules.lines)
        notes += rules.notes
        parts[index] = rules.start + rest[end:]
    return Grammar("".join([parts[0], *(f" {part}" for part in parts[1:])]) + "\n" + "".join(more), tuple(notes))


def _of_tags(constraint: Constraint, check_time: Callable[[], None]) -> Grammar:
    """Return free text in which each trigger begins a tag with JSON inside."""
    value = json.loads(constraint.source)
    tags, triggers = value.get("structures"), value.get("triggers")
    if not isinstance(tags, list) or not tags or not isinstance(triggers, list) or not triggers:
        raise _wrong_tag(constraint, "needs 'structures' and 'triggers', two lists")
    lines, notes = [], list(constraint.notes)
    for index, tag in enumerate(tags):
        begin, end, schema = _parts_of_tag(constraint, tag)
        trigger = next((one for one in triggers if isinstance(one, str) and one and begin.startswith(one)), None)
        if trigger is None:
            raise _wrong_tag(constraint, f"has no trigger that begins {begin!r}")
        rules = rules_of(schema, f"tag{index}_", check_time)
        notes += rules.notes
        lines.append(f"free{index}[lazy]: /{_slashed('(?s:.*)' + regexes.exactly(trigger))}/")
        opening, closing = (f'"{_slashless(text)}"' if text else "" for text in (begin[len(trigger) :], end))
        lines.append(f"tag{index}: free{index} {opening} {rules.start} {closing}\n{rules.lines}")
    names = " | ".join(f"tag{index}" for index in range(len(tags)))
    never = " & ".join(f"~/(?s:.*){_slashed(regexes.exactly(one))}(?s:.*)/" for one in triggers)
    return Grammar(
        f"{HEAD}start: ({names})* last\nlast: LAST\nLAST: /(?s:.*)/ & {never}\n" + "\n".join(lines), tuple(notes)
    )


def _parts_of_tag(constraint: Constraint, tag: Any) -> tuple[str, str, Any]:
    if not isinstance(tag, Mapping):
        raise _wrong_tag(constraint, "has a structure that is no object")
    begin, end = tag.get("begin"), tag.get("end", "")
    if not isinstance(begin, str) or not begin or not isinstance(end, str):
        raise _wrong_tag(constraint, "has a structure whose 'begin' or 'end' is no text")
    return begin, end, tag.get("schema", True)


def _wrong_tag(constraint: Constraint, message: str) -> Refusal:
    return Refusal(f"{constraint.field} {message}", code="guided.field", keyword="structural_tag")


def _whole(pattern: str) -> str:
    """Return a pattern without the anchors around it: the whole answer is matched anyway."""
    start = pattern.removeprefix("^")
    escaped = len(start) - len(start.rstrip("$").rstrip("\\"))
    if start.endswith("$") and escaped % 2 == 1 and not start.endswith("\\$"):
        return start[:-1]
    return start


def _slashed(expression: str) -> str:
    """Return a regular expression for use between slashes."""
    out, escaped = [], False
    for character in expression:
        out.append("\\/" if character == "/" and not escaped else character)
        escaped = character == "\\" and not escaped
    return "".join(out)


def _slashless(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
