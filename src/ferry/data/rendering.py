"""From a conversation to tokens, with the supervised part exact.

The tokenizer's own chat template writes the text. Which characters of it are an answer is found in one of two ways:
the template marks them itself (`{% generation %}`), or the conversation is rendered up to each answer and every such
rendering must be a beginning of the whole. A template for which neither holds is refused, never guessed at. The text is
tokenised once, as a whole; spans of characters become tokens by their offsets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Set
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ferry.core.errors import InputError
from ferry.data.conversation import BadRow, Conversation, Meaning, Message, Text
from ferry.data.settings import TrainOn
from ferry.data.vision.pictures import Picture, VisionSpec

Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]
Span = tuple[int, int]

TODAY = "2024-07-26"
"""The day that templates with a clock are given, so that the same rows give the same tokens on every day."""
_CLOCK = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.tiktoken", "*.model", "tokenization_*.py", "chat_template*"),
)


@dataclass(frozen=True)
class RendererSpec:
    """What makes a renderer; small enough to be sent to a worker."""

    tokenizer_dir: Path
    train_on: TrainOn
    chat_template: str = ""
    """The text of a template that replaces the tokenizer's; "" = the tokenizer's own."""
    template_name: str = ""
    trust_remote_code: bool = False
    vision: VisionSpec | None = None
    """How pictures enter, where they may."""


class Tokens(NamedTuple):
    """A sample: token ids, and for each whether it is to be learned; and its pictures, in the order of their places."""

    ids_T: Int32
    supervised_T: Bool
    pictures: tuple[Picture, ...] = ()


@lru_cache(maxsize=2)
def renderer(spec: RendererSpec) -> Renderer:
    """Return the renderer of a spec; loaded once in each process."""
    return Renderer(spec, load_tokenizer(spec.tokenizer_dir, trust_remote_code=spec.trust_remote_code))


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model directory."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"{directory} holds no tokenizer that can be loaded: {str(error).splitlines()[0]}",
            code="data.tokenizer",
            repair="give the directory of a model with its tokenizer files",
        ) from None


def tokenizer_sha256(directory: Path) -> str:
    """Return one digest over the names and bytes of all files that make a tokenizer."""
    files = sorted({file for pattern in _TOKENIZER_FILES for file in directory.glob(pattern) if file.is_file()})
    described = [f"{file.name}\t{hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files]
    return hashlib.sha256("".join(described).encode()).hexdigest()


class Renderer:
    """A tokenizer and its chat template."""

    def __init__(self, spec: RendererSpec, tokenizer: Any) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.template = _without_clock(spec.chat_template or _own_template(tokenizer))
        self.has_clock = self.template != (spec.chat_template or _own_template(tokenizer))
        self.template_name = spec.template_name or f"the chat template of {spec.tokenizer_dir}"
        self._knows_calls = "tool_calls" in self.template
        self._knows_tools = bool(re.search(r"\btools\b", self.template))
        self.marks_answers = bool(_GENERATION.search(self.template))
        self._specials = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.content)

    def encode(self, meaning: Meaning) -> Tokens:
        """Return the tokens of one row."""
        if isinstance(meaning, Text):
            return self._encode_text(meaning)
        text, spans = self.render(meaning)
        ids, offsets = self._tokenise(text, spans)
        supervised_T = np.zeros(len(ids), np.bool_)
        for first, last in spans:
            supervised_T |= (offsets[:, 0] < last) & (offsets[:, 1] > first)
        return Tokens(np.asarray(ids, np.int32), supervised_T)

    def render(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """Return the text of a conversation, and the spans of characters that are to be learned."""
        self._require_template()
        fitted = self._fitted(conversation)
        if self.marks_answers and self.spec.train_on != "all":
            return self._by_marks(fitted)
        text = self._apply(fitted, len(fitted.messages), ask=False)
        if self.spec.train_on == "all":
            return text, [(0, len(text))]
        return text, [self._span(fitted, index, text) for index in self._answers(fitted)]

    def choices(self, formats: Set[str]) -> list[str]:
        """Return what this template makes us decide about rows of some formats, in sentences."""
        found: list[str] = []
        if formats <= {"text", "megatron text", "megatron packed"}:
            return found
        if not self.marks_answers and self.spec.train_on != "all":
            found.append("answers are found by rendering each conversation up to them: the chat template has no marks")
        if formats & {"messages", "sharegpt"} and not (self._knows_tools and self._knows_calls):
            found.append("the chat template has no place for tools: what rows have is written as JSON text")
        if self.has_clock:
            found.append(f"the chat template asks for the date: it is told {TODAY}, so that tokens do not change daily")
        return found

    def _require_template(self) -> None:
        if not self.template:
            raise InputError(
                f"the tokenizer of {self.spec.tokenizer_dir} has no chat template",
                code="data.no-template",
                repair="give the file of one as chat_template, or train on texts",
            )

    def _encode_text(self, text: Text) -> Tokens:
        """Return a document: what the tokenizer puts before it, its tokens, and the end of text if it ends here."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise InputError(
                f"the tokenizer of {self.spec.tokenizer_dir} has no end-of-text token",
                code="data.no-eos",
                repair="set eos_token in its tokenizer_config.json",
            )
        ids = list(self.tokenizer(text.content, verbose=False)["input_ids"])
        if text.is_complete and (not ids or ids[-1] != end):
            ids.append(end)
        return Tokens(np.asarray(ids, np.int32), np.ones(len(ids), np.bool_))

    def _answers(self, conversation: Conversation) -> list[int]:
        """Return the indices of the turns to learn."""
        answers = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
        answers = answers[-1:] if self.spec.train_on == "last" else answers
        return [index for index in answers if conversation.messages[index].is_target]

    def _span(self, conversation: Conversation, index: int, text: str) -> Span:
        """Return where the answer at `index` lies in the whole text, with its end-of-turn token."""
        before = self._apply(conversation, index, ask=True)
        if not text.startswith(before):
            raise self._unstable(index)
        through = self._apply(conversation, index + 1, ask=False)
        if text.startswith(through):
            return len(before), self._trimmed(text, len(before), len(through))
        # An earlier answer may be written otherwise than a last one (reasoning left out). It is found if what follows
        # its content is exactly what ends the last answer.
        content = conversation.messages[index].content
        ending = self._ending(conversation)
        found = content.strip() + ending if isinstance(content, str) and content.strip() else ""
        if ending and found and text.startswith(found, len(before)):
            return len(before), len(before) + len(found)
        raise self._unstable(index)

    def _ending(self, conversation: Conversation) -> str:
        """Return what this template writes after a last answer: its end-of-turn token."""
        mark = "\u2063ferry\u2063"
        head = next(i for i, message in enumerate(conversation.messages) if message.role == "assistant")
        probe = Conversation((*conversation.messages[:head], Message("assistant", mark)), conversation.tools)
        return self._apply(probe, head + 1, ask=False).partition(mark)[2].rstrip()

    def _trimmed(self, text: str, first: int, last: int) -> int:
        """Return the end of an answer without white space behind its end-of-turn token: no model gets to say that."""
        bare = len(text[first:last].rstrip()) + first
        return bare if text.endswith(self._specials, first, bare) else last

    def _unstable(self, index: int) -> InputError:
        return InputError(
            f"{self.template_name} writes a conversation differently once it goes on (turn {index + 1}): which part is "
            "an answer cannot be told exactly",
            code="data.template-unstable",
            repair="give a chat_template with {% generation %} around answers, or train_on=last",
        )

    def _by_marks(self, conversation: Conversation) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [_for_template(message) for message in conversation.messages]
        render: Any = render_jinja_template
        with _TemplateErrors():
            (text,), (marked,) = render(
                conversations=[messages],
                tools=list(conversation.tools) or None,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        answers = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
        if len(marked) != len(answers):
            raise InputError(
                f"{self.template_name} marks {len(marked)} answers of a conversation that has {len(answers)}",
                code="data.template-unstable",
                repair="put {% generation %} around each answer",
            )
        wanted = set(self._answers(conversation))
        return text, [(first, last) for index, (first, last) in zip(answers, marked, strict=True) if index in wanted]

    def _fitted(self, conversation: Conversation) -> Conversation:
        """Return the conversation so that nothing of it is lost: calls and tools the template knows not become text."""
        messages = conversation.messages
        if any(message.tool_calls for message in messages) and not self._knows_calls:
            messages = tuple(_calls_as_text(message) for message in messages)
        tools = conversation.tools
        if tools and not self._knows_tools:
            listed = Message("system", "Tools:\n" + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
            if messages[0].role == "system" and isinstance(messages[0].content, str):
                listed, messages = replace(listed, content=f"{messages[0].content}\n\n{listed.content}"), messages[1:]
            messages, tools = (listed, *messages), ()
        return replace(conversation, messages=messages, tools=tools)

    def _apply(self, conversation: Conversation, num_messages: int, *, ask: bool) -> str:
        if not num_messages:
            return ""
        messages = [_for_template(message) for message in conversation.messages[:num_messages]]
        with _TemplateErrors():
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=list(conversation.tools) or None,
                    chat_template=self.template,
                    add_generation_prompt=ask,
                    tokenize=False,
                )
            )

    def _tokenise(self, text: str, spans: list[Span]) -> tuple[list[int], npt.NDArray[np.int64]]:
        """Return the tokens of a text and the characters each covers (of a slow tokenizer: true at span edges)."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            return encoded["input_ids"], np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        ids = self._plain(text)
        offsets = np.zeros((len(ids), 2), np.int64)
        done = 0
        for edge in sorted({edge for span in spans for edge in span} | {len(text)}):
            begun = self._plain(text[:edge])
            if begun != ids[: len(begun)]:
                raise BadRow("a token of this slow tokenizer reaches over the edge of an answer")
            offsets[done : len(begun)] = (max(edge - 1, 0), edge)
            done = len(begun)
        return ids, offsets

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


class _TemplateErrors:
    """Turn what a template says against a row into the reason why the row is bad."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from jinja2 import TemplateError, TemplateSyntaxError

        if isinstance(error, TemplateSyntaxError):
            raise InputError(
                f"the chat template has a mistake in line {error.lineno}: {error.message}",
                code="data.template-syntax",
                repair="correct it, or give another as chat_template",
            ) from None
        if isinstance(error, TemplateError | TypeError):
            raise BadRow(f"the chat template refuses it: {error}") from None


def _own_template(tokenizer: Any) -> str:
    found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default", "")
    return found or ""


def _for_template(message: Message) -> dict[str, Any]:
    calls = {"tool_calls": list(message.tool_calls)} if message.tool_calls else {}
    return {"role": message.role, "content": message.content, **calls, **message.further}


def _calls_as_text(message: Message) -> Message:
    if not message.tool_calls or not isinstance(message.content, str):
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls]
    return replace(message, content="\n".join([message.content, *calls] if message.content else calls), tool_calls=())


def _without_clock(template: str) -> str:
    """Return the template with the date of `TODAY` written in wherever it asks for today's."""
    day = datetime.fromisoformat(TODAY)
    return _CLOCK.sub(lambda call: json.dumps(day.strftime(call.group(2))), template)
