"""What a line that begins with a slash does in a conversation. One function a command; its docstring is its help."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from ferry.core.errors import ConfigError, OutputError, did_you_mean
from ferry.verbs.chat.config import SETTINGS, ChatConfig
from ferry.verbs.chat.session import Session, read_schema

RETRY = "/retry"
HELP_OF_RETRY = "/retry                     ask the last message again"
HELP = "/help                      this list"
LEAVE = "Ctrl-D leaves, Ctrl-C stops an answer, a backslash at the end of a line continues it"


def obey(session: Session, line: str) -> str:
    """Do what a command says, and return what to show."""
    name, _, rest = line[1:].partition(" ")
    if name in ("help", "?"):
        return "\n".join([*(command.__doc__ or "" for command in COMMANDS.values()), HELP_OF_RETRY, HELP, LEAVE])
    if name not in COMMANDS:
        near = did_you_mean(name, [*COMMANDS, "help", "retry"])
        raise ConfigError(f"no command /{name}{near}", code="chat.command", repair="/help lists them")
    return COMMANDS[name](session, rest.strip())


def _system(session: Session, text: str) -> str:
    """/system [TEXT]             what the model is told first; without a text: show it"""
    if not text:
        return session.system or "no system prompt"
    session.system = "" if text == "off" else text
    return "system prompt removed" if text == "off" else "system prompt set"


def _schema(session: Session, text: str) -> str:
    """/schema FILE | off         the JSON schema that answers must keep"""
    if text in ("", "off"):
        session.schema = None if text else session.schema
        return "answers are free text" if session.schema is None else json.dumps(session.schema, indent=1)
    session.schema = read_schema(Path(text).expanduser())
    return f"answers will keep {text}"


def _set(session: Session, text: str) -> str:
    """/set [NAME [VALUE]]        temperature, top_p, top_k, max_tokens, seed; without a value: the default again"""
    name, _, value = text.partition(" ")
    if not text:
        return ", ".join(f"{key} {number:g}" for key, number in session.sampling.items()) or "as the server has them"
    if name not in SETTINGS:
        raise ConfigError(f"no setting {name!r}{did_you_mean(name, list(SETTINGS))}", code="chat.setting")
    if not value:
        session.sampling.pop(name, None)
        return f"{name} as usual"
    try:
        session.sampling |= ChatConfig.model_validate({"target": "here", name: value}).sampling
    except ValidationError as error:
        raise ConfigError(f"{name} {value}: {error.errors()[0]['msg']}", code="chat.setting") from None
    return f"{name} {value}"


def _save(session: Session, text: str) -> str:
    """/save FILE                 write the conversation as JSON"""
    if not text:
        raise ConfigError("/save needs a file", code="chat.command")
    path = Path(text).expanduser()
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(session.to_json(), file, indent=1, ensure_ascii=False)
            file.write("\n")
    except FileExistsError:
        raise OutputError(f"{path} is there already", code="chat.save", repair="choose another name") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", code="chat.save") from error
    return f"saved {len(session.messages)} messages in {path}"


def _clear(session: Session, text: str) -> str:
    """/clear                     forget what was said"""
    session.messages.clear()
    session.answers.clear()
    return "forgotten"


def _tokens(session: Session, text: str) -> str:
    """/tokens                    how much was read and written, and how much fits"""
    counted = [answer.usage for answer in session.answers if answer.usage]
    if not counted:
        return "nothing was counted yet"
    usage = counted[-1]
    held = usage.get("prompt_tokens", 0) + usage.get("completion_tokens", 0)
    limit = session.model.get("max_model_len")
    written = sum(one.get("completion_tokens", 0) for one in counted)
    return f"the conversation has {held:,} tokens{f' of {limit:,}' if limit else ''}; answers together {written:,}"


COMMANDS: dict[str, Callable[[Session, str], str]] = {
    "system": _system,
    "schema": _schema,
    "set": _set,
    "save": _save,
    "clear": _clear,
    "tokens": _tokens,
}
