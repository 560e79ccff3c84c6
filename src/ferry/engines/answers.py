"""Answers as they are returned in Python, shaped like vLLM's, and how the engine's tokens become one.

Beside vLLM's fields a guided answer says whether it keeps its promise: `outputs[0].guided.valid`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ferry.engines.detokenizing import StopTexts
from ferry.engines.parameters import SamplingParams
from ferry.engines.request import Output, TokenLogprobs
from ferry.engines.text import TextModel
from ferry.guided.validate import Verdict


class Logprob(NamedTuple):
    """How likely a token was. `rank` 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


Place = dict[int, Logprob]
"""The probabilities at one place of a text, by token id."""


@dataclass
class CompletionOutput:
    """One answer. `finish_reason` is `stop` or `length`."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    """The tokens of the answer, without the one that ended it."""
    cumulative_logprob: float | None = None
    logprobs: list[Place] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop text or the stop token that ended it, if one of the caller's did."""
    guided: Verdict | None = None
    """Whether the answer has the form that was asked for; None where none was."""

    def finished(self) -> bool:
        """Return whether the answer is whole."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A prompt with its answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Place | None] | None = None
    num_cached_tokens: int = 0
    """Tokens of the prompt that were known from earlier prompts."""

    @property
    def finished(self) -> bool:
        """Return whether all answers are whole."""
        return all(output.finished() for output in self.outputs)


class Answer:
    """One answer while its tokens come."""

    def __init__(self, text_model: TextModel, params: SamplingParams, index: int) -> None:
        self.output = CompletionOutput(index)
        self.prompt_logprobs: list[Place | None] | None = None
        self.num_cached_tokens = 0
        self._text_model, self._params = text_model, params
        self._detokenizer = text_model.detokenizer(skip_special_tokens=params.skip_special_tokens)
        self._stops = StopTexts(params.stop_texts, include=params.include_stop_str_in_output)
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0

    def add(self, output: Output) -> bool:
        """Take what is new; return whether a stop text ended the answer before the engine did."""
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = [one and self._place(one) for one in output.prompt_logprobs]
        self.num_cached_tokens += output.num_cached_tokens
        for number, token in enumerate(output.token_ids):
            self.output.token_ids.append(token)
            if self.output.logprobs is not None and self.output.cumulative_logprob is not None:
                self.output.logprobs.append(self._place(output.logprobs[number]))
                self.output.cumulative_logprob += output.logprobs[number].logprob
            text = self._detokenizer.add((token,))
            is_early = len(self.output.token_ids) < self._params.min_tokens
            cut = self._stops.pass_by(text) if is_early else self._stops.add(text)
            self.output.text += cut.text
            if cut.stop is not None:
                self.output.finish_reason, self.output.stop_reason = "stop", cut.stop
                return True
        if output.finish is not None:
            self.output.text += self._stops.finish()
            self.output.finish_reason = output.finish
            if output.end_token_id in (self._params.stop_token_ids or ()):
                self.output.stop_reason = output.end_token_id
        return False

    def _place(self, found: TokenLogprobs) -> Place:
        """Return the probabilities of a place: of the token there, and of the likeliest in their order."""
        places = {found.token_id: self._logprob(found.token_id, found.logprob, found.rank)}
        for rank, (token, logprob) in enumerate(found.top, 1):
            places.setdefault(token, self._logprob(token, logprob, rank))
        return places

    def _logprob(self, token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, self._text_model.decode([token], skip_special_tokens=False))
