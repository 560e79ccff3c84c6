"""The one shape of every error of the server, and which status an error has.

    {"error": {"message", "type", "param", "code", "request_id"}}

`message` says what was found and what to do. `param` is the field of the request that is meant, if one is. `code` is a
text that stays the same: OpenAI's where there is one (`model_not_found`, `context_length_exceeded`, `invalid_api_key`),
else a code of Ferry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ferry.core.errors import ConfigError, FerryError, InputError, UnavailableError
from ferry.guided.refusal import Refusal

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
RETRY_AFTER_S = 5
_OF_THE_CLIENT = (ConfigError, InputError)


class ApiError(FerryError):
    """An answer that is an error. Also what ends a stream that has begun."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str,
        repair: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code, repair=repair)
        self.status = status
        self.param = param
        self.headers = dict(headers or {})


def wrong(param: str | None, message: str, *, code: str = "request.value", repair: str = "") -> ApiError:
    """Return the error for a field that is wrong."""
    return ApiError(400, message, param=param, code=code, repair=repair)


def busy(status: int, message: str, *, code: str, retry_after_s: int = RETRY_AFTER_S) -> ApiError:
    """Return the error for a request that may be sent again later."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(retry_after_s)})


def as_api_error(error: FerryError, param: str | None = None) -> ApiError:
    """Return any error of Ferry as one of the server; `param` is the field that was being read."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Refusal):
        return ApiError(400, error.message, param=param or error.keyword or None, code=error.code, repair=error.repair)
    if isinstance(error, _OF_THE_CLIENT):
        return ApiError(400, error.message, param=param, code=error.code, repair=error.repair)
    if isinstance(error, UnavailableError):
        return busy(503, str(error), code=error.code)
    return ApiError(500, error.message, param=param, code=error.code, repair=error.repair)


def of_engine(code: str, message: str) -> ApiError:
    """Return what an engine said with finish `error` as an error of the server."""
    if code.startswith("guided.") or code in ("engine.too-long", "engine.request"):
        return ApiError(400, message, code=code)
    if code in ("engine.lost", "engine.closed", "engine.starting"):
        return busy(503, message or "the engine died under this request and is being started again", code=code)
    return ApiError(500, message or "the engine could not answer", code=code or "engine.failed")


def body_of(error: ApiError, request_id: str) -> dict[str, Any]:
    """Return the JSON of an error."""
    return {
        "error": {
            "message": str(error),
            "type": TYPES.get(error.status, "invalid_request_error"),
            "param": error.param,
            "code": error.code,
            "request_id": request_id,
        }
    }
