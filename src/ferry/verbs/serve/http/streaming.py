"""Answers as they are made: server-sent events, in the order and form that clients of OpenAI read.

Nothing is sent before the engine has begun, so a refusal has its status. An error after that is an event, and no
`[DONE]` follows it. What the request cost is in the last event.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferry.verbs.serve.http.answering import Piece, closing
from ferry.verbs.serve.http.bodies import StreamOptions
from ferry.verbs.serve.http.errors import body_of
from ferry.verbs.serve.http.events import DONE, EventStream, event, while_connected
from ferry.verbs.serve.http.gathering import Usage, warned
from ferry.verbs.serve.http.served import Served

JsonObject = dict[str, Any]


class Writer(Protocol):
    """How one way to ask writes its chunks."""

    options: StreamOptions | None
    warnings: Sequence[str]
    num_answers: int

    @abstractmethod
    def chunk(self, choices: list[JsonObject]) -> JsonObject: ...

    @abstractmethod
    def begin(self) -> list[JsonObject]: ...

    @abstractmethod
    def choices(self, piece: Piece) -> list[JsonObject]: ...


async def stream(
    served: Served, request: HttpRequest, pieces: AsyncIterator[Piece], writer: Writer, usage: Usage
) -> Response:
    """Return the response that streams some pieces, once the first of them is there."""
    try:
        first = await while_connected(request, _next(pieces))
    except BaseException:
        async with closing(pieces):
            raise
    return EventStream(
        _events(served, str(request.state.request_id), first, pieces, writer, usage), served.settings.unread_s
    )


async def _next(pieces: AsyncIterator[Piece]) -> Piece:
    return await pieces.__anext__()


async def _events(
    served: Served, request_id: str, first: Piece, pieces: AsyncIterator[Piece], writer: Writer, usage: Usage
) -> AsyncIterator[bytes]:
    with_usage = writer.options is not None and writer.options.include_usage
    blank: JsonObject = {"usage": None} if with_usage else {}
    num_open = writer.num_answers
    try:
        async with closing(pieces):
            for choice in writer.begin():
                yield event({**writer.chunk([choice]), **blank})
            async for piece in _chained(first, pieces):
                usage.add(piece)
                num_open -= piece.finish is not None
                choices = writer.choices(piece)
                for index, choice in enumerate(choices):
                    is_last = not num_open and index == len(choices) - 1 and not with_usage
                    end = {"usage": usage.to_json(), **warned(writer.warnings)} if is_last else blank
                    yield event({**writer.chunk([choice]), **end})
    except Exception as error:  # noqa: BLE001 - the border of the server: the client is told, the operator too
        yield event(body_of(served.problem(error, request_id), request_id), "error")
        return
    if with_usage:
        yield event({**writer.chunk([]), "usage": usage.to_json(), **warned(writer.warnings)})
    yield DONE


async def _chained(first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    yield first
    async for piece in rest:
        yield piece
