"""The last output of a request that a server behind an engine did not answer: it refused, or it was lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ferry.engines.request import Output, Request

BAD_REQUEST = 400


def failed(request: Request, message: str, code: str = "engine.lost") -> Output:
    """Return the end of a request with an error."""
    return Output(request.id, finish="error", error_code=code, error_message=message)


def refused(request: Request, server: str, error: Mapping[str, Any]) -> Output:
    """Return the end of a request after the `error` that a server sent."""
    text = " ".join(str(error.get("message", error)).split())
    return failed(request, f"{server}: {text}", "engine.request" if error.get("code") == BAD_REQUEST else "engine.lost")


def refused_whole(request: Request, server: str, status: int, body: bytes) -> Output:
    """Return the end of a request that was answered with another status than 200."""
    try:
        error = json.loads(body).get("error")
    except (ValueError, AttributeError):
        error = None
    if not isinstance(error, dict):
        error = {"message": f"status {status}", "code": status}
    return refused(request, server, error)
