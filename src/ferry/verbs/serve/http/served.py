"""What all routes share: the model that is served, its engine, the gate before it, and a request's way through them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ferry.core.errors import FerryError, UnavailableError, did_you_mean
from ferry.engines.engine import Engine
from ferry.engines.text import TextModel
from ferry.guided.compiling import DEFAULT_TIME_LIMIT_S, Compiled, Compiler, tokenizer_of
from ferry.guided.request import Constraint
from ferry.verbs.serve.http.answering import Asked, Piece, answer, closing, together
from ferry.verbs.serve.http.errors import ApiError, as_api_error, busy
from ferry.verbs.serve.http.gate import Gate
from ferry.verbs.serve.http.measures import Measures
from ferry.verbs.serve.http.sampling import Limits, too_long

COMPILING_THREADS = 4
LONG_TEXT = 20_000
"""Characters from which on texts are made tokens of on a thread."""


@dataclass(frozen=True)
class HttpSettings:
    """What the front end is told."""

    names: tuple[str, ...]
    """What requests may call the model."""
    shown_names: tuple[str, ...]
    """Those of them that are shown; never a path of this machine."""
    api_keys: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()
    """Hosts that requests may be sent to, and the pages they may come from; none: any."""
    max_queue: int = 256
    max_num_seqs: int = 64
    spare_places: int = 8
    """Answers handed to the engine beyond what it works at: they are at hand when one ends."""
    max_body_bytes: int = 8_000_000
    guided_time_limit_s: float = DEFAULT_TIME_LIMIT_S
    request_timeout_s: float | None = None
    unread_s: float = 60.0
    """A client that takes nothing of a stream for so long has gone, whatever its connection says."""
    log_requests: bool = False


def _silent(name: str, fields: Mapping[str, Any]) -> None:
    return None


@dataclass
class Served:
    """A model being served. Made before its engine is ready; closed after it."""

    engine: Engine
    model: TextModel
    settings: HttpSettings
    default_sampling: Mapping[str, float] = field(default_factory=dict)
    note: Callable[[str, Mapping[str, Any]], None] = _silent
    """Is told what an operator should know."""
    measures: Measures = field(default_factory=Measures)
    created: int = field(default_factory=lambda: int(time.time()))
    num_asked: int = 0
    """Requests so far. Servers before one engine must not number requests alike."""

    def __post_init__(self) -> None:
        self.gate = Gate(self.settings.max_num_seqs + self.settings.spare_places, self.settings.max_queue)
        self.begun_s = self.measures.clock()
        self._compiler: asyncio.Task[Compiler] | None = None

    @property
    def limits(self) -> Limits:
        """The bounds of the model, once its engine was ready."""
        info = self.engine.info
        return Limits(info.max_model_len, info.num_tokens, self.model.end_token_ids)

    def next_number(self) -> int:
        """Return what the engine calls a request: the same ones in the same order have the same names, and so seeds."""
        self.num_asked += 1
        return self.num_asked

    def name_of(self, asked: str | None) -> str:
        """Return the name to answer with, or the error for a model that is not here."""
        if not asked:
            return self.settings.shown_names[0]
        if asked in self.settings.names:
            return asked
        shown = list(self.settings.shown_names)
        raise ApiError(
            404,
            f"the model {asked!r} does not exist{did_you_mean(asked, shown)}; this server has {', '.join(shown)}",
            param="model",
            code="model_not_found",
        )

    def check_open(self) -> None:
        """Refuse a request that could not be answered now."""
        try:
            self.gate.check()
            condition = self.engine.condition
            if condition.state != "ready":
                reason = condition.reason or "it is being loaded"
                raise busy(503, f"the engine is not ready ({condition.state}): {reason}", code="engine.not-ready")
        except ApiError as error:
            self.measures.rejections.add(error.code)
            raise

    def warm_up(self, num_tokens: int) -> None:
        """Make the compiler of grammars before the first request needs it, while there is nothing else to do."""
        if self._compiler is None and num_tokens:
            self._compiler = asyncio.create_task(asyncio.to_thread(self._make_compiler, num_tokens))
            self._compiler.add_done_callback(_looked_at)

    async def compiled(self, constraint: Constraint | None) -> Compiled | None:
        """Return a constraint as a grammar. Equal ones are compiled once; a client that goes away stops nothing."""
        if constraint is None:
            return None
        compiler = await self._ready_compiler()
        begun_s = self.measures.clock()
        future = asyncio.wrap_future(compiler.submit(constraint))
        future.add_done_callback(_looked_at)
        try:
            compiled = await asyncio.shield(future)
        except FerryError as error:
            raise as_api_error(error, constraint.field) from error
        self.measures.compiling.observe(self.measures.clock() - begun_s)
        return compiled

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool, most_tokens: int | None, param: str
    ) -> list[list[int]]:
        """Return the tokens of some texts; of much text without stopping the others.

        One that could not be of `most_tokens`, whatever its tokens are, is refused at once.
        """
        if sum(map(len, texts)) < LONG_TEXT:
            return [self.model.encode(text, add_special_tokens) for text in texts]
        return await asyncio.to_thread(self._encode, texts, add_special_tokens, most_tokens, param)

    def _encode(
        self, texts: Sequence[str], add_special_tokens: bool, most_tokens: int | None, param: str
    ) -> list[list[int]]:
        longest_bytes = self.model.vocabulary.longest_bytes
        if most_tokens is not None and longest_bytes:
            size = max(len(text.encode("utf-8")) for text in texts)
            if size > most_tokens * longest_bytes:
                raise too_long(f"at least {-(-size // longest_bytes):,} tokens", most_tokens, param)
        return self.model.encode_all(texts, add_special_tokens)

    async def run(self, wanted: Sequence[Asked], came_s: float, num_prompt_tokens: int) -> AsyncIterator[Piece]:
        """Return what is new of any of the answers of one request, from its coming in on."""
        self.check_open()  # the queue may have filled while the request was understood
        num_open = len(wanted)
        answers = [answer(self.engine, self.model, asked, self.measures, came_s) for asked in wanted]
        timeout_s = self.settings.request_timeout_s
        try:
            async with self.gate.visit(len(wanted), self.measures.queue.observe) as visit:
                self.measures.prompt_tokens.add(amount=num_prompt_tokens)
                pieces = together(visit, answers)
                async with closing(pieces if timeout_s is None else _in_time(pieces, came_s + timeout_s)) as found:
                    async for piece in found:
                        num_open -= piece.finish is not None
                        self._count(piece)
                        yield piece
        except BaseException as error:
            if num_open:
                self.measures.cut.add(_why_cut(error), amount=num_open)
            raise
        finally:
            self.measures.whole.observe(self.measures.clock() - came_s)

    def problem(self, error: Exception, request_id: str) -> ApiError:
        """Return any error as an answer; a defect of ours is told to the operator, not to the client."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, FerryError):
            return as_api_error(error)
        import traceback

        self.note("defect", {"request_id": request_id, "traceback": "".join(traceback.format_exception(error))})
        return ApiError(500, f"a defect of this server ({type(error).__name__}); it is in its log", code="internal")

    async def close(self) -> None:
        """End the threads that compile grammars."""
        if self._compiler is not None:
            await asyncio.wait((self._compiler,))
            if self._compiler.exception() is None:
                await asyncio.to_thread(self._compiler.result().close)

    async def _ready_compiler(self) -> Compiler:
        """Return the compiler for what the engine turned out to be."""
        self.warm_up(self.limits.num_tokens)
        making = self._compiler
        assert making is not None
        compiler = await asyncio.shield(making)
        if compiler.num_tokens == self.limits.num_tokens:
            return compiler
        # config.json promised another width than the engine has. Nothing was compiled yet.
        compiler.close()
        if self._compiler is making:
            self._compiler = None
        return await self._ready_compiler()

    def _make_compiler(self, num_tokens: int) -> Compiler:
        ends = [token for token in self.model.end_token_ids if token < num_tokens]
        try:
            tokenizer = tokenizer_of(self.model.vocabulary.source, num_tokens, ends)
        except ModuleNotFoundError as error:
            raise UnavailableError(
                f"guided decoding needs {error.name}, which is not installed",
                code="guided.missing",
                repair="pip install 'llmferry[serve]'",
            ) from error
        # A constraint that is dear to compile must not hold up the others.
        return Compiler(tokenizer, time_limit_s=self.settings.guided_time_limit_s, num_threads=COMPILING_THREADS)

    def _count(self, piece: Piece) -> None:
        measures = self.measures
        measures.generated_tokens.add(amount=piece.num_generated)
        measures.cached_tokens.add(amount=piece.num_cached)
        if piece.finish:
            measures.answers.add(piece.finish)
        if piece.verdict is not None:
            verdict = "valid" if piece.verdict.valid else "cut" if piece.verdict.cut else "broken"
            measures.guided.add(verdict)
            if verdict == "broken":
                self.note("broken promise", {"reason": piece.verdict.reason, "pointer": piece.verdict.pointer})


def new_id(kind: str) -> str:
    """Return the id of a new answer."""
    return f"{kind}-{uuid.uuid4().hex}"


async def _in_time(pieces: AsyncIterator[Piece], deadline_s: float) -> AsyncIterator[Piece]:
    async with closing(pieces) as open_pieces:
        while True:
            try:
                piece = await asyncio.wait_for(open_pieces.__anext__(), max(deadline_s - time.monotonic(), 0))
            except StopAsyncIteration:
                return
            except asyncio.TimeoutError:
                raise busy(503, "the request took longer than this server allows", code="serve.timeout") from None
            yield piece


def _why_cut(error: BaseException) -> str:
    """Return what ended an answer before its end, in a word."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "client"
    return error.code if isinstance(error, FerryError) else "internal"


def _looked_at(future: asyncio.Future[Any]) -> None:
    """Take the error of work that nobody waits for any more."""
    if not future.cancelled():
        future.exception()
