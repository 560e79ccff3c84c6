"""The body of a request as JSON: within a size, in UTF-8, an object, and nothing that JSON does not have."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from ferry.verbs.serve.http.errors import ApiError, wrong
from ferry.verbs.serve.http.events import ClientGoneError


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """Return the JSON object in the body of a request."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                raise _too_large(max_bytes)
            parts.append(part)
    except ClientDisconnect:
        raise ClientGoneError from None
    return parse_object(b"".join(parts))


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in some bytes."""
    if not body.strip():
        raise wrong(None, "the body is empty", code="request.json", repair="send a JSON object")
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        if b"\\ud" in body.lower():
            # Half of a surrogate pair is no text, and no tokenizer takes it.
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise wrong(None, f"the body is not Unicode text: {error}", code="request.json") from None
    except ValueError as error:
        raise wrong(None, f"the body is not JSON: {error}", code="request.json") from None
    except RecursionError:
        raise wrong(None, "the body is nested too deeply", code="request.json") from None
    if not isinstance(found, dict):
        raise wrong(None, f"the body is a JSON {_kind(found)}, expected an object", code="request.json")
    return found


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the body has more than {max_bytes:,} bytes", code="request.too_large", repair="send less")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _kind(value: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
