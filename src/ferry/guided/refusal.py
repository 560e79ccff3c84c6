"""The error of guided decoding: what was asked, where, and why it cannot be promised."""

from __future__ import annotations

from ferry.core.errors import ConfigError


class Refusal(ConfigError):
    """A constraint that is wrong, or that cannot be kept while decoding."""

    def __init__(self, message: str, *, code: str, repair: str = "", keyword: str = "", pointer: str = "") -> None:
        super().__init__(message, code=code, repair=repair)
        self.keyword = keyword
        self.pointer = pointer


def wrong_schema(keyword: str, pointer: str, message: str) -> Refusal:
    """Return the error for a schema that is not one."""
    text = f"{keyword!r} at {pointer or '#'} {message}" if keyword else f"schema at {pointer or '#'} {message}"
    return Refusal(text, code="guided.schema", keyword=keyword, pointer=pointer)


def cannot_enforce(keyword: str, pointer: str, message: str, repair: str = "") -> Refusal:
    """Return the error for a keyword that no grammar of ours can keep."""
    return Refusal(
        f"{keyword!r} at {pointer or '#'} cannot be enforced while decoding: {message}",
        code="guided.unsupported",
        repair=repair or "leave it out or say it differently",
        keyword=keyword,
        pointer=pointer,
    )
