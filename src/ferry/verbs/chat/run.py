"""`ferry chat`: find or start the server, then answer once or hold a conversation."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ferry.core.errors import ConfigError, FerryError, InputError
from ferry.core.progress import Reporter
from ferry.core.verb import Result
from ferry.verbs.chat.client import Server, address_of
from ferry.verbs.chat.commands import RETRY, obey
from ferry.verbs.chat.config import ChatConfig
from ferry.verbs.chat.host import served
from ferry.verbs.chat.screen import Screen, facts, keys_of_a_conversation
from ferry.verbs.chat.session import Session, choose_model, read_schema


def run(config: ChatConfig, reporter: Reporter) -> Result:
    """Answer once or as long as someone asks, and return the conversation."""
    prompt = _prompt(config, reporter)
    schema = None if config.schema_file is None else read_schema(config.schema_file)
    with _server(config, reporter) as server:
        session = Session(server, choose_model(server, config.model), config.system, schema, dict(config.sampling))
        if prompt is None:
            _converse(session, Screen())
            return {**session.to_json(), "url": server.address, "shown": True, "answer": None}
        return _answer_once(session, prompt, reporter)


def _prompt(config: ChatConfig, reporter: Reporter) -> str | None:
    """Return what to answer once, or nothing where a person is at the terminal."""
    if config.prompt is not None:
        return config.prompt
    if not sys.stdin.isatty():
        text = sys.stdin.read().strip()
        if text:
            return text
    elif reporter.is_watched:
        return None
    raise ConfigError(
        "there is nothing to answer", code="chat.no-prompt", repair="give --prompt TEXT, or text on standard input"
    )


@contextmanager
def _server(config: ChatConfig, reporter: Reporter) -> Iterator[Server]:
    address = address_of(config.target)
    if address is None:
        with served(Path(config.target), config.serve_args, reporter) as server:
            yield server
    else:
        yield Server(address, _key(config.api_key_file))


def _key(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        lines = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", code="chat.key") from error
    return lines[0] if lines else ""


def _answer_once(session: Session, prompt: str, reporter: Reporter) -> Result:
    """Answer; at a terminal word by word, else all at the end."""
    screen = Screen() if reporter.is_watched and os.isatty(1) else None
    answer = session.ask(prompt, screen.write if screen else lambda piece: None)
    if screen:
        screen.write("\n")
    elif not answer.is_kept or answer.finish_reason == "length":
        reporter.say(facts(answer))
    known = {**answer.to_json(), "shown": screen is not None}
    found = {"model": session.name, "url": session.server.address, "question": prompt, "answer": known.pop("text")}
    return {**found, **known}


def _converse(session: Session, screen: Screen) -> None:
    screen.line(f"{session.name} at {session.server.address}. /help lists commands, Ctrl-D leaves.")
    with keys_of_a_conversation():
        while True:
            try:
                line = screen.read()
                if line is None:
                    return
                _reply(session, screen, line.strip())
            except KeyboardInterrupt:
                screen.line("\nCtrl-D leaves")
            except FerryError as error:
                screen.line(f"error: {error} [{error.code}]")


def _reply(session: Session, screen: Screen, line: str) -> None:
    """Answer one line of the conversation, or do what it says."""
    if line.startswith("/") and line != RETRY:
        screen.line(obey(session, line))
    elif line:
        answer = session.ask_again(screen.write) if line == RETRY else session.ask(line, screen.write)
        screen.write("\n" if answer else "")
        screen.line(facts(answer) if answer else "nothing was said yet")
