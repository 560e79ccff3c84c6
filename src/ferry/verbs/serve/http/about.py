"""The small routes: what is served, whether it is well, and text to tokens and back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferry.core.errors import UnavailableError
from ferry.verbs.serve.http.bodies import ChatBody, CompletionBody, understand
from ferry.verbs.serve.http.conversation import prompt_of
from ferry.verbs.serve.http.errors import ApiError, busy, wrong
from ferry.verbs.serve.http.events import answer_json
from ferry.verbs.serve.http.prometheus import CONTENT_TYPE
from ferry.verbs.serve.http.reading import read_object
from ferry.verbs.serve.http.served import Served
from ferry.verbs.serve.http.tools import tools_of

STATS_TIMEOUT_S = 2.0
MAX_TOKENS = 131_072
"""Tokens that are made, or made text of, at once, unless the model takes more."""
JsonObject = dict[str, Any]


async def models(served: Served, request: HttpRequest) -> Response:
    """List what is served."""
    return answer_json({"object": "list", "data": [_model(served, name) for name in served.settings.shown_names]})


async def model(served: Served, request: HttpRequest) -> Response:
    """Describe one model."""
    return answer_json(_model(served, served.name_of(str(request.path_params["name"]))))


async def health(served: Served, request: HttpRequest) -> Response:
    """Say that this process is alive; it is not when its engine is gone for good."""
    condition = served.engine.condition
    if condition.state == "failed":
        raise ApiError(503, f"the engine failed: {condition.reason}", code="engine.failed")
    return answer_json({"status": "alive"})


async def ready(served: Served, request: HttpRequest) -> Response:
    """Say whether requests are answered now."""
    condition = served.engine.condition
    if served.gate.is_closed:
        raise busy(503, "the server is stopping", code="serve.stopping")
    if condition.state != "ready":
        reason = condition.reason or "the model is being loaded"
        raise busy(503, f"not ready ({condition.state}): {reason}", code="engine.not-ready")
    return answer_json({"status": "ready", "model": served.settings.shown_names[0], "engine": served.engine.info.name})


async def metrics(served: Served, request: HttpRequest) -> Response:
    """Return the page that Prometheus reads."""
    condition, stats = served.engine.condition, None
    if condition.state == "ready":
        try:
            stats = await asyncio.wait_for(served.engine.stats(), STATS_TIMEOUT_S)
        except (asyncio.TimeoutError, UnavailableError):
            stats = None
    page = served.measures.page(served.gate, stats, condition)
    return Response(page, headers={"content-type": CONTENT_TYPE})


async def version(served: Served, request: HttpRequest) -> Response:
    """Return the version of Ferry."""
    import ferry

    return answer_json({"version": ferry.__version__})


async def tokenize(served: Served, request: HttpRequest) -> Response:
    """Return a text, or a conversation, as tokens."""
    given = await read_object(request, served.settings.max_body_bytes)
    with_texts = bool(given.pop("return_token_strs", False))
    if "messages" in given:
        chat = understand(ChatBody, given)
        served.name_of(chat.model)
        text = prompt_of(served.model, chat, tools_of(chat, served.model))
        param, special = "messages", chat.add_special_tokens
    else:
        body = understand(CompletionBody, given)
        served.name_of(body.model)
        if not isinstance(body.prompt, str):
            raise wrong("prompt", "prompt is a list, expected a text")
        text, param, special = body.prompt, "prompt", body.add_special_tokens
    (ids,) = await served.encode([text], add_special_tokens=special, most_tokens=None, param=param)
    _check_count(served, len(ids), param)
    answer: JsonObject = {"count": len(ids), "max_model_len": _max_model_len(served), "tokens": ids}
    if with_texts:
        answer["token_strs"] = await asyncio.to_thread(_texts, served, ids)
    return answer_json(answer)


async def detokenize(served: Served, request: HttpRequest) -> Response:
    """Return tokens as text."""
    given = await read_object(request, served.settings.max_body_bytes)
    tokens = given.get("tokens")
    if tokens is None:
        raise wrong("tokens", "tokens is missing", code="request.missing")
    if not isinstance(tokens, list):
        raise wrong("tokens", "tokens is no list of token ids")
    _check_count(served, len(tokens), "tokens")
    if not all(type(one) is int and one >= 0 for one in tokens):
        raise wrong("tokens", "tokens is no list of token ids")
    highest = served.model.vocabulary.num_tokens
    outside = next((one for one in tokens if one >= highest), None)
    if outside is not None:
        raise wrong("tokens", f"token id {outside} is not one of the {highest:,} of this model")
    return answer_json({"prompt": await asyncio.to_thread(served.model.decode, tokens, False)})


def _check_count(served: Served, num_tokens: int, param: str) -> None:
    most = max(MAX_TOKENS, _max_model_len(served) or 0)
    if num_tokens > most:
        raise wrong(param, f"there are {num_tokens:,} tokens, more than {most:,}", repair="send the text in parts")


def _texts(served: Served, ids: Sequence[int]) -> list[str]:
    return [served.model.decode([one], skip_special_tokens=False) for one in ids]


def _model(served: Served, name: str) -> JsonObject:
    described = {"id": name, "object": "model", "created": served.created, "owned_by": "ferry"}
    return {**described, "max_model_len": _max_model_len(served)}


def _max_model_len(served: Served) -> int | None:
    try:
        return served.engine.info.max_model_len
    except UnavailableError:
        return None
