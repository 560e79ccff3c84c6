"""`/v1/completions`: texts or tokens that go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferry.engines.request import Request
from ferry.guided.compiling import Compiled
from ferry.guided.request import constraint_of
from ferry.verbs.serve.http import logprobs as shown
from ferry.verbs.serve.http.answering import Asked, Piece, Token
from ferry.verbs.serve.http.bodies import (
    MAX_ANSWERS,
    CompletionBody,
    check_length,
    understand,
    warnings_of,
)
from ferry.verbs.serve.http.errors import wrong
from ferry.verbs.serve.http.events import answer_json, while_connected
from ferry.verbs.serve.http.gathering import Usage, Whole, gather, guided_json, head_of, warned
from ferry.verbs.serve.http.reading import read_object
from ferry.verbs.serve.http.sampling import fitted, max_tokens_of, sampling_of
from ferry.verbs.serve.http.served import Served, new_id
from ferry.verbs.serve.http.streaming import Writer, stream

DEFAULT_MAX_TOKENS = 16
JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A request that was understood."""

    body: CompletionBody
    head: JsonObject
    prompts: tuple[tuple[int, ...], ...]
    asked: tuple[Asked, ...]
    warnings: tuple[str, ...]
    names: shown.TokenNames
    is_only_echo: bool
    """Nothing is to be generated: the prompt is all that is wanted."""


async def completions(served: Served, request: HttpRequest) -> Response:
    """Answer one request."""
    came_s = served.measures.clock()
    given = await read_object(request, served.settings.max_body_bytes)
    job = await while_connected(request, understood(served, given))
    usage = Usage(sum(map(len, job.prompts)), job.body.n)
    pieces = served.run(job.asked, came_s, usage.num_prompt)
    if job.body.stream:
        return await stream(served, request, pieces, _CompletionWriter(served, job), usage)
    wholes = await while_connected(request, gather(pieces, len(job.asked), usage))
    if job.is_only_echo:
        usage.num_generated = 0
    choices = [_choice(served, job, whole, index) for index, whole in enumerate(wholes)]
    return answer_json({**job.head, "choices": choices, "usage": usage.to_json(), **warned(job.warnings)})


async def understood(served: Served, given: JsonObject) -> Job:
    """Return what a body asks for, or the error in it."""
    body = understand(CompletionBody, given)
    constraint = constraint_of(given)
    check_length(body, constraint)
    name = served.name_of(body.model)
    is_only_echo = body.echo and body.max_tokens == 0
    if body.max_tokens == 0 and not is_only_echo:
        raise wrong("max_tokens", "max_tokens is 0, expected at least 1", repair="0 is for echo only")
    given_prompts = _prompts(body)
    served.check_open()
    compiled = await served.compiled(constraint)
    limits = served.limits
    prompts = tuple([fitted(ids, body, limits, "prompt") for ids in await _tokens(served, body, given_prompts)])
    identity, number = new_id("cmpl"), served.next_number()
    asked: list[Asked] = []
    for ids in prompts:
        most = max_tokens_of(body.max_tokens, DEFAULT_MAX_TOKENS, len(ids), limits, "max_tokens")
        sampling = sampling_of(body, served.default_sampling, limits, max_tokens=max(most, 1), logprobs=body.logprobs)
        if body.echo and body.logprobs is not None:
            sampling = replace(sampling, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
        for copy in range(body.n):
            seeded = sampling if body.seed is None else replace(sampling, seed=body.seed + copy)
            asked.append(asked_of(body, Request(f"{number}-{len(asked)}", ids, seeded), len(asked), compiled))
    notes = compiled.notes if compiled else ()
    names = shown.TokenNames(served.model.vocabulary, by_id=body.return_tokens_as_token_ids)
    head = head_of("text_completion", identity, name)
    return Job(body, head, prompts, tuple(asked), (*warnings_of(body), *notes), names, is_only_echo)


def asked_of(body: Any, request: Request, index: int, compiled: Compiled | None) -> Asked:
    """Return one answer that a body asks for."""
    return Asked(
        request=replace(request, grammar=compiled.lark) if compiled else request,
        index=index,
        stops=body.stops,
        include_stop=body.include_stop_str_in_output,
        own_stop_ids=frozenset(body.stop_token_ids),
        skip_special_tokens=body.skip_special_tokens,
        compiled=compiled,
    )


def _prompts(body: CompletionBody) -> list[Any]:
    """Return the prompts of a body, each a text or tokens."""
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not given:
        raise wrong("prompt", "prompt is an empty list, expected a text or tokens")
    found: list[Any] = [given] if isinstance(given[0], int) else list(given)
    if len(found) * body.n > MAX_ANSWERS:
        raise wrong(
            "prompt",
            f"{len(found):,} prompts with n={body.n} are {len(found) * body.n:,} answers, more than the {MAX_ANSWERS} "
            "that one request may ask for",
            repair="send them in several requests",
        )
    return found


async def _tokens(served: Served, body: CompletionBody, prompts: list[Any]) -> list[Sequence[int]]:
    """Return each prompt as tokens."""
    if not isinstance(prompts[0], str):
        return prompts
    most_tokens = served.limits.max_model_len if body.truncate_prompt_tokens is None else None
    special = body.add_special_tokens
    return [*await served.encode(prompts, add_special_tokens=special, most_tokens=most_tokens, param="prompt")]


def _choice(served: Served, job: Job, whole: Whole, index: int) -> JsonObject:
    assert whole.last is not None
    body, ids = job.body, job.prompts[index // job.body.n]
    lists = shown.CompletionLogprobs(job.names, body.logprobs or 0)
    text, found = "", None
    if body.echo:
        text, found = _echo(served, job, ids, whole, lists)
    tokens = [] if job.is_only_echo else whole.tokens
    if body.logprobs is not None:
        of_answer = lists.of_tokens(tokens)
        found = shown.joined(found, of_answer) if found else of_answer
    choice: JsonObject = {
        "index": index,
        "text": text + ("" if job.is_only_echo else whole.text),
        "logprobs": found,
        "finish_reason": "length" if job.is_only_echo else whole.last.finish,
        "stop_reason": whole.last.stop_reason,
        **guided_json(whole.last.verdict),
    }
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = shown.of_prompt(whole.prompt_logprobs or (), job.names)
    if body.return_token_ids:
        choice |= {"prompt_token_ids": list(ids), "token_ids": [token.id for token in tokens]}
    return choice


def _echo(
    served: Served, job: Job, ids: Sequence[int], whole: Whole | Piece, lists: shown.CompletionLogprobs
) -> tuple[str, JsonObject | None]:
    """Return the text of a prompt and, if wanted, its probabilities."""
    detokenizer = served.model.detokenizer(skip_special_tokens=job.body.skip_special_tokens)
    texts = [detokenizer.add((one,)) for one in ids]
    found = whole.prompt_logprobs
    return "".join(texts), lists.of_prompt(ids, texts, found) if job.body.logprobs is not None and found else None


class _CompletionWriter(Writer):
    """Writes pieces as events."""

    def __init__(self, served: Served, job: Job) -> None:
        self.options, self.warnings, self.num_answers = job.body.stream_options, job.warnings, len(job.asked)
        self._served, self._job = served, job
        self._lists = [shown.CompletionLogprobs(job.names, job.body.logprobs or 0) for _ in job.asked]
        self._has_begun: set[int] = set()

    def chunk(self, choices: list[JsonObject]) -> JsonObject:
        """Return a chunk with some choices."""
        return {**self._job.head, "choices": choices}

    def begin(self) -> list[JsonObject]:
        """Return what comes before all pieces."""
        return []

    def choices(self, piece: Piece) -> list[JsonObject]:
        """Return a piece as choices of chunks."""
        body, ids, lists = self._job.body, self._job.prompts[piece.index // self._job.body.n], self._lists[piece.index]
        text, tokens, found = piece.text, piece.tokens, None
        if self._job.is_only_echo:
            text, tokens = "", ()
        if body.echo and piece.index not in self._has_begun:
            before, found = _echo(self._served, self._job, ids, piece, lists)
            text = before + text
        self._has_begun.add(piece.index)
        if not text and not piece.finish and not (tokens and (body.logprobs is not None or body.return_token_ids)):
            return []
        return [self._choice(piece, text, tokens, found, lists)]

    def _choice(
        self,
        piece: Piece,
        text: str,
        tokens: Sequence[Token],
        found: JsonObject | None,
        lists: shown.CompletionLogprobs,
    ) -> JsonObject:
        body = self._job.body
        if body.logprobs is not None:
            of_piece = lists.of_tokens(tokens)
            found = shown.joined(found, of_piece) if found else of_piece
        finish = "length" if self._job.is_only_echo and piece.finish else piece.finish
        choice: JsonObject = {"index": piece.index, "text": text, "logprobs": found, "finish_reason": finish}
        if piece.finish:
            choice |= {"stop_reason": piece.stop_reason, **guided_json(piece.verdict)}
        if body.return_token_ids:
            choice["token_ids"] = [token.id for token in tokens]
        return choice
