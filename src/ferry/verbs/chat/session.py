"""A conversation: what was said, how the next answer is to be made, and the answers themselves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ferry.core.errors import ConfigError, InputError, UnavailableError
from ferry.verbs.chat.client import Server
from ferry.verbs.chat.config import USUAL_MAX_TOKENS


@dataclass
class Answer:
    """One answer, also while it grows."""

    text: str = ""
    finish_reason: str = ""
    """As the server says; "stopped": by the user."""
    usage: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] | None = None
    """Under a schema: {"valid": ..., "reason": ..., "pointer": ...}."""
    seconds_to_first: float = 0.0
    seconds: float = 0.0

    @property
    def is_kept(self) -> bool:
        """Whether the schema was kept, if there was one."""
        return self.guided is None or bool(self.guided.get("valid"))

    @property
    def rate_tokens_per_s(self) -> float:
        """Tokens after the first one by the time they took; 0 where the server did not count them."""
        spent_s = self.seconds - self.seconds_to_first
        count = self.usage.get("completion_tokens", 0)
        return (count - 1) / spent_s if count > 1 and spent_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the answer as JSON values."""
        return {**asdict(self), "rate_tokens_per_s": round(self.rate_tokens_per_s, 2)}


@dataclass
class Session:
    """What the next request is made of."""

    server: Server
    model: dict[str, Any]
    system: str = ""
    schema: Any = None
    sampling: dict[str, float] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the server calls the model."""
        return str(self.model["id"])

    def ask(self, text: str, show: Callable[[str], None]) -> Answer:
        """Return the answer to a message, and show each piece as it comes. Ctrl-C stops it; what came is kept."""
        return self._ask(self.messages, text, show)

    def ask_again(self, show: Callable[[str], None]) -> Answer | None:
        """Return another answer to the last message, in place of the one it had; nothing if there is no message."""
        return self._ask(self.messages[:-2], self.messages[-2]["content"], show) if self.messages else None

    def _ask(self, before: list[dict[str, str]], text: str, show: Callable[[str], None]) -> Answer:
        question = {"role": "user", "content": text}
        answer = Answer()
        begun_s = time.monotonic()
        try:
            for event in self._events(self._body([*before, question])):
                _add(answer, event, time.monotonic() - begun_s, show)
        except KeyboardInterrupt:
            answer.finish_reason = "stopped"
            answer.seconds = time.monotonic() - begun_s
        if self.schema is not None and answer.guided is None:
            answer.guided = _checked(self.schema, answer)
        if answer.text:
            self.messages = [*before, question, {"role": "assistant", "content": answer.text}]
            self.answers = [*self.answers[: len(before) // 2], answer]
        return answer

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Give the events of an answer, which has a bound even where the user set none."""
        try:
            yield from self.server.stream({"max_tokens": USUAL_MAX_TOKENS, **body})
        except ConfigError as error:
            if "max_tokens" in body or error.code != "chat.request":
                raise
            # What is left of the context may be less than the bound: then it is the bound.
            yield from self.server.stream(body)

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = {"model": self.name, "messages": [*system, *messages], **self.sampling}
        if self.schema is not None:
            form = {"name": "answer", "schema": self.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return {**body, "stream": True, "stream_options": {"include_usage": True}}

    def to_json(self) -> dict[str, Any]:
        """Return the conversation as a document."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        document: dict[str, Any] = {"model": self.name, "messages": [*said, *self.messages], "sampling": self.sampling}
        return {**document, "schema": self.schema, "answers": [answer.to_json() for answer in self.answers]}


def read_schema(path: Path) -> Any:
    """Return the schema in a file."""
    try:
        text = path.read_text(encoding="utf-8")
        schema = json.loads(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", code="chat.schema") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", code="chat.schema") from error
    if not isinstance(schema, (dict, bool)):
        raise InputError(f"{path} holds {type(schema).__name__}, not a JSON schema", code="chat.schema")
    return schema


def choose_model(server: Server, wanted: str) -> dict[str, Any]:
    """Return the model of a name, or the first one."""
    found = server.models()
    chosen = [model for model in found if model["id"] == wanted] if wanted else found
    if not chosen:
        names = ", ".join(str(model["id"]) for model in found)
        what = f"{server.address} serves no model {wanted!r}"
        raise ConfigError(what, code="chat.no-model", repair=f"it has {names}")
    return chosen[0]


def _add(answer: Answer, event: dict[str, Any], now_s: float, show: Callable[[str], None]) -> None:
    answer.usage = event.get("usage") or answer.usage
    for choice in event.get("choices") or ():
        piece = (choice.get("delta") or {}).get("content") or ""
        if piece:
            answer.seconds_to_first = answer.seconds_to_first or now_s
            answer.seconds = now_s
            answer.text += piece
            show(piece)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        answer.guided = choice.get("guided") or answer.guided


def _checked(schema: Any, answer: Answer) -> dict[str, Any]:
    """Check an answer here: not every server says whether it kept a schema, and not every one that says it does."""
    try:
        from ferry.guided.validate import check_json

        verdict = check_json(schema, answer.text)
    except ImportError as error:
        raise UnavailableError(
            f"the answer cannot be checked: {error}", code="chat.no-jsonschema", repair="pip install 'llmferry[serve]'"
        ) from error
    cut = "cut off by the limit of tokens: " if answer.finish_reason == "length" and not verdict.valid else ""
    return {"valid": verdict.valid, "reason": cut + verdict.reason, "pointer": verdict.pointer}
