"""The MOSS format: turns that carry their own marks, and between question and answer thoughts, commands and results.

Two shapes are known: `chat` with `turn_1`, `turn_2` ... of named parts, and the older `plain_text` with marks only.
Marks are taken off; the chat template of the model puts its own. Commands that were really given become a tool turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ferry.data.conversation import BadRow, Conversation, Message, checked

_HEAD = re.compile(r"^\s*(<\|[^|>]*\|>|\[(Human|MOSS)\])\s*:\s*")
_END = re.compile(r"\s*<eo[a-z]>\s*$")
_TURN = re.compile(r"\[(Human|MOSS)\]\s*:\s*(.*?)\s*<eo[a-z]>", re.DOTALL)


def is_moss(row: Mapping[str, Any]) -> bool:
    chat = row.get("chat")
    if isinstance(chat, Mapping):
        return any(isinstance(turn, Mapping) and "Human" in turn for turn in chat.values())
    return isinstance(row.get("plain_text"), str) and "[Human]" in row["plain_text"]


def from_moss(row: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a MOSS row. The meta instruction becomes the system turn."""
    head = row.get("meta_instruction") or row.get("prefix") or ""
    if not isinstance(head, str):
        raise BadRow("'meta_instruction' is not text")
    messages = [Message("system", head.strip())] if head.strip() else []
    if isinstance(row.get("chat"), Mapping):
        messages += _from_chat(row["chat"])
        declared, found = row.get("num_turns"), sum(message.role == "user" for message in messages)
        if declared is not None and str(declared) != str(found):
            raise BadRow(f"'num_turns' is {declared}, 'chat' holds {found}")
    elif isinstance(row.get("plain_text"), str):
        roles = {"Human": "user", "MOSS": "assistant"}
        messages += [Message(roles[who], text) for who, text in _TURN.findall(row["plain_text"])]
    else:
        raise BadRow("no 'chat'")
    return checked(Conversation(tuple(messages)))


def _from_chat(chat: Mapping[str, Any]) -> list[Message]:
    messages: list[Message] = []
    for key in sorted(chat, key=_turn_number):
        turn = chat[key]
        if not turn:
            continue
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(part), str) for part in ("Human", "MOSS")):
            raise BadRow(f"{key!r} has no text 'Human' and 'MOSS'")
        messages.append(Message("user", _bare(turn["Human"])))
        command, result = (_bare(str(turn.get(part) or "None")) for part in ("Commands", "Tool Responses"))
        if command not in ("", "None"):
            messages += [Message("assistant", command), Message("tool", result)]
        messages.append(Message("assistant", _bare(turn["MOSS"])))
    return messages


def _turn_number(key: str) -> int:
    digits = re.search(r"\d+$", key)
    if digits is None:
        raise BadRow(f"{key!r} in 'chat' has no number")
    return int(digits.group())


def _bare(text: str) -> str:
    return _END.sub("", _HEAD.sub("", text)).strip()
