"""Tools of a chat request: what they are, which must be called, and the constraint that makes a call always parse.

`required` and a named function are constraints: the answer is JSON under a schema made of the tools' parameters. With
`auto` the model writes calls in its own form, or text; a tool that says `strict` is held to its schema there too, where
the form allows it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from ferry.core.errors import did_you_mean
from ferry.engines.text import TextModel
from ferry.engines.vocabulary import Vocabulary
from ferry.guided import regexes
from ferry.guided.request import Constraint
from ferry.verbs.serve.http.bodies import ChatBody
from ferry.verbs.serve.http.errors import wrong
from ferry.verbs.serve.http.tool_formats import Call, ToolFormat, format_of

JsonObject = dict[str, Any]
Mode = Literal["none", "auto", "required", "named"]
MAX_TOOLS = 128


@dataclass(frozen=True)
class Tools:
    """The tools of one request and how they are to be used."""

    mode: Mode = "none"
    shown: tuple[JsonObject, ...] = ()
    """What the chat template gets."""
    name: str = ""
    """The function that must be called, with mode `named`."""
    form: ToolFormat | None = None
    constraint: Constraint | None = None
    only_one: bool = False
    """At most one call."""


def tools_of(body: ChatBody, model: TextModel) -> Tools:
    """Return the tools of a request, or the error in them."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise wrong("tool_choice", "tool_choice is given without tools", repair="give tools")
        return Tools()
    functions = _functions(body.tools)
    shown, only_one = tuple(body.tools), body.parallel_tool_calls is False
    if isinstance(choice, dict):
        name = _named(choice, functions)
        constraint = Constraint("json", _json(_parameters(functions[name])), f"tools[{list(functions).index(name)}]")
        return Tools("named", shown, name, constraint=constraint)
    if choice == "required":
        schema = _required(functions, one=only_one)
        return Tools("required", shown, constraint=Constraint("json", _json(schema), "tools"))
    if choice == "none":
        return Tools()
    if choice not in (None, "auto"):
        raise wrong("tool_choice", f"tool_choice is {choice!r}, expected none, auto, required or a function")
    knows_tools = model.template is not None and model.template.knows_tools
    form = format_of(model.template.source) if model.template is not None and knows_tools else None
    if form is None:
        raise wrong(
            "tools",
            "this model's chat template has no place for tools" if not knows_tools else
            "this model writes calls in a form that is not known here",
            code="tools.unsupported",
            repair='set tool_choice to "required" or to a function: then a schema makes the call',
        )  # fmt: skip
    return Tools("auto", shown, form=form, constraint=_strict(functions, form, model.vocabulary), only_one=only_one)


class CallList:
    """Reads the list of calls that an answer under `required` is, while it comes."""

    def __init__(self) -> None:
        self._rest = ""
        """What came after the last whole call."""
        self._decoder = json.JSONDecoder()

    def add(self, text: str) -> list[Call]:
        """Return the calls that a further part of the text makes whole."""
        self._rest += text
        calls: list[Call] = []
        # A call ends with a brace: parts without one need no look.
        if "}" not in text:
            return calls
        while (at := self._rest.find("{")) >= 0:
            try:
                value, end = self._decoder.raw_decode(self._rest, at)
            except ValueError:
                break
            calls.append(Call(value["name"], _json(value["parameters"])))
            self._rest = self._rest[end:]
        return calls


def _functions(tools: list[JsonObject]) -> dict[str, JsonObject]:
    if len(tools) > MAX_TOOLS:
        raise wrong("tools", f"there are {len(tools)} tools, more than {MAX_TOOLS}")
    found: dict[str, JsonObject] = {}
    for index, tool in enumerate(tools):
        function, place = tool.get("function"), f"tools[{index}]"
        if tool.get("type") != "function":
            raise wrong(f"{place}.type", f"{place}.type is {tool.get('type')!r}, expected 'function'")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise wrong(f"{place}.function.name", f"{place}.function.name is missing", code="request.missing")
        if not isinstance(function.get("parameters", {}), dict | type(None)):
            raise wrong(f"{place}.function.parameters", f"{place}.function.parameters is no object, expected a schema")
        if function["name"] in found:
            raise wrong(f"{place}.function.name", f"two tools are called {function['name']!r}")
        found[function["name"]] = function
    return found


def _named(choice: JsonObject, functions: dict[str, JsonObject]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type", "function") != "function" or not isinstance(name, str):
        raise wrong("tool_choice", 'tool_choice names no function, expected {"type":"function","function":{"name":..}}')
    if name not in functions:
        near = did_you_mean(name, list(functions))
        raise wrong("tool_choice", f"tool_choice names {name!r}, which is none of the tools{near}")
    return name


def _parameters(function: JsonObject) -> JsonObject:
    return function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}


def _required(functions: dict[str, JsonObject], *, one: bool) -> JsonObject:
    """Return the schema of a list of calls. Each tool's schema moves, so its references move with it."""
    items, defs = [], {}
    for index, (name, function) in enumerate(functions.items()):
        defs[f"tool{index}"] = _moved(_parameters(function), f"#/$defs/tool{index}")
        items.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/tool{index}"}},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    most = {"maxItems": 1} if one else {"maxItems": MAX_TOOLS}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": items}, "$defs": defs}


def _moved(schema: Any, root: str) -> Any:
    if isinstance(schema, list):
        return [_moved(one, root) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items() if key not in ("$schema", "$id")}
    reference = schema.get("$ref")
    return {**moved, "$ref": root + reference[1:]} if isinstance(reference, str) and reference[:1] == "#" else moved


def _strict(functions: dict[str, JsonObject], form: ToolFormat, vocabulary: Vocabulary) -> Constraint | None:
    """Return free text in which calls keep their schema, if a tool asks for that."""
    strict = [name for name, function in functions.items() if function.get("strict")]
    if not strict:
        return None
    if not (form.start and form.end):
        raise wrong(
            "tools",
            f"{strict[0]!r} is strict, which this model's form of calls does not allow with tool_choice auto",
            code="tools.strict",
            repair='set tool_choice to "required" or to a function, or leave strict out',
        )
    begins = {name: f'\n{{"name": {_json(name)}, "{form.argument_keys[0]}": ' for name in functions}
    if vocabulary.id_of(form.start) is None:
        structures = [
            {"begin": form.start + begins[name], "schema": _parameters(function), "end": f"}}\n{form.end}"}
            for name, function in functions.items()
        ]
        source = {"type": "structural_tag", "structures": structures, "triggers": [form.start]}
        return Constraint("structural_tag", _json(source), "tools")
    # A mark that is a token of its own is not text for a grammar, so the call is written out.
    end = form.end if vocabulary.id_of(form.end) is not None else _json(form.end)
    calls = [
        f'call{index}: {form.start} {_json(begins[name])} %json {_json(_parameters(function))} "}}\\n" {end}'
        for index, (name, function) in enumerate(functions.items())
    ]
    names = " | ".join(f"call{index}" for index in range(len(calls)))
    never = f"~/(?s:.*){regexes.exactly(form.start)}(?s:.*)/"
    lines = [f"start: free (({names}) free)*", "free: TEXT?", f"TEXT: /(?s:.+)/ & {never}", *calls]
    return Constraint("grammar", "\n".join(lines) + "\n", "tools")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
