"""The border of the server, around all routes: request ids, keys, one shape for every error, and counting.

A browser reaches servers of its own machine for any page that it shows. So a server without keys that others cannot
reach answers only requests that are sent to a name of this machine, and not for pages from elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ferry.verbs.serve.http.errors import ApiError, body_of
from ferry.verbs.serve.http.events import ClientGoneError, answer_json
from ferry.verbs.serve.http.served import Served

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/", "/favicon.ico"})
"""What needs no key: probes, Prometheus, and the page, which asks for a key itself."""
OPEN_FOLDER = "/page/"
CLIENT_GONE = 499
"""The status in our own counts of a request whose client went away."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Border:
    """Lets requests in and answers out."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app = app
        self._served = served
        self._keys = [_digest(key) for key in served.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given_id = headers.get("x-request-id", "")
        request_id = given_id if _REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begun_s = self._served.measures.clock()
        status = CLIENT_GONE

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            self._check_hosts(scope["path"], headers)
            await self._app(scope, receive, send_marked)
        except ClientGoneError:
            status = CLIENT_GONE
        except Exception as error:
            if status != CLIENT_GONE:
                raise  # the answer has begun: the connection can only be closed
            answer = error_answer(self._served.problem(error, request_id), request_id)
            await answer(scope, receive, send_marked)
        finally:
            self._count(scope, status, request_id, self._served.measures.clock() - begun_s)

    def _check_key(self, path: str, headers: Headers) -> None:
        if not self._keys or _is_open(path):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        # All keys are compared, and digests have one length: the time says nothing.
        if not _any_equal(given, self._keys):
            raise ApiError(
                401,
                "the API key is wrong" if given else "an API key is needed",
                code="invalid_api_key",
                repair="send the header `Authorization: Bearer KEY`",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_hosts(self, path: str, headers: Headers) -> None:
        trusted = self._served.settings.trusted_hosts
        if not trusted or _is_open(path):
            return
        repair = f"use http://{trusted[0]}, or start the server with --api-key-file FILE: then a key is enough"
        host, origin = headers.get("host", ""), headers.get("origin", "")
        if host and _host_of(f"//{host}") not in trusted:
            message = f"the request is sent to {host[:100]!r}, which is no name of this server"
            raise ApiError(403, message, code="request.host", repair=repair)
        if origin and _host_of(origin) not in trusted:
            message = f"a page from {origin[:100]!r} may not ask this server"
            raise ApiError(403, message, code="request.origin", repair=repair)

    def _count(self, scope: Scope, status: int, request_id: str, seconds: float) -> None:
        route = scope.get("route")
        name = str(getattr(route, "path", "")) or "unknown"
        self._served.measures.requests.add(name, str(status))
        if self._served.settings.log_requests:
            said = {"id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            self._served.note("request", {**said, "seconds": round(seconds, 3)})


def error_answer(error: ApiError, request_id: str) -> Response:
    """Return an error as the answer to a request."""
    return answer_json(body_of(error, request_id), error.status, error.headers)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _host_of(url: str) -> str:
    """Return the host of an address without its port; "" if it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _any_equal(given: bytes, keys: Sequence[bytes]) -> bool:
    return sum(hmac.compare_digest(given, key) for key in keys) > 0
