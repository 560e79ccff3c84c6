"""What is left on the screen after `ferry chat`, and its exit status."""

from __future__ import annotations

from ferry.core.errors import GateError
from ferry.core.verb import Result
from ferry.verbs.chat.screen import facts
from ferry.verbs.chat.session import Answer


def report(result: Result) -> str:
    """Return the answer, or, where it was shown already, a line about it."""
    if result["answer"] is None:
        count = len(result["answers"])
        return f"{count} answer{'' if count == 1 else 's'} by {result['model']}"
    text: str = result["answer"]
    if not result["shown"]:
        return text
    measured = (result[name] for name in ("finish_reason", "usage", "guided", "seconds_to_first", "seconds"))
    return facts(Answer(text, *measured))


def exit_status(result: Result) -> int:
    """Return 8 for one answer that does not keep its schema."""
    guided = result.get("guided")
    return GateError.exit_status if guided and not guided["valid"] else 0
