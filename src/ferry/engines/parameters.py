"""How answers are asked for in Python: `SamplingParams` and `GuidedDecodingParams`, with vLLM's names and defaults.

Scripts written for vLLM, old or new, change their import lines and nothing else. Every name is checked when it is
given: one that is unknown, or that Ferry does not do, is an error and never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError, model_validator

from ferry.core.errors import ConfigError, did_you_mean
from ferry.engines.request import Sampling
from ferry.guided.request import Constraint, constraint_of

NOT_DONE: dict[str, str] = {
    "bad_words": "use logit_bias",
    "allowed_token_ids": "use structured_outputs with a choice or a grammar",
    "logits_processors": "use logit_bias or structured_outputs",
    "truncate_prompt_tokens": "cut the prompt before it is given",
    "use_beam_search": "ask for n answers and choose",
    "detokenize": "leave it out: the text is always there",
    "output_kind": "leave it out: whole answers are returned",
}
"""Names of vLLM that mean something else than what Ferry would do without them, and what to do instead."""
GREEDY_BELOW = 1e-5
"""A temperature that takes the likeliest token, as in vLLM."""


@dataclass(frozen=True)
class GuidedDecodingParams:
    """What form an answer has: one of json, regex, choice, grammar, json_object and structural_tag.

    >>> GuidedDecodingParams(choice=["Positive", "Negative"])
    """

    json: Any = None
    """A JSON schema: a dict, its text, or a pydantic model."""
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: str | None = None
    """The whitespace that JSON may have; none by default."""
    backend: str | None = None
    """Not needed: llguidance does all guided decoding here."""
    disable_fallback: bool = False
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False

    def __new__(cls, *args: Any, **values: Any) -> GuidedDecodingParams:
        """Refuse unknown names as Ferry does, before Python does."""
        _refuse_unknown(cls.__name__, values, [field.name for field in fields(cls)])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Refuse at once what could not be followed later."""
        self.constraint()

    def constraint(self) -> Constraint:
        """Return what is asked for; raise Refusal where it is nothing, two things, or wrong."""
        said = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "backend"}
        given = {name: value for name, value in said.items() if value is not None and value is not False}
        found = constraint_of({"structured_outputs": given, "guided_decoding_backend": self.backend})
        assert found is not None, "something was asked for, or it was refused"
        return found


StructuredOutputsParams = GuidedDecodingParams
"""The name that newer vLLM has for it."""


class SamplingParams(BaseModel):
    """How the tokens of an answer are chosen. Names, meanings and defaults are vLLM's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int = Field(1, ge=1)
    """Answers to each prompt."""
    best_of: int | None = None
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    """0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    """0 or -1: all tokens."""
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    seed: int | None = None
    """With a seed, the same prompt has the same answer whatever is asked beside it."""
    stop: str | list[str] | None = None
    """Texts before which an answer ends."""
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = Field(16, ge=1)
    """None: as many as the model has room for."""
    min_tokens: int = Field(0, ge=0)
    logprobs: int | None = Field(None, ge=-1)
    """Probabilities of so many of the likeliest tokens; -1: of all."""
    prompt_logprobs: int | None = Field(None, ge=-1)
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    guided_decoding: InstanceOf[GuidedDecodingParams] | None = None
    structured_outputs: InstanceOf[GuidedDecodingParams] | None = None

    def __init__(self, **values: Any) -> None:
        _refuse_unknown("SamplingParams", values, list(type(self).model_fields))
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            text = first["msg"].removeprefix("Value error, ")
            name = str(first["loc"][0]) if first["loc"] else ""
            found = f"{name} is {first['input']!r}: " if name else ""
            raise _wrong(f"SamplingParams: {found}{text[0].lower()}{text[1:]}", "") from None

    @model_validator(mode="after")
    def _agrees(self) -> SamplingParams:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of={self.best_of} is not n={self.n}; ask for n answers and choose")
        if self.n > 1 and self.is_greedy:
            raise ValueError(f"n={self.n} with temperature 0 would be the same answer {self.n} times")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if any(not text for text in self.stop_texts):
            raise ValueError("an empty stop text would end every answer at once")
        if self.guided_decoding is not None and self.structured_outputs is not None:
            raise ValueError("guided_decoding and structured_outputs are two names of one thing; leave one out")
        return self

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_texts(self) -> list[str]:
        """Return the stop texts as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def guided(self) -> GuidedDecodingParams | None:
        """Return the form of the answer, under whichever name it was given."""
        return self.guided_decoding or self.structured_outputs

    def sampling(self, *, end_token_ids: tuple[int, ...], room: int, num_tokens: int, index: int) -> Sampling:
        """Return what the engine is asked. `room`: tokens that the context has left; `index`: which of n answers."""
        ends = (*(() if self.ignore_eos else end_token_ids), *(self.stop_token_ids or ()))
        return Sampling(
            max_tokens=room if self.max_tokens is None else self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=0.0 if self.is_greedy else self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else self.seed + index,
            end_token_ids=tuple(dict.fromkeys(ends)),
            logit_bias=dict(self.logit_bias or {}),
            logprobs=num_tokens if self.logprobs == -1 else self.logprobs,
            prompt_logprobs=num_tokens if self.prompt_logprobs == -1 else self.prompt_logprobs,
        )


def defaults_of(model: Mapping[str, float]) -> SamplingParams:
    """Return how a model itself wants to be sampled, after its generation_config.json."""
    values: dict[str, Any] = {name: value for name, value in model.items() if name != "max_new_tokens"}
    if "max_new_tokens" in model:
        values["max_tokens"] = int(model["max_new_tokens"])
    return SamplingParams(**values)


def _refuse_unknown(kind: str, values: Mapping[str, Any], known: list[str]) -> None:
    for name in values:
        if name in NOT_DONE:
            raise _wrong(f"{kind}: {name} is not done", NOT_DONE[name])
        if name not in known:
            raise _wrong(f"{kind} has no {name}{did_you_mean(name, known)}", f"known: {', '.join(known)}")


def _wrong(message: str, repair: str) -> ConfigError:
    return ConfigError(message, code="sampling.parameter", repair=repair)
