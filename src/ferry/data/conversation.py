"""What a row of training data means: a conversation, or a text. Every format ends here.

Messages keep what a chat template may ask for, under the names it uses. Nothing is rendered yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
PASSED_ON = ("name", "tool_call_id", "reasoning_content")
"""Further keys of a message that chat templates know."""


class BadRow(ValueError):
    """The reason why a row cannot be used: a finding about data, counted and listed."""


@dataclass(frozen=True)
class Message:
    """One turn. `content` is text, or a list of parts where a part is not text."""

    role: str
    content: str | list[dict[str, Any]] = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    further: dict[str, Any] = field(default_factory=dict)
    is_target: bool = True
    """Whether this turn may be learned; looked at for assistant turns only."""


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    images: tuple[str, ...] = ()
    """Paths of pictures, as the row gives them."""


@dataclass(frozen=True)
class Text:
    """A document. `is_complete` is false for a piece of a longer one: its end is not the end of the text."""

    content: str
    is_complete: bool = True


Meaning = Conversation | Text


def checked(conversation: Conversation) -> Conversation:
    """Return the conversation, or refuse what no training can use."""
    messages = conversation.messages
    if not messages:
        raise BadRow("the conversation is empty")
    for number, message in enumerate(messages, start=1):
        if message.role not in ROLES:
            raise BadRow(f"turn {number} has the unknown role {message.role!r}")
        if message.role == "assistant" and not message.content and not message.tool_calls:
            raise BadRow(f"turn {number}, an answer, is empty")
    if not any(message.role == "assistant" for message in messages):
        raise BadRow("the conversation holds no answer")
    if messages[-1].role != "assistant":
        raise BadRow(f"the last turn is {messages[-1].role!r}, expected an answer")
    return conversation
