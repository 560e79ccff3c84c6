"""A request as llama.cpp's server takes it, and what it answers as outputs: token ids in, token ids out.

Its stream leaves out the ids of tokens that end inside a character, and gives the text of the whole character later.
`Stream` puts tokens in their place that have the same bytes and the same number. An answer with log probabilities comes
in one piece, which has all ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ferry.engines.request import Finish, Output, Request, Sampling, TokenLogprobs
from ferry.engines.vocabulary import Vocabulary

STEPS = ("penalties", "temperature", "min_p", "top_k", "top_p")
"""The order in which the next token is chosen, as `ferry.engines.request.Sampling` has it."""
FINISHES: Mapping[str, Finish] = {"eos": "stop", "word": "stop", "limit": "length"}
LARGEST_SEED = 0xFFFF_FFFE
"""One more means a seed by chance."""


def missing(sampling: Sampling) -> list[str]:
    """Return what a request asks for that llama.cpp does not have, or not with the same meaning."""
    asked = {
        "prompt_logprobs": sampling.prompt_logprobs is not None,
        "min_tokens": sampling.min_tokens > 0,
        # It counts the prompt too, where the API counts the answer alone.
        "presence_penalty": sampling.presence_penalty != 0,
        "frequency_penalty": sampling.frequency_penalty != 0,
    }
    return [name for name, is_asked in asked.items() if is_asked]


def body_of(request: Request, max_model_len: int, *, prefix_caching: bool) -> dict[str, Any]:
    """Return the body of a request to /completion."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "prompt": list(request.prompt_ids),
        "n_predict": num_tokens(request, max_model_len),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": max_model_len,
        "samplers": list(STEPS),
        "return_tokens": True,
        "cache_prompt": prefix_caching,
        # Nothing ends such an answer. llama.cpp knows the model's end tokens by itself, and is told not to choose them.
        "ignore_eos": not sampling.end_token_ids and not request.grammar,
        "stream": sampling.logprobs is None,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed % LARGEST_SEED
    if sampling.logit_bias:
        body["logit_bias"] = [[token, bias] for token, bias in sampling.logit_bias.items()]
    if sampling.logprobs is not None:
        body["n_probs"] = max(1, sampling.logprobs)
    if request.grammar:
        body["grammar"] = request.grammar
    return body


def num_tokens(request: Request, max_model_len: int) -> int:
    """Return the most tokens an answer may have."""
    return max(1, min(request.sampling.max_tokens, max_model_len - len(request.prompt_ids)))


def whole_answer(request: Request, said: Mapping[str, Any]) -> Output:
    """Return an answer that came in one piece."""
    tokens = [int(token) for token in said["tokens"]]
    logprobs = [_logprobs(each, request.sampling.logprobs or 0) for each in said.get("completion_probabilities", ())]
    finish = FINISHES.get(str(said.get("stop_type")), "stop")
    place, end = _first_end(tokens, request.sampling.end_token_ids)
    if end is None and said.get("stop_type") == "eos" and tokens:
        place, end = len(tokens) - 1, tokens[-1]
    if end is not None:
        tokens, finish = tokens[:place], "stop"
    cached = int((said.get("timings") or {}).get("cache_n") or 0)
    return Output(request.id, tuple(tokens), tuple(logprobs[: len(tokens)]), finish, end, None, cached)


class Stream:
    """The pieces of one streamed answer as outputs."""

    def __init__(self, request: Request, vocabulary: Vocabulary, ids: Mapping[bytes, int]) -> None:
        """`ids` has the token of each sequence of bytes that is one (`ids_by_bytes`)."""
        self._request = request
        self._ends = frozenset(request.sampling.end_token_ids)
        self._vocabulary = vocabulary
        self._ids = ids
        self._num_tokens = 0
        self._silent: list[int] = []
        """Tokens without a text: the last of them may turn out to have been the end."""

    def take(self, said: Mapping[str, Any]) -> Output | None:
        """Return what a piece says; None if that is nothing yet."""
        tokens = self._completed(said)
        self._num_tokens = int(said.get("tokens_predicted") or self._num_tokens)
        place, end = _first_end(tokens, self._ends)
        if end is not None:
            return self._last(tokens[:place], "stop", end)
        if said.get("stop"):
            finish = FINISHES.get(str(said.get("stop_type")), "stop")
            if said.get("stop_type") == "eos" and self._silent:
                return self._last([*tokens], finish, self._silent.pop(), said)
            return self._last([*self._silent, *tokens], finish, None, said)
        if not tokens:
            return None
        if not said.get("content"):
            self._silent += tokens
            return None
        before, self._silent = self._silent, []
        return Output(self._request.id, (*before, *tokens))

    def _completed(self, said: Mapping[str, Any]) -> list[int]:
        """Return the tokens of a piece, with those that were left out before it."""
        tokens = [int(token) for token in said.get("tokens") or ()]
        num_missing = int(said.get("tokens_predicted") or 0) - self._num_tokens - len(tokens)
        if num_missing <= 0 or not tokens:
            return tokens
        text = str(said.get("content") or "").encode("utf-8")
        known = b"".join(self._vocabulary.token_bytes(token) for token in tokens)
        if not text.endswith(known):
            return tokens
        found = split(text[: len(text) - len(known)], num_missing, self._ids)
        return [*found, *tokens] if found is not None else tokens

    def _last(
        self, tokens: Sequence[int], finish: Finish, end: int | None, said: Mapping[str, Any] | None = None
    ) -> Output:
        before = [] if said is not None else self._silent
        cached = int(((said or {}).get("timings") or {}).get("cache_n") or 0)
        return Output(self._request.id, (*before, *tokens), (), finish, end, None, cached)


def ids_by_bytes(vocabulary: Vocabulary, num_tokens: int) -> dict[bytes, int]:
    """Return the token of each sequence of bytes, the lowest where several have it; special tokens stand for none."""
    found: dict[bytes, int] = {}
    for token in range(num_tokens):
        if token not in vocabulary.special_ids:
            found.setdefault(vocabulary.token_bytes(token), token)
    found.pop(b"", None)
    return found


def split(data: bytes, number: int, ids: Mapping[bytes, int]) -> list[int] | None:
    """Return so many tokens that have these bytes together, long ones first; None where there are none."""
    if number == 0 or len(data) < number:
        return [] if number == 0 and not data else None
    for size in range(len(data) - number + 1, 0, -1):
        token = ids.get(data[:size])
        rest = split(data[size:], number - 1, ids) if token is not None else None
        if token is not None and rest is not None:
            return [token, *rest]
    return None


def _logprobs(said: Mapping[str, Any], number: int) -> TokenLogprobs:
    top = sorted(
        ((int(each["id"]), float(each["logprob"])) for each in said["top_logprobs"]), key=lambda item: -item[1]
    )
    logprob = float(said["logprob"])
    rank = 1 + sum(value > logprob for _, value in top)
    return TokenLogprobs(int(said["id"]), logprob, rank, tuple(top[:number]))


def _first_end(tokens: Sequence[int], ends: Sequence[int] | frozenset[int]) -> tuple[int, int | None]:
    """Return the place of the first end token, and the token; (number of tokens, None) where there is none."""
    return next(((place, token) for place, token in enumerate(tokens) if token in ends), (len(tokens), None))
