"""Formats of rows: how each is recognised, and how it becomes a conversation or a text.

The table `FORMATS` holds one line a format. `ALIASES` are the handler names of the seed manual's training scripts, so
that its commands keep working. Looking at the rows decides unless a name is given; either way the choice has a reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ferry.core.errors import ConfigError, InputError, did_you_mean
from ferry.data.conversation import PASSED_ON, BadRow, Conversation, Meaning, Message, Text, checked
from ferry.data.moss import from_moss, is_moss

Row = Mapping[str, Any]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


class Format(NamedTuple):
    """One format of rows. `looks` says in words what a row of it has."""

    name: str
    looks: str
    fits: Callable[[Row], bool]
    convert: Callable[[Row], Meaning]


class Handler(NamedTuple):
    """A format chosen for a file, and why. `learn_all` = the old pretraining handlers: every token is a target."""

    format: Format
    reason: str
    learn_all: bool = False


def choose_handler(name: str, rows: Sequence[object], where: str) -> Handler:
    """Return the handler called `name`, or the one most of the first rows fit."""
    if name:
        return named_handler(name)
    for format_ in FORMATS:
        num_fitting = sum(1 for row in rows if _fits(format_, row))
        if num_fitting * 2 > len(rows):
            return Handler(format_, f"{num_fitting} of the first {len(rows)} rows have {format_.looks}")
    preferences = sum(1 for row in rows if isinstance(row, Mapping) and is_preference(row))
    if preferences * 2 > len(rows):
        raise InputError(
            f"{where} holds pairs or grades of answers, not answers to learn",
            code="data.preference",
            repair="keep the good answers only, as messages",
        )
    found = _looks(rows[0]) if rows else "nothing"
    known = "; ".join(f"{format_.name}: {format_.looks}" for format_ in FORMATS)
    raise InputError(
        f"the format of {where} is not known: its first row has {found}",
        code="data.format",
        repair=f"write rows of one of these: {known}",
    )


def named_handler(name: str) -> Handler:
    """Return a format by its name or by a handler name of the manual."""
    formats = {format_.name: format_ for format_ in FORMATS}
    if name in formats:
        return Handler(formats[name], "it was asked for")
    if name in ALIASES:
        format_name, learn_all = ALIASES[name]
        return Handler(formats[format_name], f"{name} was asked for", learn_all)
    known = [*formats, *ALIASES]
    raise ConfigError(
        f"unknown handler {name!r}{did_you_mean(name, known)}",
        code="data.handler",
        repair=f"leave it out, or use one of {', '.join(known)}",
    )


def convert(handler: Handler, row: object) -> Meaning:
    """Return what a row means; raise BadRow where it is not of the format."""
    if isinstance(row, Text):
        return row
    if not isinstance(row, Mapping):
        raise BadRow(f"the row is {_kind(row)}, expected a mapping")
    return handler.format.convert(row)


def is_preference(row: Row) -> bool:
    return ("chosen" in row and "rejected" in row) or (isinstance(row.get("label"), bool) and "messages" in row)


def _looks(row: object) -> str:
    return f"the keys {', '.join(sorted(map(str, row)))}" if isinstance(row, Mapping) else _kind(row)


def _fits(format_: Format, row: object) -> bool:
    return isinstance(row, Mapping) and not is_preference(row) and format_.fits(row)


def _is_alpaca(row: Row) -> bool:
    return "instruction" in row and "output" in row


def _from_alpaca(row: Row) -> Conversation:
    question = _text(row, "instruction")
    further = _text(row, "input", optional=True)
    messages = _system(row)
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise BadRow("'history' is not a list of [question, answer]")
    for pair in history:
        if not all(isinstance(text, str) for text in pair):
            raise BadRow("'history' holds something that is not text")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    asked = "\n".join(text for text in (question, further) if text)
    if not asked:
        raise BadRow("'instruction' is empty")
    return checked(Conversation((*messages, Message("user", asked), Message("assistant", _text(row, "output")))))


def _is_belle(row: Row) -> bool:
    return _is_alpaca(row) and str(row["instruction"]).lstrip().startswith("Human:")


def _from_belle(row: Row) -> Conversation:
    """Read turns written into one text as `Human:` and `Assistant:`; the last answer is `output`."""
    messages: list[Message] = []
    for turn in _text(row, "instruction").split("Human:")[1:]:
        question, *answers = turn.split("Assistant:")
        messages.append(Message("user", question.strip()))
        messages += [Message("assistant", answer.strip()) for answer in answers]
    if messages and messages[-1].role == "assistant" and not messages[-1].content:
        messages.pop()
    if not messages or messages[-1].role != "user":
        raise BadRow("'instruction' does not end with a turn of 'Human:'")
    return checked(Conversation((*messages, Message("assistant", _text(row, "output").strip()))))


def _turns(row: Row) -> object:
    return next((row[key] for key in ("messages", "conversations", "conversation") if key in row), None)


def _has_turns(row: Row, key: str) -> bool:
    turns = _turns(row)
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and key in turns[0]


def _turn_list(row: Row) -> list[Mapping[str, Any]]:
    turns = _turns(row)
    if not isinstance(turns, list):
        raise BadRow(f"the turns are {_kind(turns)}, expected a list")
    if not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRow("a turn is not a mapping")
    return turns


def _from_sharegpt(row: Row) -> Conversation:
    messages = _system(row)
    for turn in _turn_list(row):
        speaker, value = _text(turn, "from"), _text(turn, "value")
        if speaker not in SHAREGPT_ROLES:
            raise BadRow(f"unknown speaker {speaker!r}")
        if speaker == "function_call":
            messages.append(Message("assistant", tool_calls=_tool_calls(_json(value, "a function call"))))
        else:
            messages.append(Message(SHAREGPT_ROLES[speaker], value))
    return checked(Conversation(tuple(messages), _tools(row), _images(row)))


def _from_messages(row: Row) -> Conversation:
    return checked(Conversation(tuple(_message(turn) for turn in _turn_list(row)), _tools(row), _images(row)))


def _message(turn: Mapping[str, Any]) -> Message:
    content = turn.get("content")
    if isinstance(content, list):
        content = _parts(content)
    elif content is None and turn.get("tool_calls"):
        content = ""
    elif not isinstance(content, str):
        raise BadRow(f"'content' is {_kind(content)}, expected text")
    calls = turn.get("tool_calls")
    return Message(
        role=_text(turn, "role"),
        content=content,
        tool_calls=_tool_calls(calls) if calls else (),
        further={key: turn[key] for key in PASSED_ON if turn.get(key) is not None},
        is_target=turn.get("weight", 1) != 0,
    )


def _parts(parts: list[Any]) -> str | list[dict[str, Any]]:
    """Return parts that are all text as one text: most templates know no parts."""
    if not all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in parts):
        raise BadRow("a part of 'content' has no 'type'")
    if any(part["type"] == "text" and not isinstance(part.get("text"), str) for part in parts):
        raise BadRow("a part of 'content' has no 'text'")
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return [dict(part) for part in parts]


def _images(row: Row) -> tuple[str, ...]:
    """Return the paths of pictures beside the turns and inside them."""
    beside = row.get("images") or ([row["image"]] if isinstance(row.get("image"), str) else [])
    if not isinstance(beside, list) or not all(isinstance(path, str) for path in beside):
        raise BadRow("'images' is not a list of paths")
    inside: list[str] = []
    turns = _turns(row)
    for turn in turns if isinstance(turns, list) else []:
        parts = turn.get("content")
        for part in parts if isinstance(parts, list) else []:
            if part.get("type") in ("image", "image_url"):
                found: Any = part.get("image") or part.get("path") or part.get("image_url") or part.get("url")
                found = found.get("url") if isinstance(found, Mapping) else found
                inside += [str(found)] if found else []
    return (*beside, *inside)


def _tool_calls(calls: object) -> tuple[dict[str, Any], ...]:
    """Return calls as templates want them: `{"type": "function", "function": {name, arguments}}`, arguments parsed."""
    found: list[dict[str, Any]] = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, Mapping):
            raise BadRow(f"a function call is {_kind(call)}, expected a mapping")
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow("a function call has no 'name'")
        arguments = function.get("arguments", {})
        arguments = _json(arguments, "the arguments of a call") if isinstance(arguments, str) else arguments
        identity = {"id": call["id"]} if "id" in call else {}
        found.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return tuple(found)


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    given = row.get("tools") or []
    tools: Any = _json(given, "'tools'") if isinstance(given, str) else given
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("'tools' is not a list of mappings")
    return tuple(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools)


def _is_pair(row: Row) -> bool:
    return _pair_keys(row) is not None


def _pair_keys(row: Row) -> tuple[str, str] | None:
    pairs = (("prompt", "completion"), ("query", "response"), ("prompt", "response"))
    return next((pair for pair in pairs if pair[0] in row and pair[1] in row), None)


def _from_pair(row: Row) -> Conversation:
    keys = _pair_keys(row)
    if keys is None:
        raise BadRow("no 'prompt' with a 'completion'")
    if isinstance(row[keys[0]], list) and isinstance(row[keys[1]], list):
        before, after = (_from_turns(row[key]) for key in keys)
        before = [Message(**{**vars(message), "is_target": False}) for message in before]
        return checked(Conversation((*before, *after), _tools(row)))
    messages = [*_system(row), Message("user", _text(row, keys[0])), Message("assistant", _text(row, keys[1]))]
    return checked(Conversation(tuple(messages)))


def _from_turns(turns: list[Any]) -> list[Message]:
    return [_message(turn) for turn in _turn_list({"messages": turns})]


def _is_text(row: Row) -> bool:
    return isinstance(row.get("text", row.get("content")), str)


def _from_text(row: Row) -> Text:
    text = _text(row, "text" if "text" in row or "content" not in row else "content")
    if not text.strip():
        raise BadRow("the text is empty")
    return Text(text)


def _system(row: Row) -> list[Message]:
    system = _text(row, "system", optional=True)
    return [Message("system", system)] if system else []


def _text(row: Mapping[str, Any], key: str, *, optional: bool = False) -> str:
    value = row.get(key)
    if value is None and optional:
        return ""
    if key not in row:
        raise BadRow(f"no {key!r}")
    if not isinstance(value, str):
        raise BadRow(f"{key!r} is {_kind(value)}, expected text")
    return value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(f"{what} is not JSON: {error}") from None


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


FORMATS = (
    Format("messages", "'messages' with 'role' and 'content'", lambda row: _has_turns(row, "role"), _from_messages),
    Format("sharegpt", "'conversations' with 'from' and 'value'", lambda row: _has_turns(row, "from"), _from_sharegpt),
    Format("moss", "'chat' with turns of 'Human' and 'MOSS'", is_moss, from_moss),
    Format("belle", "'instruction' with turns of 'Human:' and 'Assistant:', and 'output'", _is_belle, _from_belle),
    Format("alpaca", "'instruction' and 'output'", _is_alpaca, _from_alpaca),
    Format("prompt-completion", "'prompt' and 'completion'", _is_pair, _from_pair),
    Format("text", "'text' or 'content'", _is_text, _from_text),
)

ALIASES = {
    "GeneralPretrainHandler": ("text", True),
    "AlpacaPretrainHandler": ("alpaca", True),
    "SharegptPretrainHandler": ("sharegpt", True),
    "GeneralInstructionHandler": ("alpaca", False),
    "AlpacaStyleInstructionHandler": ("alpaca", False),
    "SharegptStyleInstructionHandler": ("sharegpt", False),
    "OpenAIInstructionHandler": ("messages", False),
    "BelleMultiTurnInstructionHandler": ("belle", False),
    "MOSSMultiTurnHandler": ("moss", False),
    "MOSSInstructionHandler": ("moss", False),
}
"""Handler name -> format, and whether every token is a target."""
