"""Which worker has been silent for too long, which of them is stuck, and what it was doing.

In a collective all ranks wait when one does. The stuck one is the one that cannot answer a signal, else the one that is
furthest behind.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from ferry.verbs.train.crew import stacks
from ferry.verbs.train.crew.board import PHASES, Board
from ferry.verbs.train.crew.hands import Hand
from ferry.verbs.train.crew.patience import limit_s
from ferry.verbs.train.crew.spec import CrewSpec, Failure

_FREEZE_S = 2.0
"""A gap between two looks that is longer than this was a sleep of the machine, or of the supervisor."""


class Watch:
    """Looks at the beats of one generation."""

    def __init__(self, spec: CrewSpec, board: Board) -> None:
        self.spec = spec
        self.board = board
        self._suspect: Hand | None = None
        self._freezes: deque[tuple[int, float]] = deque(maxlen=64)
        """Gaps between looks: when each ended, and how long it was."""

    def note_gap(self, gap_s: float) -> None:
        if gap_s > _FREEZE_S:
            self._freezes.append((time.monotonic_ns(), gap_s))

    def hung(self, hands: Sequence[Hand]) -> Hand | None:
        """Return a worker that is too late in two looks, one after the other."""
        late = [hand for hand in hands if hand.exit_code is None and self.silence_s(hand) > self.limit_s(hand)]
        is_sure = bool(late) and late[0] is self._suspect
        self._suspect = late[0] if late else None
        return self._suspect if is_sure else None

    def silence_s(self, hand: Hand) -> float:
        since_ns = self.board.read(hand.row).progress_ns
        excused_s = sum(gap_s for end_ns, gap_s in self._freezes if end_ns > since_ns)
        return (time.monotonic_ns() - since_ns) / 1e9 - excused_s

    def limit_s(self, hand: Hand) -> float:
        return limit_s(self.board.read(hand.row), self.spec)

    def describe(self, seen: Hand, hands: Sequence[Hand]) -> tuple[Failure, dict[str, Any]]:
        """Ask all workers for their stacks; return the failure and the fields of the event `hang`."""
        limit, silence_s = self.limit_s(seen), self.silence_s(seen)
        alive = [hand for hand in hands if hand.exit_code is None]
        findings = stacks.find({hand.pid: hand.stacks for hand in alive})

        def answered_and_got_far(hand: Hand) -> tuple[bool, int, int]:
            beat = self.board.read(hand.row)
            return bool(findings[hand.pid].stack), beat.step, beat.progress_ns

        stuck = min(alive, key=answered_and_got_far)
        beat, finding = self.board.read(stuck.row), findings[stuck.pid]
        phase = PHASES[beat.phase]
        state = f", state {finding.state}" if finding.state else ""
        failure = Failure(
            code="train.hang",
            message=f"rank {stuck.rank} made no progress for {silence_s:.1f} s in step {beat.step} ({phase}{state}; "
            f"the limit is {limit:.1f} s)",
            repair="the event `hang` in events.jsonl has the stacks of all ranks",
            rank=stuck.rank,
            step=beat.step,
            traceback=finding.stack,
        )
        fields = {"rank": stuck.rank, "step": beat.step, "phase": phase}
        fields |= {"silence_s": round(silence_s, 3), "limit_s": round(limit, 3)}
        return failure, {**fields, "stacks": {hand.rank: findings[hand.pid]._asdict() for hand in alive}}
