"""A request as vLLM's completions take it, and what they answer as outputs: token ids in, token ids out.

The prompt goes as ids and answers come as ids (`return_token_ids`); texts are ignored. Log probabilities come with
tokens named by their id (`return_tokens_as_token_ids`). vLLM does not stream those of a prompt, so such a request is
answered in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ferry.engines.request import Finish, Output, Request, Sampling, TokenLogprobs
from ferry.engines.vllm_command import SERVED_AS, body_grammar
from ferry.engines.vllm_environment import Adapter

TOKEN = "token_id:"
FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "cancelled", "repetition": "stop"}


def body_of(request: Request, adapter: Adapter, max_model_len: int) -> dict[str, Any]:
    """Return the body of a request to /v1/completions."""
    sampling = request.sampling
    room = max_model_len - len(request.prompt_ids) if max_model_len else sampling.max_tokens
    body: dict[str, Any] = {
        "model": SERVED_AS,
        "prompt": list(request.prompt_ids),
        "request_id": request.id,
        "return_token_ids": True,
        "max_tokens": max(1, min(sampling.max_tokens, room)),
        "min_tokens": sampling.min_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.end_token_ids),
        # The end tokens are those of the request. A grammar that is at its end allows the model's own one only.
        "ignore_eos": not request.grammar,
        "skip_special_tokens": False,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if request.grammar:
        body |= body_grammar(adapter, request.grammar)
    if sampling.prompt_logprobs is not None:
        return body | {"prompt_logprobs": sampling.prompt_logprobs}
    return body | {"stream": True, "stream_options": {"include_usage": True}}


def output_of(request: Request, choice: Mapping[str, Any], usage: Mapping[str, Any] | None = None) -> Output:
    """Return what one choice of an answer, or of a piece of it, says."""
    tokens = [int(token) for token in choice.get("token_ids") or ()]
    logprobs = logprobs_of(choice.get("logprobs"), request.sampling.logprobs)
    said = choice.get("finish_reason")
    finish: Finish | None = FINISHES.get(str(said), "error") if said is not None else None
    end: int | None = None
    if finish == "stop" and tokens and _is_end(tokens[-1], choice, request.sampling):
        end = tokens.pop()
        logprobs = logprobs[: len(tokens)]
    if request.sampling.max_tokens == 0:  # vLLM makes one at least
        tokens, logprobs = [], ()
    details = (usage or {}).get("prompt_tokens_details") or {}
    return Output(
        request.id,
        tuple(tokens),
        logprobs,
        finish,
        end,
        prompt_logprobs_of(choice.get("prompt_logprobs"), request),
        int(details.get("cached_tokens") or 0),
        "engine.lost" if finish == "error" else "",
        f"vLLM ended the request with {said!r}" if finish == "error" else "",
    )


def logprobs_of(said: Mapping[str, Any] | None, number: int | None) -> tuple[TokenLogprobs, ...]:
    """Return the log probabilities of the tokens of a piece. A rank below the listed tokens is that of the next one."""
    if said is None or number is None:
        return ()
    tops: Sequence[Mapping[str, float] | None] = said["top_logprobs"]
    return tuple(
        _ranked(_token(token), float(logprob), {_token(name): value for name, value in (top or {}).items()}, number)
        for token, logprob, top in zip(said["tokens"], said["token_logprobs"], tops, strict=True)
    )


def prompt_logprobs_of(
    said: Sequence[Mapping[str, Mapping[str, Any]] | None] | None, request: Request
) -> tuple[TokenLogprobs | None, ...] | None:
    """Return the log probabilities of the tokens of a prompt, None for the first."""
    number = request.sampling.prompt_logprobs
    if said is None or number is None:
        return None
    found: list[TokenLogprobs | None] = []
    for token, place in zip(request.prompt_ids, said, strict=True):
        if place is None:
            found.append(None)
            continue
        values = {int(name): float(value["logprob"]) for name, value in place.items()}
        ranked = _ranked(token, values[token], values, number)
        rank = place[str(token)].get("rank")
        found.append(ranked if rank is None else ranked._replace(rank=int(rank)))
    return tuple(found)


def _ranked(token: int, logprob: float, values: Mapping[int, float], number: int) -> TokenLogprobs:
    """Put tokens in order. The token itself is among the values, also where it is not one of the likeliest."""
    order = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    rank = 1 + sum(value > logprob for value in values.values())
    return TokenLogprobs(token, logprob, rank, tuple(order[:number]))


def _token(name: str) -> int:
    return int(name.removeprefix(TOKEN))


def _is_end(token: int, choice: Mapping[str, Any], sampling: Sampling) -> bool:
    """Say whether the last token is the one that ended the answer."""
    return choice.get("stop_reason") in (None, token) or token in sampling.end_token_ids
