"""The terminal of a conversation: words as they come, and lines that are read with arrow keys and history.

What a model writes may hold anything: control characters never reach the terminal.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ferry.verbs.chat.session import Answer

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PROMPT = "> "


class Screen:
    """What a person at a terminal sees."""

    def __init__(self) -> None:
        self._out = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115 - stays open
        self._is_coloured = os.isatty(1) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def write(self, text: str) -> None:
        """Show a piece of an answer at once."""
        self._out.write(_CONTROL.sub("", text))
        self._out.flush()

    def line(self, text: str = "") -> None:
        """Show a line about the conversation, softer than the answers."""
        plain = _CONTROL.sub("", text)
        self._out.write(f"\x1b[2m{plain}\x1b[0m\n" if self._is_coloured and plain else f"{plain}\n")
        self._out.flush()

    def read(self) -> str | None:
        """Return what is typed, nothing at its end (Ctrl-D). A line that ends with a backslash goes on."""
        lines: list[str] = []
        while True:
            try:
                line = input("  " if lines else PROMPT)
            except EOFError:
                self._out.write("\n")
                return None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])


def facts(answer: Answer) -> str:
    """Return one line about an answer: tokens, speed, the verdict."""
    parts = []
    if answer.guided is not None:
        parts.append("valid" if answer.is_kept else f"NOT valid: {answer.guided.get('reason') or 'no reason given'}")
    count = answer.usage.get("completion_tokens")
    if count:
        parts.append(f"{count:,} tokens")
    if answer.rate_tokens_per_s:
        parts.append(f"{answer.rate_tokens_per_s:.3g} tok/s")
    if answer.seconds_to_first:
        parts.append(f"first after {answer.seconds_to_first:.2g} s")
    if answer.finish_reason == "length" and answer.guided is None:
        parts.append("cut by the limit of tokens (a higher max_tokens allows more)")
    if answer.finish_reason == "stopped":
        parts.append("stopped")
    return ", ".join(parts)


@contextmanager
def keys_of_a_conversation() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, and arrow keys find earlier lines, while the block runs."""
    _load_history()
    before: Any = None
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)


def _load_history() -> bool:
    """Say whether this Python has readline: `input` uses it as soon as it is imported."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return False
    return True
