"""What a verb may say while it works. The library never prints: it tells a reporter, and the command line decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Reporter:
    """Says nothing. The command line's reporter shows progress and writes events to the run record."""

    @property
    def is_watched(self) -> bool:
        """Whether a person sees what is said: not from Python, nor with --quiet or --json."""
        return False

    def event(self, name: str, /, **fields: Any) -> None:
        """Note one fact: a choice made, a file done, a check passed. Fields are JSON values."""

    def start(self, label: str, total: int, unit: str = "bytes", done: int = 0) -> None:
        """Begin a long piece of work of known size. `unit` is a plural: bytes, steps, rows. `done` was done before."""

    def advance(self, amount: int) -> None:
        """Say that so much more is done. May be called from several threads."""

    def status(self, text: str, curve: Sequence[float] = ()) -> None:
        """Show a few words beside the progress of the work begun last, and the latest of a number as a small curve."""

    def finish(self) -> None:
        """End the piece of work begun last."""

    def say(self, text: str) -> None:
        """Show a person one line that stays. For milestones of long work, not for details."""
