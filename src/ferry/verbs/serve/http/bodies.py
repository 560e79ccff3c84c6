"""What a request may say: one frozen model for each of the two ways to ask, and words for what is wrong with one.

Values have their JSON type: a number in quotes is an error. Fields that nobody here knows are named in the answer. Of
those, the ones that would change the answer are errors, because an answer without them would be another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ferry.core.errors import did_you_mean
from ferry.guided.request import FIELDS as CONSTRAINT_FIELDS
from ferry.guided.request import Constraint
from ferry.verbs.serve.http.errors import ApiError, wrong

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 4
MAX_STOP = 1000
"""Characters of a stop text."""
MAX_ANSWERS = 256
"""Answers that one request can ask for: prompts, times `n`."""
NOT_DONE = {
    "suffix": "put the text after the gap into the prompt, as the model was trained to read it",
    "use_beam_search": "ask for n answers and choose among them",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "chat_template": "start the server with --chat-template FILE",
    "documents": "write them into a message",
    "bad_words": "use logit_bias",
    "allowed_token_ids": "use guided_choice, guided_regex or guided_grammar",
    "logits_processors": "use logit_bias",
    "echo": "use /v1/completions",
    "audio": "this server answers in text",
    "web_search_options": "this server searches nothing",
}
"""Fields that change an answer and that we do not follow, with what to do instead."""

Probability = Annotated[float, Field(gt=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
TokenId = Annotated[int, Field(ge=0)]
Role = Literal["system", "developer", "user", "assistant", "tool"]


class StreamOptions(BaseModel):
    """How a stream is written."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool = False


class Asking(BaseModel):
    """What both ways to ask have in common."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=0)
    min_tokens: int = Field(0, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: Probability | None = None
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=256)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    best_of: int | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(Asking):
    """A body of /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True


class TextPart(BaseModel):
    """A part of a message; only texts are read."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Role
    content: str | list[TextPart] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class ChatBody(Asking):
    """A body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


Body = TypeVar("Body", bound=Asking)


def understand(kind: type[Body], given: Mapping[str, Any]) -> Body:
    """Return the body of a request, or the error that names its first wrong field."""
    for name, repair in NOT_DONE.items():
        # Empty objects and lists may be a request as well: `"web_search_options": {}` asks for a search.
        if name not in kind.model_fields and given.get(name) not in (None, False, ""):
            raise wrong(name, f"{name} is not done by this server", code="request.unsupported", repair=repair)
    # A null is a field that was left out, as clients write it.
    said = {name: value for name, value in given.items() if value is not None}
    try:
        body = kind.model_validate(said)
    except ValidationError as error:
        raise _explained(error, said) from None
    if body.best_of is not None and body.best_of != body.n:
        raise wrong("best_of", f"best_of={body.best_of} is not n={body.n}", repair="ask for n answers and choose")
    if body.stream_options is not None and not body.stream:
        raise wrong("stream_options", "stream_options is given without stream", repair="set stream to true")
    if body.stream and body.prompt_logprobs is not None:
        raise wrong("prompt_logprobs", "prompt_logprobs are not streamed", repair="set stream to false")
    return body


def check_length(body: Asking, constraint: Constraint | None) -> None:
    """Refuse a shortest length beside a constraint: an answer under one ends where it is whole."""
    if constraint is not None and body.min_tokens:
        raise wrong(
            "min_tokens",
            f"min_tokens={body.min_tokens} stands beside {constraint.field}, and such an answer ends where it is whole",
            repair="leave it out; say minLength or minItems in the schema",
        )


def warnings_of(body: Asking) -> list[str]:
    """Return a sentence for each field that is unknown here."""
    known = sorted({*type(body).model_fields, *CONSTRAINT_FIELDS})
    unknown = [name for name in body.model_extra or {} if name not in known]
    return [f"{name!r} is not a field of this server and was ignored{did_you_mean(name, known)}" for name in unknown]


def _explained(error: ValidationError, given: Mapping[str, Any]) -> ApiError:
    details = error.errors(include_url=False)
    deepest = max(details, key=lambda detail: (detail["loc"][:1] == details[0]["loc"][:1], len(_path(detail, given))))
    path = _path(deepest, given)
    same = [detail for detail in details if _path(detail, given) == path]
    param = _written(path)
    if deepest["type"] == "missing":
        return wrong(param, f"{param} is missing", code="request.missing")
    expected = " or ".join(dict.fromkeys(_expected(detail) for detail in same))
    found = _shown(deepest["input"])
    near = did_you_mean(str(deepest["input"]), list(get_args(Role))) if param.endswith(".role") else ""
    return wrong(param, f"{param} is {found}, expected {expected}{near}")


def _path(detail: Any, given: Any) -> tuple[str | int, ...]:
    """Return the place of an error without pydantic's names for the members of a union."""
    place, value = [], given
    for part in detail["loc"]:
        if isinstance(value, Mapping) and (part in value or detail["type"] == "missing"):
            place.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            place.append(part)
            value = value[part]
    return tuple(place) or tuple(detail["loc"][:1])


def _written(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _expected(detail: Any) -> str:
    """Return what was expected, in plain words."""
    kind, context = detail["type"], detail.get("ctx", {})
    words = {
        "greater_than": "more than {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "less than {lt}",
        "less_than_equal": "at most {le}",
        "too_long": "at most {max_length} of them",
        "too_short": "at least {min_length} of them",
        "string_too_short": "a text that is not empty",
        "string_too_long": "at most {max_length} characters",
        "literal_error": "{expected}",
        "model_type": "an object",
        "model_attributes_type": "an object",
        "dict_type": "an object",
    }
    if kind in words:
        return words[kind].format(**context)
    names = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "string": "a text",
        "list": "a list",
    }
    return next((text for name, text in names.items() if kind.startswith(name)), str(detail["msg"]))


def _shown(value: Any) -> str:
    text = "an object" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
