"""One typed declaration per verb, and how its values are found.

A verb's options are the fields of one frozen pydantic model. The command line, YAML files, environment variables, JSON
schema and the reference pages are all made from it. Values come in layers, later ones over earlier ones: defaults,
recipe, config files from left to right, environment, flags. Each value remembers the layer it came from, and all wrong
fields are named at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

from ferry.core.errors import ConfigError, did_you_mean


class Problem(NamedTuple):
    """One thing that is wrong with what the user gave."""

    code: str
    text: str


class Layer(NamedTuple):
    """Values from one place. `origins` names the exact place of a value where it is finer than the layer's origin."""

    origin: str
    values: dict[str, Any]
    origins: dict[str, str] = {}  # noqa: RUF012 - never written to: every layer is made with its own
    problems: tuple[Problem, ...] = ()
    """What could not even be read as values: unknown flags, a flag without its value."""

    def origin_of(self, path: str) -> str:
        """Return where the value at a dotted path came from."""
        return self.origins.get(path) or self.origins.get(path.partition(".")[0]) or self.origin


class VerbConfig(BaseModel):
    """The base of every verb's config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def interpret(cls, layers: list[Layer]) -> list[Layer]:
        """Return the layers as they shall be merged. A verb overrides this where the meaning of values is joint."""
        return layers

    @classmethod
    def passthrough(cls) -> str:
        """Return the field that collects the flags of another verb, or "" (nearly always)."""
        return ""


C = TypeVar("C", bound=VerbConfig)


class Resolved(NamedTuple, Generic[C]):
    """A complete config, and for each of its values (by dotted path) the place it came from."""

    config: C
    origins: dict[str, str]


def option(
    default: Any,
    *,
    help: str,
    unit: str = "",
    positional: bool = False,
    aliases: Sequence[str] = (),
    env: Sequence[str] = (),
    metavar: str = "",
    short: str = "",
    **pydantic_field_args: Any,
) -> Any:
    """Declare one field: a default (`...` = required), one sentence, and what the command line needs to know.

    `aliases` are further flags (`--load-dir`), `env` further environment variables (`TP`), `short` is like `-o`. A
    variable or alias that several fields declare fills all of them; `interpret` then keeps the ones that are meant.
    """
    given: JsonDict = {
        "unit": unit,
        "positional": positional,
        "aliases": list(aliases),
        "env": list(env),
        "metavar": metavar,
        "short": short,
    }
    extra: JsonDict = {key: value for key, value in given.items() if value}
    return Field(default, description=help, json_schema_extra=extra, **pydantic_field_args)


def resolve(config_class: type[C], layers: Iterable[Layer]) -> Resolved[C]:
    """Merge layers, later ones over earlier ones, and validate once. Raise one ConfigError naming every wrong field."""
    known, origins, problems = _read(config_class, layers)
    try:
        config = config_class.model_validate(known)
    except ValidationError as error:
        problems += [_explain(config_class, detail, origins) for detail in error.errors()]
        raise_problems(problems)
        raise AssertionError("unreachable: there was at least one problem") from None
    raise_problems(problems)
    for name in config_class.model_fields:
        if name not in known:
            origins[name] = "default"
    return Resolved(config, origins)


def problems_of(config_class: type[VerbConfig], layers: Sequence[Layer], pending: Collection[str]) -> list[Problem]:
    """Return what is wrong with values of which some, the `pending` fields, will only be known later."""
    known, origins, problems = _read(config_class, layers)
    try:
        config_class.model_validate(known)
    except ValidationError as error:
        for detail in error.errors():
            # A rule about several fields (no place) cannot be judged while some are unknown.
            if not pending or (detail["loc"] and detail["loc"][0] not in pending):
                problems.append(_explain(config_class, detail, origins))
    return problems


def _read(
    config_class: type[VerbConfig], layers: Iterable[Layer]
) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    """Return the merged values of known fields, their origins, and what is wrong before any value is looked at."""
    interpreted = config_class.interpret(list(layers))
    problems = [problem for layer in interpreted for problem in layer.problems]
    for layer in interpreted:
        problems += _unknown_keys(config_class, layer)
    values, origins = merge(interpreted)
    known = {name: value for name, value in values.items() if name in config_class.model_fields}
    return known, {path: origin for path, origin in origins.items() if path.partition(".")[0] in known}, problems


def merge(layers: Iterable[Layer]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the merged values, and the origin of each leaf by dotted path. Mappings merge key by key."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        _merge_into(values, origins, layer.values, layer, prefix="")
    return values, origins


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise one ConfigError for all problems; do nothing if there are none."""
    texts = list(dict.fromkeys(problem.text for problem in problems))
    codes = {problem.code for problem in problems}
    if not texts:
        return
    message = texts[0] if len(texts) == 1 else "\n  ".join([f"{len(texts)} fields are wrong:", *texts])
    if len(codes) == 1:
        raise ConfigError(message, code=codes.pop())
    raise ConfigError(message, code="config.invalid")


def _merge_into(
    values: dict[str, Any], origins: dict[str, str], new: Mapping[str, Any], layer: Layer, prefix: str
) -> None:
    for key, value in new.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and (value or isinstance(values.get(key), dict)):
            if not isinstance(values.get(key), dict):
                values[key] = {}
                _forget(origins, path)
            if value:
                origins.pop(path, None)  # an empty mapping was a leaf until now
            _merge_into(values[key], origins, value, layer, prefix=f"{path}.")
        else:
            values[key] = {} if isinstance(value, Mapping) else value  # a copy: later layers are merged into it
            _forget(origins, path)
            origins[path] = layer.origin_of(path)


def _forget(origins: dict[str, str], path: str) -> None:
    for old in [old for old in origins if old == path or old.startswith(f"{path}.")]:
        del origins[old]


def _unknown_keys(config_class: type[VerbConfig], layer: Layer) -> list[Problem]:
    known = list(config_class.model_fields)
    return [
        Problem("config.unknown", f"unknown key {key!r} from {layer.origin_of(key)}{did_you_mean(key, known)}")
        for key in layer.values
        if key not in known
    ]


def _explain(config_class: type[VerbConfig], detail: Mapping[str, Any], origins: Mapping[str, str]) -> Problem:
    """Return one pydantic error detail as one line: what was found, where it came from, what was expected."""
    where = ".".join(str(part) for part in detail["loc"])
    field = str(detail["loc"][0]) if detail["loc"] else ""
    if not where:
        return Problem("config.value", _expected(detail))
    if detail["type"] == "missing":
        return Problem("config.missing", f"{where} is missing; give --{field.replace('_', '-')}")
    origin = next((origins[path] for path in (where, field) if path in origins), "")
    origin = origin or next((text for path, text in origins.items() if path.startswith(f"{field}.")), "default")
    if detail["type"] == "extra_forbidden":
        return Problem("config.unknown", f"unknown key {where!r} from {origin}")
    found = _shown(detail["input"])
    near = ""
    if detail["type"] == "literal_error":
        choices = [choice.strip("' ") for choice in detail["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        near = did_you_mean(str(detail["input"]), choices)
    return Problem("config.value", f"{where}={found} from {origin}: {_expected(detail)}{near}")


def _expected(detail: Mapping[str, Any]) -> str:
    """Return what pydantic expected, in plain words."""
    context: Mapping[str, Any] = detail.get("ctx", {})
    kind: str = detail["type"]
    if kind == "value_error":
        return str(context["error"])
    words = {
        "literal_error": "expected {expected}",
        "greater_than": "expected more than {gt}",
        "greater_than_equal": "expected at least {ge}",
        "less_than": "expected less than {lt}",
        "less_than_equal": "expected at most {le}",
        "multiple_of": "expected a multiple of {multiple_of}",
        "path_type": "expected a path",
        "tuple_type": "expected a list, like 4,4,4",
        "list_type": "expected a list, like 4,4,4",
        "dict_type": "expected a mapping",
        "model_type": "expected a mapping",
    }
    if kind in words:
        return words[kind].format(**context)
    for prefix, text in (("int_", "a whole number"), ("float_", "a number"), ("bool_", "true or false")):
        if kind.startswith(prefix):
            return f"expected {text}"
    message: str = detail["msg"]
    return message.replace("Input should be", "expected").replace("Value error, ", "")


def _shown(value: object) -> str:
    text = repr(value) if isinstance(value, str) and (not value or " " in value) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
