"""The huggingface_hub package as Ferry uses it: where the hub is, what its errors are, its bars kept quiet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ferry.core.errors import UnavailableError


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_true(text: str | None) -> bool:
    return (text or "").upper() in ("1", "ON", "YES", "TRUE")


def import_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UnavailableError(
            "reading from a hub needs the package huggingface_hub",
            code="hub.package",
            repair="pip install 'llmferry[pull]'",
        ) from None
    return huggingface_hub


def network_errors(hub: Any) -> tuple[type[Exception], ...]:
    """Return what the client's HTTP library raises: requests' errors are OSErrors, httpx' have a base of their own."""
    return (hub.errors.HfHubHTTPError.__mro__[1], OSError)


def reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def no_progress_bars(hub: Any) -> Iterator[None]:
    """Progress is the reporter's; the client's own bars stay off meanwhile."""
    were_off = hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            hub.utils.enable_progress_bars()
