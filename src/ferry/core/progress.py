"""What a verb may say while it works. The library never prints: it tells a reporter, and the command line decides."""

from __future__ import annotations

from typing import Any


class Reporter:
    """Says nothing. The command line's reporter shows progress and writes events to the run record."""

    def event(self, name: str, /, **fields: Any) -> None:
        """Note one fact: a choice made, a file done, a check passed. Fields are JSON values."""

    def start(self, label: str, total_bytes: int) -> None:
        """Begin a long piece of work of known size in bytes."""

    def advance(self, num_bytes: int) -> None:
        """Say that so many bytes more are done. May be called from several threads."""

    def finish(self) -> None:
        """End the piece of work begun last."""

    def say(self, text: str) -> None:
        """Show a person one line that stays. For milestones of long work, not for details."""
