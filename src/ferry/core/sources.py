"""Where config values come from: YAML files, environment variables, the words of a command line.

Each function returns a `Layer`. Nothing is validated here except that a name exists and a flag has its value; what is
wrong is kept in the layer, so that `resolve` can name everything at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ferry.core.config import Layer, Problem
from ferry.core.errors import ConfigError, did_you_mean
from ferry.core.options import Option, environment_prefix


def file_layer(path: Path, verb: str, options: Sequence[Option], other_verbs: Sequence[str] = ()) -> Layer:
    """Read a YAML file: a mapping of fields, or sections named after verbs of which this verb takes its own."""
    document = read_yaml(path)
    origin = f"file {path}"
    names = {option.name for option in options}
    if verb in document and verb not in names and isinstance(document[verb], dict | None):
        strangers = [key for key in document if key not in (verb, *other_verbs)]
        if strangers:
            texts = [f"unknown section {key!r} in {origin}{did_you_mean(key, [verb])}" for key in strangers]
            return Layer(origin, {}, problems=tuple(Problem("config.unknown", text) for text in texts))
        document = document[verb] or {}
    elif document and all(key in other_verbs and key not in names for key in document):
        document = {}
    lists = {option.name for option in options if option.kind == "list"}
    values = {key.replace("-", "_"): value for key, value in document.items()}
    for name in lists.intersection(values):
        if isinstance(values[name], str):
            values[name] = _list(values[name])
    return Layer(origin, values)


def environment_layer(verb: str, options: Sequence[Option], environ: Mapping[str, str]) -> Layer:
    """Read `FERRY_<VERB>_<FIELD>` and each field's own variables. An empty variable counts as not set."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    known = {variable for option in options for variable in option.env}
    for option in options:
        variable = next((variable for variable in option.env if environ.get(variable)), "")
        if variable:
            values[option.name] = from_text(option, environ[variable])
            origins[option.name] = f"environment {variable}"
    prefix = environment_prefix(verb)
    own = [option.env[0] for option in options]
    problems = [
        Problem("config.unknown", f"unknown environment variable {variable}{did_you_mean(variable, own)}")
        for variable in sorted(environ)
        if variable.startswith(prefix) and variable not in known
    ]
    return Layer("environment", values, origins, tuple(problems))


def set_layer(assignments: Sequence[str], options: Sequence[Option]) -> Layer:
    """Read `--set a.b=c` assignments. A field takes text like its flag does; a nested value is read as YAML."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[Problem] = []
    by_name = {option.name: option for option in options}
    for assignment in assignments:
        path, sign, text = assignment.partition("=")
        first, *rest = path.replace("-", "_").split(".")
        if not sign or not first:
            problems.append(Problem("config.syntax", f"--set {assignment}: expected KEY=VALUE"))
            continue
        if first not in by_name:
            near = did_you_mean(first, list(by_name))
            problems.append(Problem("config.unknown", f"unknown key {path!r} from flag --set{near}"))
            continue
        target = values
        for part in [first, *rest][:-1]:
            target = target.setdefault(part, {})
        target[[first, *rest][-1]] = parse_yaml(text, f"--set {path}") if rest else from_text(by_name[first], text)
        origins[".".join([first, *rest])] = f"flag --set {path}"
    return Layer("flag --set", values, origins, tuple(problems))


def from_text(option: Option, text: str) -> Any:
    """Return the value that a text from a flag or variable stands for; pydantic turns scalars into numbers later."""
    if option.nullable and text.lower() in ("none", "null"):
        return None
    if option.kind == "list":
        return _list(text)
    if option.kind == "structure":
        return parse_yaml(text, option.flags[0])
    return text


def _list(text: str) -> list[str]:
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    return [item.strip() for item in inner.split(",") if item.strip()]


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file (an empty file is an empty mapping)."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", code="config.file-unreadable") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text", code="config.file-unreadable") from None
    document = parse_yaml(text, str(path))
    if document is None:
        return {}
    if not isinstance(document, dict):
        found = type(document).__name__
        raise ConfigError(f"{path} holds a {found}, expected a mapping of fields", code="config.file-shape")
    return {str(key): value for key, value in document.items()}


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML; a key given twice is an error, not a silent choice of the last one."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        loader.flatten_mapping(node)
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            line = node.start_mark.line + 1
            raise ConfigError(f"{where}, line {line}: key {twice[0]!r} is given twice", code="config.syntax")
        return {
            key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)
        }

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} is not YAML: {reason}", code="config.syntax") from None
