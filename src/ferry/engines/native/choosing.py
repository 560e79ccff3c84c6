"""How one answer's next token is chosen: biases, penalties, the grammar's mask, then the likeliest token or a draw.
Where only the likeliest is wanted and the grammar allows it, nothing else is looked at.

`request.py` has the order and the meaning. What stays the same is made once for an answer; what grows with it, the
counts of its tokens, grows token by token.
"""

from __future__ import annotations

import numpy as np

from ferry.engines.native.guides import Guide
from ferry.engines.native.sampler import Float32, Int64, draw, seed_of, uniform
from ferry.engines.request import Request

NEVER = np.float32(-np.inf)
COLD = 1e-5
"""Below this temperature the likeliest token is taken."""


class Stuck(Exception):
    """No token may come next, and the answer may not end."""


class Chooser:
    """The choices of one answer. `guide` is set when its grammar is compiled."""

    def __init__(self, request: Request, num_tokens: int, engine_seed: int) -> None:
        sampling = request.sampling
        self.guide: Guide | None = None
        self._sampling = sampling
        self._seed = seed_of(request.id, engine_seed) if sampling.seed is None else sampling.seed
        self._ends = np.array([token for token in sampling.end_token_ids if token < num_tokens], np.int64)
        self._biased = np.array([token for token in sampling.logit_bias if token < num_tokens], np.int64)
        self._biases = np.array([sampling.logit_bias[int(token)] for token in self._biased], np.float32)
        self._counts = _Counts() if sampling.frequency_penalty or sampling.presence_penalty else None
        self._seen: _Counts | None = None
        if sampling.repetition_penalty != 1:
            self._seen = _Counts()
            for token in request.prompt_ids:
                self._seen.add(token)
        self._is_changed = bool(len(self._biased) or self._counts or self._seen or sampling.min_tokens)
        """Whether anything but a grammar comes between the model's logits and the choice."""

    def choose(self, row_V: Float32, likeliest: int, num_answer: int, scratch_V: Float32) -> int:
        """Return the next token. The row, whose likeliest token is known, stays as it is."""
        guide, sampling = self.guide, self._sampling
        is_greedy = sampling.temperature < COLD
        if not self._is_changed and is_greedy and (guide is None or guide.allows(likeliest)):
            return likeliest
        if not self._is_changed and is_greedy and guide is not None:
            allowed = guide.likeliest(row_V)
            if allowed is None:
                raise Stuck
            return allowed
        best, values_V = likeliest, row_V
        if self._is_changed or guide is not None:
            best, values_V = self._change(row_V, num_answer, scratch_V), scratch_V
            if is_greedy:
                return best
        np.subtract(values_V, values_V[best], out=scratch_V)
        np.multiply(scratch_V, np.float32(1 / sampling.temperature), out=scratch_V)
        number = uniform(self._seed, num_answer)
        return draw(scratch_V, number, min_p=sampling.min_p, top_k=sampling.top_k, top_p=sampling.top_p)

    def take(self, token: int) -> None:
        """Go on with a token of the answer, which is no end."""
        if self.guide is not None:
            self.guide.take(token)
        if self._counts is not None:
            self._counts.add(token)
        if self._seen is not None:
            self._seen.add(token)

    def _change(self, row_V: Float32, num_answer: int, scratch_V: Float32) -> int:
        """Copy the row with all that comes before temperature applied, and return the likeliest token then."""
        np.copyto(scratch_V, row_V)
        if len(self._biased):
            scratch_V[self._biased] += self._biases
        self._penalise(scratch_V)
        if self.guide is not None:
            self.guide.limit(scratch_V)
        if num_answer < self._sampling.min_tokens and len(self._ends):
            self._keep_from_ending(scratch_V)
        best = int(scratch_V.argmax())
        if scratch_V[best] == NEVER:
            raise Stuck
        return best

    def _keep_from_ending(self, row_V: Float32) -> None:
        """Forbid the ends, unless nothing else is left: a grammar that is at its end does end."""
        values = row_V[self._ends]
        row_V[self._ends] = NEVER
        if row_V.max() == NEVER:
            row_V[self._ends] = values

    def _penalise(self, row_V: Float32) -> None:
        sampling = self._sampling
        if self._seen is not None:
            ids, _ = self._seen.arrays()
            values, penalty = row_V[ids], np.float32(sampling.repetition_penalty)
            row_V[ids] = np.where(values < 0, values * penalty, values / penalty)
        if self._counts is not None:
            ids, counts = self._counts.arrays()
            row_V[ids] -= np.float32(sampling.frequency_penalty) * counts + np.float32(sampling.presence_penalty)


class _Counts:
    """How often each token came, as arrays that grow."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._ids: Int64 = np.zeros(64, np.int64)
        self._counts: Float32 = np.zeros(64, np.float32)

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1

    def arrays(self) -> tuple[Int64, Float32]:
        return self._ids[: len(self._places)], self._counts[: len(self._places)]
