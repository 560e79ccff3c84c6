"""Conversations as the text a model was trained on: the chat template of a model directory, rendered with jinja2.

Templates come from anywhere, so they run in jinja2's sandbox and see plain JSON values only. What they refuse is an
error of the conversation. Nothing of a conversation is lost: where a template has no place for calls or tools, they
become text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ferry.core.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Template

JsonObject = dict[str, Any]
_OF_EXPRESSIONS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What expressions of a template raise, beside jinja2's own errors."""


class ChatTemplate:
    """One chat template, compiled when it is first used. `tokens` are what templates know by name: bos_token, ..."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source = source
        self.tokens = dict(tokens)
        self._compiled: Template | None = None
        self.knows_tools = bool(re.search(r"\btools\b", source))
        self.knows_calls = "tool_calls" in source

    def render(
        self,
        messages: Sequence[JsonObject],
        tools: Sequence[JsonObject] = (),
        *,
        add_generation_prompt: bool = True,
        further: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation. `further` are values that this template asks for beside messages."""
        from jinja2 import TemplateError

        if self._compiled is None:
            self._compiled = _compile(self.source)
        fitted, known_tools = self._fitted(messages, tools)
        values = {**self.tokens, **(further or {}), "add_generation_prompt": add_generation_prompt}
        try:
            return self._compiled.render(messages=fitted, tools=known_tools or None, documents=None, **values)
        except (TemplateError, *_OF_EXPRESSIONS) as error:
            raise InputError(
                f"the chat template refuses this conversation: {' '.join(str(error).split()) or type(error).__name__}",
                code="chat.refused",
                repair="change the order or the form of the messages",
            ) from error

    def _fitted(
        self, messages: Sequence[JsonObject], tools: Sequence[JsonObject]
    ) -> tuple[list[JsonObject], list[JsonObject]]:
        fitted = [_readable(message, knows_calls=self.knows_calls) for message in messages]
        if not tools or self.knows_tools:
            return fitted, list(tools)
        listed = "Tools:\n" + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        if fitted and fitted[0]["role"] == "system":
            return [{**fitted[0], "content": f"{fitted[0]['content']}\n\n{listed}"}, *fitted[1:]], []
        return [{"role": "system", "content": listed}, *fitted], []


def open_template(model_dir: Path, config: JsonObject) -> ChatTemplate | None:
    """Return the chat template of a model directory, or nothing; `config` is its tokenizer_config.json."""
    path = model_dir / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if not source and (model_dir / "chat_template.json").is_file():
        source = json.loads((model_dir / "chat_template.json").read_text(encoding="utf-8")).get("chat_template")
    if isinstance(source, list):
        named = {str(one.get("name")): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default") or named.get("tool_use")
    return ChatTemplate(source, token_names(model_dir, config)) if isinstance(source, str) and source else None


def token_names(model_dir: Path, config: JsonObject) -> dict[str, str]:
    """Return special tokens by their names in templates."""
    path = model_dir / "special_tokens_map.json"
    values = {**(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}), **config}
    found = {}
    for name, value in values.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _readable(message: JsonObject, *, knows_calls: bool) -> JsonObject:
    """Return a message as templates expect it: arguments of calls as values, content as text."""
    made = {key: value for key, value in message.items() if value is not None}
    calls = [_call(call) for call in made.pop("tool_calls", [])]
    if calls and not knows_calls:
        written = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
        made["content"] = "\n".join([made["content"], *written] if made.get("content") else written)
    elif calls:
        made["tool_calls"] = calls
    return {"content": "", **made}


def _call(call: JsonObject) -> JsonObject:
    given = call.get("function")
    if not isinstance(given, dict):
        raise InputError(
            f"the function of a tool call is {json.dumps(given, ensure_ascii=False)[:40]}, expected an object",
            code="chat.arguments",
            repair="send the call as it was answered, with name and arguments",
        )
    function = dict(given)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"the arguments of a tool call are not JSON: {error}", code="chat.arguments", repair="send a JSON text"
            ) from error
    return {"type": "function", **call, "function": function}


def _compile(source: str) -> Template:
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    # Marks for training around answers mean nothing here; jinja2 does not know the word.
    unmarked = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{%\1 if true %}{% endif \2%}", source)
    try:
        return environment.from_string(unmarked)
    except TemplateSyntaxError as error:
        raise InputError(
            f"the chat template has a mistake in line {error.lineno}: {error.message}",
            code="data.template-syntax",
            repair="correct chat_template.jinja in the model directory",
        ) from error


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **further: Any) -> str:
    known = {key: further[key] for key in ("separators", "sort_keys") if key in further}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **known)


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
