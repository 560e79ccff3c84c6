"""A row with pictures to tokens: its marks become parts that a template knows, its placeholders become as many tokens.

OpenAI-style messages name a picture where it stands ({"type": "image", "image": PATH} or image_url); rows in the way of
LLaMA-Factory keep the paths in `images` and write `<image>` where each stands.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ferry.data.conversation import BadRow, Conversation, Message
from ferry.data.rendering import Renderer, Tokens
from ferry.data.vision.pictures import VisionSpec, measured
from ferry.data.vision.places import Grid, check_count, expanded

MARK = "<image>"
PICTURE_PARTS = ("image", "image_url")
KNOWN_PARTS = ("text", *PICTURE_PARTS)


def encoded(renderer: Renderer, conversation: Conversation, folder: str, spec: VisionSpec) -> Tokens:
    """Return the tokens of a conversation, with its pictures; raise BadRow where they do not fit together."""
    messages = tuple(_in_parts(message, conversation) for message in conversation.messages)
    plain = renderer.encode(replace(conversation, messages=messages))
    if (plain.ids_T == spec.video_token).any():
        raise BadRow("it has a place for a video: only pictures can be trained on")
    check_count(plain.ids_T, len(conversation.images), spec.image_token)
    pictures = tuple(measured(name, folder, spec) for name in conversation.images)
    grids = [Grid(picture.rows, picture.columns) for picture in pictures]
    ids_T, supervised_T = expanded(plain.ids_T, plain.supervised_T, grids, spec.image_token)
    return Tokens(ids_T, supervised_T, pictures)


def is_cut(sample: Tokens, length: int, spec: VisionSpec | None) -> bool:
    """Say whether a sample of this length would lack a part of its pictures."""
    return spec is not None and bool((sample.ids_T[length:] == spec.image_token).any())


def _in_parts(message: Message, conversation: Conversation) -> Message:
    """Return a message in which each mark is a part of its own, as templates of such models want it."""
    if not isinstance(message.content, str):
        unknown = [part["type"] for part in message.content if part["type"] not in KNOWN_PARTS]
        if unknown:
            raise BadRow(f"a part of 'content' is of type {unknown[0]!r}: only text and pictures can be trained on")
        return replace(message, content=[_named_image(part) for part in message.content])
    if MARK not in message.content or not conversation.images:
        return message
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(message.content.split(MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return replace(message, content=parts)


def _named_image(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if part["type"] in PICTURE_PARTS else part
