"""From the fields of a request to how an engine shall sample, with the model's own defaults, and within its context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ferry.engines.request import Sampling
from ferry.verbs.serve.http.bodies import Asking
from ferry.verbs.serve.http.errors import ApiError, wrong

CONTEXT_CODE = "context_length_exceeded"
MAX_DIGITS = 10
"""Digits of a token id."""


class Limits(NamedTuple):
    """What the model bounds."""

    max_model_len: int
    num_tokens: int
    end_token_ids: tuple[int, ...]


def sampling_of(
    body: Asking, defaults: Mapping[str, float], limits: Limits, *, max_tokens: int, logprobs: int | None
) -> Sampling:
    """Return how to sample one answer. What a request leaves out comes from `defaults`, the model's own."""
    temperature = float(_or(body.temperature, defaults.get("temperature"), 1.0))
    if body.n > 1 and temperature == 0:
        raise wrong("n", f"n={body.n} with temperature 0 would be {body.n} times the same answer", repair="set n to 1")
    if body.min_tokens > max_tokens:
        raise wrong("min_tokens", f"min_tokens={body.min_tokens} is more than max_tokens={max_tokens}")
    for token in body.stop_token_ids:
        _check_token(token, limits, "stop_token_ids")
    ends = () if body.ignore_eos else limits.end_token_ids
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=temperature,
        top_p=float(_or(body.top_p, defaults.get("top_p"), 1.0)),
        top_k=max(int(_or(body.top_k, defaults.get("top_k"), 0)), 0),
        min_p=float(_or(body.min_p, defaults.get("min_p"), 0.0)),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=float(_or(body.repetition_penalty, defaults.get("repetition_penalty"), 1.0)),
        seed=body.seed,
        end_token_ids=tuple(dict.fromkeys((*ends, *body.stop_token_ids))),
        logit_bias=_bias(body.logit_bias or {}, limits),
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
    )


def fitted(ids: Sequence[int], body: Asking, limits: Limits, param: str) -> tuple[int, ...]:
    """Return a prompt as it goes to the engine, or the error for one that cannot."""
    if not ids:
        raise wrong(param, "the prompt is empty: it has no tokens")
    # One look for all: the highest id is outside if any is.
    if max(ids) >= limits.num_tokens:
        _check_token(max(ids), limits, param)
    keep = body.truncate_prompt_tokens
    if keep is not None:
        most = limits.max_model_len - 1
        ids = ids[-(most if keep == -1 else min(keep, most) or 1) :]
    if len(ids) >= limits.max_model_len:
        raise too_long(f"{len(ids):,} tokens", limits.max_model_len, param)
    return tuple(ids)


def too_long(found: str, max_model_len: int, param: str) -> ApiError:
    """Return the error for a prompt that is longer than the model's context."""
    return ApiError(
        400,
        f"the prompt has {found}; prompt and answer together may have {max_model_len:,}",
        param=param,
        code=CONTEXT_CODE,
        repair="shorten the prompt, or set truncate_prompt_tokens",
    )


def max_tokens_of(asked: int | None, default: int | None, num_prompt: int, limits: Limits, param: str) -> int:
    """Return how long an answer may be; without a word about it `default` or what the context leaves."""
    room = limits.max_model_len - num_prompt
    if asked is None:
        return min(default or room, room)
    if asked > room:
        raise ApiError(
            400,
            f"{param}={asked:,} and a prompt of {num_prompt:,} tokens are more than the {limits.max_model_len:,} that "
            "this server's max_model_len allows",
            param=param,
            code=CONTEXT_CODE,
            repair=f"set {param} to {room:,} or less",
        )
    return asked


def _bias(given: Mapping[str, float], limits: Limits) -> dict[int, float]:
    found = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdigit()) or len(name) > MAX_DIGITS:
            raise wrong("logit_bias", f"logit_bias has the key {name[:40]!r}, expected a token id")
        _check_token(int(name), limits, "logit_bias")
        found[int(name)] = float(value)
    return found


def _check_token(token: int, limits: Limits, param: str) -> None:
    if token >= limits.num_tokens:
        raise wrong(param, f"token id {token} is not one of the {limits.num_tokens:,} of this model")


def _or(*values: float | None) -> float:
    return next(value for value in values if value is not None)
