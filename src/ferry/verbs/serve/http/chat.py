"""`/v1/chat/completions`: conversations that go on, calls of tools included."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferry.engines.request import Request
from ferry.guided.request import constraint_of
from ferry.verbs.serve.http import logprobs as shown
from ferry.verbs.serve.http.answering import Asked, Piece
from ferry.verbs.serve.http.bodies import ChatBody, check_length, understand, warnings_of
from ferry.verbs.serve.http.completions import asked_of
from ferry.verbs.serve.http.conversation import prompt_of
from ferry.verbs.serve.http.errors import wrong
from ferry.verbs.serve.http.events import answer_json, while_connected
from ferry.verbs.serve.http.gathering import Usage, Whole, gather, guided_json, head_of, warned
from ferry.verbs.serve.http.reading import read_object
from ferry.verbs.serve.http.sampling import fitted, max_tokens_of, sampling_of
from ferry.verbs.serve.http.served import Served, new_id
from ferry.verbs.serve.http.streaming import Writer, stream
from ferry.verbs.serve.http.tool_formats import Call, CallReader, marks_of
from ferry.verbs.serve.http.tools import CallList, Tools, tools_of

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A request that was understood."""

    body: ChatBody
    identity: str
    name: str
    tools: Tools
    asked: tuple[Asked, ...]
    warnings: tuple[str, ...]
    names: shown.TokenNames


async def chat(served: Served, request: HttpRequest) -> Response:
    """Answer one request."""
    came_s = served.measures.clock()
    given = await read_object(request, served.settings.max_body_bytes)
    job = await while_connected(request, understood(served, given))
    usage = Usage(len(job.asked[0].request.prompt_ids), job.body.n)
    pieces = served.run(job.asked, came_s, usage.num_prompt)
    if job.body.stream:
        return await stream(served, request, pieces, _ChatWriter(job), usage)
    wholes = await while_connected(request, gather(pieces, len(job.asked), usage))
    answer = head_of("chat.completion", job.identity, job.name)
    answer |= {"choices": [_choice(job, whole, index) for index, whole in enumerate(wholes)], "usage": usage.to_json()}
    if job.body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = shown.of_prompt(wholes[0].prompt_logprobs or (), job.names)
    if job.body.return_token_ids:
        answer["prompt_token_ids"] = list(job.asked[0].request.prompt_ids)
    return answer_json({**answer, **warned(job.warnings)})


async def understood(served: Served, given: JsonObject) -> Job:
    """Return what a body asks for, or the error in it."""
    body = understand(ChatBody, given)
    constraint = constraint_of(given)
    check_length(body, constraint)
    name = served.name_of(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise wrong("top_logprobs", "top_logprobs is given without logprobs", repair="set logprobs to true")
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked_max = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if asked_max == 0:
        raise wrong("max_tokens", "max_tokens is 0, expected at least 1")
    tools = tools_of(body, served.model)
    if tools.mode != "none" and constraint is not None:
        raise wrong(
            constraint.field,
            f"{constraint.field} is given beside tools, and an answer can follow only one",
            code="guided.two",
            repair='set tool_choice to "none", or leave one out',
        )
    served.check_open()
    limits = served.limits
    compiled = await served.compiled(tools.constraint or constraint)
    text = prompt_of(served.model, body, tools)
    most_tokens = limits.max_model_len if body.truncate_prompt_tokens is None else None
    special = body.add_special_tokens
    (found,) = await served.encode([text], add_special_tokens=special, most_tokens=most_tokens, param="messages")
    ids = fitted(found, body, limits, "messages")
    default = served.default_sampling.get("max_new_tokens")
    most = max_tokens_of(asked_max, int(default) if default else None, len(ids), limits, param)
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_of(body, served.default_sampling, limits, max_tokens=most, logprobs=num_top)
    identity, number = new_id("chatcmpl"), served.next_number()
    asked = []
    for index in range(body.n):
        seeded = sampling if body.seed is None else replace(sampling, seed=body.seed + index)
        asked.append(asked_of(body, Request(f"{number}-{index}", ids, seeded), index, compiled))
    if tools.form is not None:
        kept = marks_of(tools.form, served.model.vocabulary)
        asked = [replace(one, keep=kept) for one in asked]
    names = shown.TokenNames(served.model.vocabulary, by_id=body.return_tokens_as_token_ids)
    warnings = (*warnings_of(body), *(compiled.notes if compiled else ()))
    return Job(body, identity, name, tools, tuple(asked), warnings, names)


def _choice(job: Job, whole: Whole, index: int) -> JsonObject:
    assert whole.last is not None
    text = whole.text
    calls: tuple[Call, ...] = ()
    if job.tools.form is not None:
        reader = CallReader(job.tools.form, only_one=job.tools.only_one)
        first, rest = reader.add(text), reader.finish()
        text, calls = first.text + rest.text, (*first.calls, *rest.calls)
    elif job.tools.mode == "named":
        text, calls = "", (Call(job.tools.name, text),)
    elif job.tools.mode == "required":
        text, calls = "", tuple(CallList().add(text))
    message: JsonObject = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls:
        message["tool_calls"] = [_call_json(call) for call in calls]
    choice: JsonObject = {
        "index": index,
        "message": message,
        "logprobs": None,
        "finish_reason": _finish(job, whole.last, len(calls)),
        "stop_reason": whole.last.stop_reason,
        **guided_json(whole.last.verdict),
    }
    if job.body.logprobs:
        choice["logprobs"] = shown.of_chat(whole.tokens, job.names, job.body.top_logprobs or 0)
    if job.body.return_token_ids:
        choice["token_ids"] = [token.id for token in whole.tokens]
    return choice


def _finish(job: Job, last: Piece, num_calls: int) -> str:
    """Return the word for how an answer ended. After a function that had to be called it is `stop`, as with OpenAI."""
    is_call = last.finish == "stop" and num_calls > 0 and job.tools.mode != "named"
    return "tool_calls" if is_call else str(last.finish)


def _call_json(call: Call) -> JsonObject:
    function = {"name": call.name, "arguments": call.arguments}
    # Nine letters and digits: some chat templates refuse all other ids when the call comes back.
    return {"id": uuid.uuid4().hex[:9], "type": "function", "function": function}


class _ChatWriter(Writer):
    """Writes pieces as events."""

    def __init__(self, job: Job) -> None:
        self.options, self.warnings, self.num_answers = job.body.stream_options, job.warnings, len(job.asked)
        self._job = job
        self._head = head_of("chat.completion.chunk", job.identity, job.name)
        self._answers = [_Answer(job) for _ in job.asked]

    def chunk(self, choices: list[JsonObject]) -> JsonObject:
        """Return a chunk with some choices."""
        return {**self._head, "choices": choices}

    def begin(self) -> list[JsonObject]:
        """Return what comes before all pieces: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(self.num_answers)
        ]

    def choices(self, piece: Piece) -> list[JsonObject]:
        """Return a piece as choices of chunks."""
        body, answer = self._job.body, self._answers[piece.index]
        deltas = answer.deltas(piece)
        if not deltas and (piece.finish or (piece.tokens and (body.logprobs or body.return_token_ids))):
            deltas = [{}]
        choices: list[JsonObject] = [
            {"index": piece.index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if choices and body.logprobs and piece.tokens:
            choices[0]["logprobs"] = shown.of_chat(piece.tokens, self._job.names, body.top_logprobs or 0)
        if choices and body.return_token_ids:
            choices[0]["token_ids"] = [token.id for token in piece.tokens]
        if piece.finish:
            end = {"finish_reason": _finish(self._job, piece, answer.num_calls), "stop_reason": piece.stop_reason}
            choices[-1] |= {**end, **guided_json(piece.verdict)}
        return choices


class _Answer:
    """One streamed answer: what of it was sent."""

    def __init__(self, job: Job) -> None:
        self._tools = job.tools
        self._reader = CallReader(job.tools.form, only_one=job.tools.only_one) if job.tools.form else None
        self._list = CallList()
        self.num_calls = 0

    def deltas(self, piece: Piece) -> list[JsonObject]:
        """Return what is to be sent of a piece."""
        if self._reader is not None:
            read = self._reader.add(piece.text)
            rest = self._reader.finish() if piece.finish else None
            text, calls = read.text + (rest.text if rest else ""), [*read.calls, *(rest.calls if rest else ())]
            return [*([{"content": text}] if text else []), *(self._call(call) for call in calls)]
        if self._tools.mode == "named":
            if not self.num_calls:
                return [self._call(Call(self._tools.name, piece.text))]
            function = {"arguments": piece.text}
            return [{"tool_calls": [{"index": 0, "function": function}]}] if piece.text else []
        if self._tools.mode == "required":
            return [self._call(call) for call in self._list.add(piece.text)]
        return [{"content": piece.text}] if piece.text else []

    def _call(self, call: Call) -> JsonObject:
        index, self.num_calls = self.num_calls, self.num_calls + 1
        return {"tool_calls": [{"index": index, **_call_json(call)}]}
