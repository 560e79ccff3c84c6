"""The messages of a chat request as a chat template reads them."""

from __future__ import annotations

from typing import Any

from ferry.core.errors import FerryError
from ferry.engines.text import TextModel
from ferry.verbs.serve.http.bodies import ChatBody, Message
from ferry.verbs.serve.http.errors import as_api_error, wrong
from ferry.verbs.serve.http.tools import Tools

JsonObject = dict[str, Any]


def prompt_of(model: TextModel, body: ChatBody, tools: Tools) -> str:
    """Return a conversation as the text of a prompt."""
    source = model.template.source if model.template else ""
    messages = [_plain(message, index, source) for index, message in enumerate(body.messages)]
    goes_on = body.continue_final_message
    last = str(messages[-1]["content"]).strip()
    if goes_on and (messages[-1]["role"] != "assistant" or not last):
        raise wrong("continue_final_message", "the last message is not one of the assistant that could go on")
    try:
        text = model.render_chat(
            messages,
            tools.shown,
            add_generation_prompt=body.add_generation_prompt and not goes_on,
            further=body.chat_template_kwargs,
        )
    except FerryError as error:
        raise as_api_error(error, "messages") from error
    if not goes_on:
        return text
    at = text.rfind(last)
    if at < 0:
        raise wrong("continue_final_message", "the chat template changes the last message, so it cannot go on")
    return text[: at + len(last)]


def _plain(message: Message, index: int, template: str) -> JsonObject:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    if content is None and not message.tool_calls:
        raise wrong(f"messages[{index}].content", f"messages[{index}].content is missing", code="request.missing")
    said = message.model_dump(exclude_none=True, exclude={"content"})
    # OpenAI's new name for the system; templates know the old one.
    if said["role"] == "developer" and "developer" not in template:
        said["role"] = "system"
    return {**said, "content": content or ""}
