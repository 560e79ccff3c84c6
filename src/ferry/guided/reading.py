"""A JSON Schema document as expressions: every keyword becomes what it says, or is refused with its place.

Drafts 4 to 2020-12. Without `$schema` the newest words hold, and the older ones too (`dependencies`, `items` as a
list): nobody writes them to be ignored. Subschemas become places, read when they are needed; references are followed
through `referencing`, without a network.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]
from referencing.exceptions import Unresolvable
from referencing.jsonschema import specification_with

from ferry.core.errors import did_you_mean
from ferry.guided import regexes, texts, unevaluated
from ferry.guided.refusal import cannot_enforce, wrong_schema
from ferry.guided.shapes import (
    ANY,
    EVERY_KIND,
    NEVER,
    Array,
    Count,
    Has,
    Null,
    Number,
    Object,
    One,
    Only,
    Place,
    Rule,
    Shape,
    Text,
    Truth,
    Value,
    every,
    having,
    one_name,
    outside,
    some,
)
from ferry.guided.values import canonical, exact, kind_of, least_common_multiple
from ferry.guided.words import ANNOTATIONS, DRAFTS, ENFORCED, REFUSED_WORDS

TYPES: dict[str, tuple[type, ...]] = {
    "null": (Null,), "boolean": (Truth,), "number": (Number,), "integer": (Number,), "string": (Text,),
    "array": (Array,), "object": (Object,),
}  # fmt: skip
MAX_PLACES = 20_000


class Document:
    """One schema document: its places, and what each of them says."""

    def __init__(self, schema: Any) -> None:
        words = schema if isinstance(schema, dict) else {}
        draft = str(words.get("$schema", "")).rstrip("#")
        if draft and draft not in DRAFTS:
            raise cannot_enforce(
                "$schema", "#", f"the dialect {draft!r} is not known", f"use one of {', '.join(DRAFTS)}"
            )
        self.siblings_of_ref = not draft or draft in DRAFTS[:2]
        self.contains_looks = draft != DRAFTS[1]
        self.notes: list[str] = []
        self.asks_for_unlisted = False
        """Whether an object with listed properties says `additionalProperties: true`, or `{}`."""
        self.pointers: list[str] = []
        self._contents: list[tuple[dict[str, Any], Any]] = []
        self._numbers: dict[int, int] = {}
        # Without a draft, references are looked for where either generation keeps its subschemas.
        self.specification = specification_with(draft or (DRAFTS[2] if _has_old_items(schema) else DRAFTS[0]))
        base = str(words.get("$id", words.get("id", ""))).rstrip("#")
        try:
            registry = REGISTRY.with_resource(base, self.specification.create_resource(schema))
            resolver = registry.resolver(base)
        except (ValueError, AttributeError, TypeError) as error:
            raise wrong_schema("$id", "#", f"cannot be read: {error}") from error
        self.root = self._place(schema, resolver, "#", enter=False)

    def read(self, number: int) -> Shape:
        """Return what the schema at a place says."""
        return self.reader(number).shape()

    def reader(self, number: int) -> Reader:
        """Return the reader of a place, for questions about its keywords."""
        schema, resolver = self._contents[number]
        return Reader(self, schema, resolver, self.pointers[number])

    def child(self, schema: Any, resolver: Any, pointer: str) -> Shape:
        """Return the place of a subschema; `true` and `{}` say nothing, `false` is nothing."""
        return self._place(schema, resolver, pointer, enter=True)

    def target(self, reference: str, resolver: Any, pointer: str) -> Shape:
        """Return the place that a reference means."""
        try:
            found = resolver.lookup(reference)
        except (Unresolvable, ValueError, AttributeError, TypeError, KeyError) as error:
            raise wrong_schema("$ref", pointer, f"leads nowhere: {reference!r} is not in this document") from error
        name = reference if reference.startswith("#") else f"{pointer}/$ref"
        return self._place(found.contents, found.resolver, name, enter=False)

    def _place(self, schema: Any, resolver: Any, pointer: str, enter: bool) -> Shape:
        if schema is True or schema == {}:
            return ANY
        if schema is False:
            return NEVER
        if not isinstance(schema, dict):
            raise wrong_schema("", pointer, f"must be an object or a boolean, not {kind_of(schema)}")
        number = self._numbers.get(id(schema))
        if number is None:
            number = self._numbers[id(schema)] = len(self._contents)
            if number >= MAX_PLACES:
                raise wrong_schema("", pointer, f"has more than {MAX_PLACES} subschemas")
            if enter:
                resolver = resolver.in_subresource(self.specification.create_resource(schema))
            self._contents.append((schema, resolver))
            self.pointers.append(pointer)
        return Place(number)


class Reader:
    """One schema object, and where it stands."""

    def __init__(self, document: Document, schema: dict[str, Any], resolver: Any, pointer: str) -> None:
        self.document = document
        self.schema = schema
        self.resolver = resolver
        self.pointer = pointer

    def shape(self) -> Shape:
        if "$ref" in self.schema and not self.document.siblings_of_ref:
            return self.reference()
        self.check_words()
        parts = [self.kinds()]
        if "$ref" in self.schema:
            parts.append(self.reference())
        parts += self.values()
        parts += self.logic()
        parts += self.dependencies()
        if "unevaluatedProperties" in self.schema:
            parts.append(unevaluated.properties(self))
        if "unevaluatedItems" in self.schema:
            parts.append(unevaluated.items(self))
        return every(*parts)

    def check_words(self) -> None:
        for word in self.schema:
            if word in REFUSED_WORDS:
                raise cannot_enforce(word, self.pointer, "where it leads depends on the way that led to it")
            if word in ENFORCED or word in ANNOTATIONS or word.startswith("x-"):
                continue
            near = did_you_mean(word, sorted(ENFORCED))
            if near and word.lower() not in {"example", "nullable"}:
                raise wrong_schema(word, self.pointer, f"is no keyword{near}")
            self.note(f"{word!r} at {self.pointer} is no keyword of JSON Schema and constrains nothing")

    def note(self, text: str) -> None:
        if text not in self.document.notes:
            self.document.notes.append(text)

    def reference(self) -> Shape:
        reference = self.schema["$ref"]
        if not isinstance(reference, str):
            raise wrong_schema("$ref", self.pointer, f"must be a string, not {kind_of(reference)}")
        return self.document.target(reference, self.resolver, self.pointer)

    # One type at a time.

    def kinds(self) -> Shape:
        names = self.schema.get("type")
        names = [names] if isinstance(names, str) else names
        if names is not None and (not isinstance(names, list) or not names or not set(names) <= set(TYPES)):
            wrong = [name for name in names if name not in TYPES] if isinstance(names, list) else names
            raise wrong_schema("type", self.pointer, f"must be among {', '.join(TYPES)}, found {wrong!r}")
        allowed = [kind for name in names for kind in TYPES[name]] if names is not None else None
        kinds: list[Shape] = []
        for kind in EVERY_KIND:
            if allowed is not None and type(kind) not in allowed:
                continue
            if isinstance(kind, Number):
                kinds.append(Only(self.number(integer=names is not None and "number" not in names)))
            elif isinstance(kind, Text):
                kinds.append(Only(self.text()))
            elif isinstance(kind, Array):
                kinds.append(Only(self.array()))
            elif isinstance(kind, Object):
                kinds.append(Only(self.object()))
            else:
                kinds.append(Only(kind))
        return ANY if kinds == [Only(kind) for kind in EVERY_KIND] else some(*kinds)

    def number(self, integer: bool) -> Number:
        low, high = self.fraction("minimum"), self.fraction("maximum")
        low_open = high_open = False
        if self.schema.get("exclusiveMinimum") in (True, False) and isinstance(
            self.schema.get("exclusiveMinimum"), bool
        ):
            low_open = low is not None and bool(self.schema["exclusiveMinimum"])
        elif (above := self.fraction("exclusiveMinimum")) is not None and (low is None or above >= low):
            low, low_open = above, True
        if isinstance(self.schema.get("exclusiveMaximum"), bool):
            high_open = high is not None and bool(self.schema["exclusiveMaximum"])
        elif (below := self.fraction("exclusiveMaximum")) is not None and (high is None or below <= high):
            high, high_open = below, True
        multiple = self.fraction("multipleOf")
        if multiple is not None and multiple <= 0:
            raise wrong_schema("multipleOf", self.pointer, "must be above 0")
        if integer:
            multiple = Fraction(1) if multiple is None else least_common_multiple(multiple, Fraction(1))
        return Number(low, low_open, high, high_open, multiple)

    def text(self) -> Text:
        patterns, formats = set(), set()
        if "pattern" in self.schema:
            patterns.add(self.pattern(self.schema["pattern"], "pattern"))
        name = self.schema.get("format")
        if name is not None and not isinstance(name, str):
            raise wrong_schema("format", self.pointer, f"must be a string, not {kind_of(name)}")
        if name in texts.REFUSED_FORMATS:
            raise cannot_enforce("format", self.pointer, f"no automaton knows the format {name!r}")
        if name in texts.NARROWED:
            self.note(f"format {name!r} at {self.pointer} is written as {texts.NARROWED[name]!r}")
            formats.add(texts.NARROWED[name])
        elif name in texts.FORMATS:
            formats.add(name)
        elif name is not None:
            self.note(f"format {name!r} at {self.pointer} is an annotation and constrains nothing")
        shortest, longest = self.count("minLength") or 0, self.count("maxLength")
        return Text(None, shortest, longest, frozenset(patterns), frozenset(formats))

    def array(self) -> Array:
        first, rest = self.schema.get("prefixItems", []), self.schema.get("items", True)
        first_word, rest_word = "prefixItems", "items"
        if isinstance(rest, list):
            first, rest = rest, self.schema.get("additionalItems", True)
            first_word, rest_word = "items", "additionalItems"
        if not isinstance(first, list):
            raise wrong_schema(first_word, self.pointer, f"must be an array, not {kind_of(first)}")
        shapes = tuple(self.child(item, first_word, str(index)) for index, item in enumerate(first))
        unique = self.schema.get("uniqueItems", False)
        if not isinstance(unique, bool):
            raise wrong_schema("uniqueItems", self.pointer, f"must be a boolean, not {kind_of(unique)}")
        counts: tuple[Count, ...] = ()
        if "contains" in self.schema:
            at_least = self.count("minContains")
            at_least, at_most = 1 if at_least is None else at_least, self.count("maxContains")
            if at_least or at_most is not None:
                counts = (Count(self.child(self.schema["contains"], "contains"), 0, at_least, at_most),)
        rest_shape = self.child(rest, rest_word)
        return Array(
            shapes,
            None if rest_shape == ANY else rest_shape,
            self.count("minItems") or 0,
            self.count("maxItems"),
            unique,
            counts,
        )

    def object(self) -> Object:
        properties = self.table("properties")
        patterns = self.table("patternProperties")
        rules = [Rule(one_name(name), self.child(value, "properties", name)) for name, value in properties.items()]
        for text, value in patterns.items():
            keys = Text(patterns=frozenset({self.pattern(text, "patternProperties")}))
            rules.append(Rule(Only(keys), self.child(value, "patternProperties", text)))
        if properties and self.schema.get("additionalProperties") in (True, {}):
            self.document.asks_for_unlisted = True
        if self.schema.get("additionalProperties", True) is not True:
            others = Text(excluded=frozenset(properties), unmatched=frozenset(patterns))
            value = self.child(self.schema["additionalProperties"], "additionalProperties")
            rules.append(Rule(Only(others), value))
        if "propertyNames" in self.schema:
            rules.append(Rule(outside(self.child(self.schema["propertyNames"], "propertyNames")), NEVER))
        has = [Has(one_name(name), ANY) for name in self.names("required")]
        low, high = self.count("minProperties") or 0, self.count("maxProperties")
        return Object(tuple(dict.fromkeys(rules)), tuple(dict.fromkeys(has)), low, high)

    # Whole values and logic.

    def values(self) -> list[Shape]:
        parts: list[Shape] = []
        if "const" in self.schema:
            parts.append(Value(canonical(self.schema["const"])))
        if "enum" in self.schema:
            if not isinstance(self.schema["enum"], list):
                raise wrong_schema("enum", self.pointer, "must be an array")
            parts.append(some(*(Value(canonical(value)) for value in self.schema["enum"])))
        return parts

    def logic(self) -> list[Shape]:
        parts: list[Shape] = []
        for word, combine in (("allOf", every), ("anyOf", some), ("oneOf", _one)):
            if word in self.schema:
                branches = self.schema[word]
                if not isinstance(branches, list) or not branches:
                    raise wrong_schema(word, self.pointer, "must be an array of at least one schema")
                parts.append(combine(*(self.child(one, word, str(index)) for index, one in enumerate(branches))))
        if "not" in self.schema:
            parts.append(outside(self.child(self.schema["not"], "not")))
        if "if" in self.schema and ("then" in self.schema or "else" in self.schema):
            test = self.child(self.schema["if"], "if")
            then, otherwise = (
                self.child(self.schema.get("then", True), "then"),
                self.child(self.schema.get("else", True), "else"),
            )
            parts.append(some(every(test, then), every(outside(test), otherwise)))
        return parts

    def dependencies(self) -> list[Shape]:
        parts: list[Shape] = []
        for word in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name, needs in self.table(word).items():
                if isinstance(needs, list):
                    then = every(*(having(str(one)) for one in (name, *needs)))
                else:
                    then = every(having(name), self.child(needs, word, name))
                without = Only(Object(rules=(Rule(one_name(name), NEVER),)))
                others = (Only(kind) for kind in EVERY_KIND if not isinstance(kind, Object))
                parts.append(some(*others, without, then))
        return parts

    # Words with a value of one type.

    def child(self, schema: Any, *path: str) -> Shape:
        steps = "".join("/" + step.replace("~", "~0").replace("/", "~1") for step in path)
        return self.document.child(schema, self.resolver, self.pointer + steps)

    def table(self, word: str) -> dict[str, Any]:
        value = self.schema.get(word, {})
        if not isinstance(value, dict):
            raise wrong_schema(word, self.pointer, f"must be an object, not {kind_of(value)}")
        return value

    def names(self, word: str) -> list[str]:
        value = self.schema.get(word, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            if isinstance(value, bool) and "draft-04" not in str(self.schema):
                raise wrong_schema(
                    word, self.pointer, "must be an array of names in the object's schema, not a boolean"
                )
            raise wrong_schema(word, self.pointer, "must be an array of strings")
        return value

    def count(self, word: str) -> int | None:
        value = self.fraction(word)
        if value is None:
            return None
        if value < 0 or value.denominator != 1:
            raise wrong_schema(word, self.pointer, f"must be a whole number of 0 or more, found {self.schema[word]!r}")
        return int(value)

    def fraction(self, word: str) -> Fraction | None:
        value = self.schema.get(word)
        if value is None or (isinstance(value, bool) and word.startswith("exclusive")):
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
            raise wrong_schema(word, self.pointer, f"must be a number, not {kind_of(value)}")
        return exact(value)

    def pattern(self, text: Any, word: str) -> str:
        if not isinstance(text, str):
            raise wrong_schema(word, self.pointer, f"must be a string, not {kind_of(text)}")
        try:
            regexes.parse(text)
        except regexes.PatternError as error:
            raise cannot_enforce(word, self.pointer, str(error)) from error
        return text


def _has_old_items(schema: Any) -> bool:
    if isinstance(schema, dict):
        return isinstance(schema.get("items"), list) or any(map(_has_old_items, schema.values()))
    return isinstance(schema, list) and any(map(_has_old_items, schema))


def _one(*parts: Shape) -> Shape:
    return parts[0] if len(parts) == 1 else One(parts)
