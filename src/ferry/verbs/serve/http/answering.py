"""One answer: tokens from the engine become text, until the engine, a stop text or the client ends it.

Several answers of one request run side by side; what is new of any of them comes out in the order it was made. Whoever
stops listening cancels them all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from ferry.engines.engine import Engine
from ferry.engines.request import Output, Request, TokenLogprobs
from ferry.engines.text import Detokenizer, StopTexts, TextModel
from ferry.guided.compiling import Compiled
from ferry.guided.validate import Verdict, check
from ferry.verbs.serve.http.errors import busy, of_engine
from ferry.verbs.serve.http.gate import Visit
from ferry.verbs.serve.http.measures import Measures

End = Literal["stop", "length"]


@dataclass(frozen=True)
class Asked:
    """One answer that is wanted, and how its text is made."""

    request: Request
    index: int
    """The place of the answer among the choices."""
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    own_stop_ids: frozenset[int] = frozenset()
    """Tokens that the request, not the model, says end an answer."""
    skip_special_tokens: bool = True
    keep: frozenset[int] = frozenset()
    """Special tokens that stay in the text in any case."""
    compiled: Compiled | None = None


@dataclass(frozen=True)
class Token:
    """A token of an answer and the text that it completed."""

    id: int
    text: str
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Piece:
    """What is new of one answer. The last one has a `finish`."""

    index: int
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish: End | None = None
    stop_reason: str | int | None = None
    verdict: Verdict | None = None
    num_generated: int = 0
    """Tokens of this piece, an end token included."""
    num_cached: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass
class _Progress:
    """An answer so far."""

    detokenizer: Detokenizer
    stops: StopTexts
    ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


async def answer(
    engine: Engine, model: TextModel, asked: Asked, measures: Measures, came_s: float
) -> AsyncIterator[Piece]:
    """Return what is new of one answer, until it ends. Closing the iterator cancels it in the engine."""
    progress = _Progress(
        model.detokenizer(skip_special_tokens=asked.skip_special_tokens, keep=asked.keep),
        StopTexts(asked.stops, include=asked.include_stop),
    )
    last_s = None
    async with closing(engine.generate(asked.request)) as outputs:
        async for output in outputs:
            if output.finish == "error":
                raise of_engine(output.error_code, output.error_message)
            if output.finish == "cancelled":
                raise busy(503, "the server is stopping", code="serve.stopping")
            now_s = measures.clock()
            num_tokens = len(output.token_ids)
            if last_s is None and (num_tokens or output.finish):
                measures.first_token.observe(now_s - came_s)
            elif last_s is not None and num_tokens:
                measures.between_tokens.observe((now_s - last_s) / num_tokens, num_tokens)
            last_s = now_s if num_tokens else last_s
            piece = _piece(model, asked, progress, output)
            if piece.finish:
                yield await _judged(model, asked, progress, piece)
                return
            yield piece
    raise of_engine("engine.failed", "the engine ended an answer without saying why")


def _piece(model: TextModel, asked: Asked, progress: _Progress, output: Output) -> Piece:
    """Return an output of the engine as text, up to the stop text if there is one in it."""
    tokens, texts, stop = [], [], None
    for position, token_id in enumerate(output.token_ids):
        written = progress.detokenizer.add((token_id,))
        progress.ids.append(token_id)
        is_early = len(progress.ids) <= asked.request.sampling.min_tokens
        cut = progress.stops.pass_by(written) if is_early else progress.stops.add(written)
        texts.append(cut.text)
        tokens.append(Token(token_id, written, output.logprobs[position] if output.logprobs else None))
        stop = cut.stop
        if stop is not None:
            break
    finish, reason = _end(output, asked, stop)
    if finish and stop is None:
        texts.append(progress.stops.finish())
        if asked.include_stop and isinstance(reason, int):
            texts.append(progress.detokenizer.add((reason,)))
    text = "".join(texts)
    progress.text.append(text)
    return Piece(
        asked.index,
        text,
        tuple(tokens),
        finish,
        reason,
        num_generated=len(tokens) + (output.end_token_id is not None and stop is None),
        num_cached=output.num_cached_tokens,
        prompt_logprobs=output.prompt_logprobs,
    )


def _end(output: Output, asked: Asked, stop: str | None) -> tuple[End | None, str | int | None]:
    """Return how an answer ended, if it did, and by what that the request named."""
    if stop is not None:
        return "stop", stop
    if output.finish == "stop":
        return "stop", output.end_token_id if output.end_token_id in asked.own_stop_ids else None
    return ("length", None) if output.finish == "length" else (None, None)


async def _judged(model: TextModel, asked: Asked, progress: _Progress, piece: Piece) -> Piece:
    """Return the last piece with the verdict on the whole answer, if it was under a constraint."""
    if asked.compiled is None:
        return piece
    was_stopped = piece.stop_reason is not None
    # Special tokens may be part of a grammar, so they are part of what is judged.
    whole = "".join(progress.text) if was_stopped else model.decode(progress.ids, skip_special_tokens=False)
    is_cut = piece.finish == "length"
    ids = None if was_stopped else progress.ids
    verdict = await asyncio.to_thread(check, asked.compiled, whole, cut=is_cut, tokens=ids)
    if was_stopped and not verdict.valid:
        verdict = Verdict(False, f"cut off by {piece.stop_reason!r}: {verdict.reason}", verdict.pointer, cut=True)
    return Piece(**{**vars(piece), "verdict": verdict})


async def together(visit: Visit, answers: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[Piece]:
    """Return what is new of any of some answers, each of which waits for its place in the engine."""
    if len(answers) == 1:
        async with closing(answers[0]) as pieces, visit.place():
            async for piece in pieces:
                yield piece
        return
    # Bounded: a client that reads slowly makes its own answers wait, and no one else's.
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(maxsize=64)
    tasks = [asyncio.create_task(_pump(visit, one, queue)) for one in answers]
    try:
        num_running = len(tasks)
        while num_running:
            found = await queue.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                num_running -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(visit: Visit, pieces: AsyncIterator[Piece], queue: asyncio.Queue[Piece | BaseException | None]) -> None:
    try:
        async with closing(pieces) as open_pieces, visit.place():
            async for piece in open_pieces:
                await queue.put(piece)
    except Exception as error:  # noqa: BLE001 - it is raised again where the pieces are read
        await queue.put(error)
    else:
        await queue.put(None)


@asynccontextmanager
async def closing(iterator: AsyncIterator[Any]) -> AsyncIterator[AsyncIterator[Any]]:
    """Close an iterator at the end, wherever it stands; plain iterators have nothing to close."""
    try:
        yield iterator
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()
