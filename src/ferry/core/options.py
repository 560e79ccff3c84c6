"""A verb's config class seen as a list of options: flags, environment variables, types in words, defaults, bounds.

The command line parses with this list, `--help` and the reference pages print it. It is derived from the pydantic model
alone, so nothing is declared twice.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ferry.core.config import VerbConfig

Kind = Literal["bool", "text", "list", "structure"]
_WORDS = {int: "integer", float: "number", str: "text", Path: "path", bool: "boolean"}


class Option(NamedTuple):
    """One field of a verb's config, as its user meets it."""

    name: str
    flags: tuple[str, ...]
    """The field's own flag first, then its aliases."""
    short: str
    env: tuple[str, ...]
    """The verb's own variable first (it wins), then the aliases."""
    positional: bool
    kind: Kind
    type: str
    choices: tuple[str, ...]
    nullable: bool
    required: bool
    default: str
    bound: str
    unit: str
    help: str
    metavar: str


def options_of(config_class: type[VerbConfig], verb: str) -> list[Option]:
    """Return the options of a verb in the order of their declaration."""
    return [_option(name, field, verb) for name, field in config_class.model_fields.items()]


def environment_prefix(verb: str) -> str:
    return f"FERRY_{verb.upper().replace('-', '_')}_"


def _option(name: str, field: FieldInfo, verb: str) -> Option:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    members = _members(field.annotation)
    inner = [member for member in members if member is not type(None)]
    choices = tuple(str(choice) for member in inner if get_origin(member) is Literal for choice in get_args(member))
    required = field.is_required()
    return Option(
        name=name,
        flags=(f"--{name.replace('_', '-')}", *_texts(extra.get("aliases"))),
        short=str(extra.get("short", "")),
        env=(f"{environment_prefix(verb)}{name.upper()}", *_texts(extra.get("env"))),
        positional=bool(extra.get("positional", False)),
        kind=_kind(inner),
        type=" or ".join(_type_text(member) for member in inner),
        choices=choices,
        nullable=len(inner) < len(members) and not any(member in (str, Path) for member in inner),
        required=required,
        default="" if required else _default_text(field),
        bound=_bound_text(field),
        unit=str(extra.get("unit", "")),
        help=field.description or "",
        metavar=str(extra.get("metavar", "")) or _metavar(name, inner, choices),
    )


def _texts(value: object) -> tuple[str, ...]:
    return tuple(str(item) for item in value) if isinstance(value, list) else ()


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _kind(members: list[Any]) -> Kind:
    if members == [bool]:
        return "bool"
    scalars = [member for member in members if member in _WORDS or get_origin(member) is Literal]
    if scalars:
        return "text"
    sequences = [member for member in members if get_origin(member) in (tuple, list)]
    if sequences and all(argument in (*_WORDS, ...) for member in sequences for argument in get_args(member)):
        return "list"
    return "structure"


def _type_text(member: Any) -> str:
    if get_origin(member) is Literal:
        return " | ".join(str(choice) for choice in get_args(member))
    if get_origin(member) in (tuple, list):
        return f"list of {_type_text(get_args(member)[0])}"
    if get_origin(member) is dict:
        return "mapping"
    return _WORDS.get(member) or str(getattr(member, "__name__", member))


def _metavar(name: str, members: list[Any], choices: tuple[str, ...]) -> str:
    if choices:
        return "|".join(choices)
    if any(member in (int, float) for member in members):
        return "N"
    if any(get_origin(member) in (tuple, list) for member in members):
        return "A,B,.."
    return name.upper()


def _default_text(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value is PydanticUndefined:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return ",".join(str(item) for item in value) or "none"
    return str(value) if str(value) else "none"


def _bound_text(field: FieldInfo) -> str:
    """Return bounds like `>= 1, <= 8`."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "multiple_of": "multiple of"}
    signs |= {"min_length": "length >=", "max_length": "length <="}
    bounds = [
        f"{sign} {getattr(constraint, attribute)}"
        for constraint in field.metadata
        for attribute, sign in signs.items()
        if getattr(constraint, attribute, None) is not None
    ]
    return ", ".join(bounds)
