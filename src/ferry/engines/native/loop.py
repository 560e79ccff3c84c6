"""The native engine as one object: requests in, and with each step what is new of them. No threads of its own but those
that compile grammars; no clock; a step does all there is to do, and returns.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING

import numpy as np

from ferry.core.errors import FerryError, InputError, UnavailableError
from ferry.engines.engine import EngineInfo, EngineSettings
from ferry.engines.native.choosing import Chooser, Stuck
from ferry.engines.native.executor import Executor, open_executor
from ferry.engines.native.guides import Guides
from ferry.engines.native.memory import memory_now, room
from ferry.engines.native.sampler import Float32, logprobs_of
from ferry.engines.native.scheduler import Scheduler
from ferry.engines.native.sequence import Sequence
from ferry.engines.request import Finish, Output, Request, Stats, TokenLogprobs

if TYPE_CHECKING:
    from llguidance import LLMatcher

COMPILING_WAIT_S = 0.02
"""A step with nothing but grammars being compiled returns after so long, that new requests may be taken."""


class NativeEngine:
    """Not for use from two threads at once. Close it at the end."""

    def __init__(self, settings: EngineSettings, executor: Executor | None = None) -> None:
        self._settings = settings
        executor = executor if executor is not None else open_executor(settings)
        self._executor: Executor | None = executor
        self._room = room(executor, settings, memory_now())
        executor.allocate(self._room.num_blocks)
        self.info = self._look(executor)
        """What the engine is and what was chosen."""
        self._scheduler = Scheduler(
            num_blocks=self._room.num_blocks,
            block_size=executor.block_size,
            max_model_len=self._room.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            prefix_caching=settings.prefix_caching,
        )
        self._guides = Guides(settings.model, executor.num_tokens, trust_remote_code=settings.trust_remote_code)
        self._sequences: dict[str, Sequence] = {}
        self._compiling: dict[str, Future[LLMatcher]] = {}
        self._scratch_V: Float32 = np.empty(executor.num_tokens, np.float32)
        self._num_prompt_tokens = self._num_generated_tokens = self._num_steps = 0

    def _look(self, executor: Executor) -> EngineInfo:
        return EngineInfo(
            name="native",
            num_tokens=executor.num_tokens,
            max_model_len=self._room.max_model_len,
            dtype=executor.dtype,
            scheme=executor.scheme,
            kv_cache_tokens=self._room.num_blocks * executor.block_size,
            weights_bytes=executor.weights_bytes,
            threads=executor.threads,
            notes=(*executor.notes, *self._room.notes),
        )

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences)

    def stats(self) -> Stats:
        """Return gauges and counters."""
        scheduler = self._scheduler
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(self._compiling),
            kv_used=scheduler.blocks.num_held / max(1, scheduler.blocks.num_blocks),
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_prefix_queried_tokens=scheduler.num_queried_tokens,
            num_prefix_hit_tokens=scheduler.num_hit_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
        )

    def add(self, request: Request) -> None:
        """Take a request; raise InputError for one that could never be answered."""
        if self._executor is None:
            raise UnavailableError("the engine is closed", code="engine.closed")
        if request.id in self._sequences:
            raise InputError(f"a request {request.id!r} is running already", code="engine.duplicate")
        self._scheduler.check(request)
        num_tokens = self.info.num_tokens
        wrong = [token for token in (min(request.prompt_ids), max(request.prompt_ids)) if not 0 <= token < num_tokens]
        if wrong:
            raise InputError(f"the model has {num_tokens} tokens, and none is {wrong[0]}", code="engine.token-id")
        chooser = Chooser(request, num_tokens, self._settings.seed)
        sequence = self._sequences[request.id] = Sequence(request, chooser, self._room.max_model_len)
        if request.grammar:
            self._compiling[request.id] = self._guides.submit(request.grammar)
        else:
            self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> bool:
        """Forget a request, at any moment between steps; False where there is none."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        if self._compiling.pop(request_id, None) is None:
            self._scheduler.remove(sequence)
        return True

    def step(self) -> list[Output]:
        """Let the model read once, and return what is new. Returns soon where grammars are all there is to wait for."""
        if self._compiling and not self._scheduler.has_work:
            wait(self._compiling.values(), timeout=COMPILING_WAIT_S, return_when=FIRST_COMPLETED)
        outputs = self._join()
        if not self._scheduler.has_work or self._executor is None:
            return outputs
        step = self._scheduler.plan()
        batch = self._scheduler.batch(step)
        rows_RV: Float32 = np.asarray(self._executor.forward(batch))
        self._scheduler.done(step)
        self._num_steps += 1
        # One pass finds the likeliest tokens and, since a NaN counts as the largest, what is not finite.
        best_R = rows_RV.argmax(axis=1)
        is_finite_R = np.isfinite(rows_RV[np.arange(len(best_R)), best_R]).tolist()
        likeliest_R = best_R.tolist()
        end = 0
        for sequence, num_rows in zip(step.sequences, step.num_rows, strict=True):
            start, end = end, end + num_rows
            if not num_rows:
                continue
            if not all(is_finite_R[start:end]):
                outputs.append(self._fail(sequence, "engine.not-finite", self._not_finite()))
                continue
            is_read = not sequence.num_left
            if sequence.prompt_logprobs is not None:
                self._tell_prompt(sequence, rows_RV[start : end - is_read])
            if is_read:
                outputs.append(self._go_on(sequence, rows_RV[end - 1], likeliest_R[end - 1]))
        return outputs

    def close(self) -> None:
        """End what runs beside the loop, and give the memory of the model back. Requests are forgotten."""
        for request_id in list(self._sequences):
            self.cancel(request_id)
        self._guides.close()
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    def _join(self) -> list[Output]:
        """Queue the requests whose grammars are ready."""
        outputs = []
        for request_id in [name for name, future in self._compiling.items() if future.done()]:
            future = self._compiling.pop(request_id)
            sequence = self._sequences[request_id]
            # A defect of the library that compiles is the end of this request alone, not of all that run.
            error = future.exception()
            if error is None:
                ends = sequence.request.sampling.end_token_ids
                sequence.chooser.guide = self._guides.guide(future.result(), ends)
                self._scheduler.add(sequence)
                continue
            del self._sequences[request_id]
            if isinstance(error, FerryError):
                outputs.append(_error(request_id, error.code, str(error)))
            else:
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                outputs.append(_error(request_id, "guided.grammar", f"the grammar cannot be compiled: {said}"))
        return outputs

    def _go_on(self, sequence: Sequence, row_V: Float32, likeliest: int) -> Output:
        """Choose the next token of a sequence and return what is new of it."""
        sampling = sequence.request.sampling
        is_first = not sequence.num_answer
        if is_first:
            self._num_prompt_tokens += sequence.num_prompt
        if not sampling.max_tokens:
            return self._output(sequence, "length")
        try:
            token = sequence.chooser.choose(row_V, likeliest, sequence.num_answer, self._scratch_V)
            if token in sampling.end_token_ids:
                return self._output(sequence, "stop", end_token_id=token)
            finish = self._take(sequence, token)
        except FerryError as error:
            return self._fail(sequence, error.code, str(error))
        except Stuck:
            message = "no token may come next and the answer may not end: the grammar or the biases forbid all of them"
            return self._fail(sequence, "guided.stuck", message)
        self._num_generated_tokens += 1
        logprobs: tuple[TokenLogprobs, ...] = ()
        if sampling.logprobs is not None:
            logprobs = (logprobs_of(row_V, token, sampling.logprobs),)
        if not is_first and finish is None:
            return Output(sequence.request.id, (token,), logprobs)
        return self._output(sequence, finish, (token,), logprobs)

    def _take(self, sequence: Sequence, token: int) -> Finish | None:
        """Add a token to the answer, and say whether it is the last."""
        sequence.append(token)
        sequence.chooser.take(token)
        guide = sequence.chooser.guide
        if guide is not None and guide.is_done:
            return "stop"
        return "length" if sequence.num_tokens == sequence.longest else None

    def _output(
        self,
        sequence: Sequence,
        finish: Finish | None,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        end_token_id: int | None = None,
    ) -> Output:
        """Return a first or a last output; the last one ends the sequence."""
        is_first = sequence.num_answer <= len(token_ids)
        known = sequence.prompt_logprobs if is_first else None
        if finish is not None:
            self.cancel(sequence.request.id)
        return Output(
            sequence.request.id,
            token_ids,
            logprobs,
            finish,
            end_token_id,
            prompt_logprobs=None if known is None else tuple(known),
            num_cached_tokens=sequence.num_cached if is_first else 0,
        )

    def _tell_prompt(self, sequence: Sequence, rows: Float32) -> None:
        """Note how probable the tokens of a prompt were, each from the row before it."""
        known, num_top = sequence.prompt_logprobs, sequence.request.sampling.prompt_logprobs
        assert known is not None
        assert num_top is not None
        for row_V in rows:
            if len(known) < sequence.num_prompt:
                known.append(logprobs_of(row_V, int(sequence.tokens[len(known)]), num_top))

    def _fail(self, sequence: Sequence, code: str, message: str) -> Output:
        self.cancel(sequence.request.id)
        return _error(sequence.request.id, code, message)

    def _not_finite(self) -> str:
        said = f"the model's numbers are not finite in {self.info.dtype} (other servers answer with repeated "
        said += "exclamation marks then); "
        if self.info.dtype != "float32":
            return f"{said}serve it with --dtype float32"
        # Nothing wider is left: the numbers were bad before.
        return (
            f"{said}its weights are damaged (`ferry verify MODEL` tells), or overflowed when they were stored in half "
            "precision, narrower than what it was trained in: take the original ones in bfloat16 or float32"
        )


def _error(request_id: str, code: str, message: str) -> Output:
    return Output(request_id, finish="error", error_code=code, error_message=message)
