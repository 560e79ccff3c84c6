"""The routes of the server, as a FastAPI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from ferry.verbs.serve.http import about
from ferry.verbs.serve.http.border import CLIENT_GONE, Border, error_answer
from ferry.verbs.serve.http.chat import chat
from ferry.verbs.serve.http.completions import completions
from ferry.verbs.serve.http.errors import ApiError
from ferry.verbs.serve.http.events import ClientGoneError
from ferry.verbs.serve.http.guided_check import check_schema
from ferry.verbs.serve.http.served import Served
from ferry.verbs.serve.page.files import HEADERS, PageFile, page_files

Handler = Callable[[Served, Request], Awaitable[Response]]
SHOWN_PATH = 200
"""Characters of an unknown path that its refusal repeats."""

ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/chat/completions", chat),
    ("POST", "/v1/guided/check", check_schema),
    ("GET", "/v1/models", about.models),
    ("GET", "/v1/models/{name:path}", about.model),
    ("POST", "/tokenize", about.tokenize),
    ("POST", "/detokenize", about.detokenize),
    ("GET", "/health", about.health),
    ("GET", "/ready", about.ready),
    ("GET", "/metrics", about.metrics),
    ("GET", "/version", about.version),
)


def make_app(served: Served) -> ASGIApp:
    """Return the application that serves a model."""
    # The pages of documentation that FastAPI makes load their scripts from elsewhere: this server needs no network.
    app = FastAPI(title="Ferry", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    for method, path, handler in ROUTES:
        methods = ["GET", "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, _endpoint(served, handler), methods=methods, response_model=None, name=path)
    for path, file in page_files().items():
        app.add_api_route(path, _page(file), methods=["GET", "HEAD"], response_model=None, name=path)
    app.add_exception_handler(HTTPException, _unrouted)
    return Border(app, served)


def _endpoint(served: Served, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(served, request)
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
        except Exception as error:  # noqa: BLE001 - the border of the server: every error has one shape
            return error_answer(served.problem(error, request.state.request_id), request.state.request_id)

    return endpoint


def _page(file: PageFile) -> Callable[[], Awaitable[Response]]:
    async def endpoint() -> Response:
        return Response(file.content, headers=HEADERS, media_type=file.media_type)

    return endpoint


async def _unrouted(request: Request, error: Any) -> Response:
    """Answer for a path or method that is not there, in the one shape."""
    method, path = request.method, request.url.path
    if error.status_code == 404:
        known = ", ".join(route.replace("{name:path}", "NAME") for _, route, _ in ROUTES)
        found = ApiError(404, f"there is no {path[:SHOWN_PATH]}", code="request.path", repair=f"known: {known}")
    elif error.status_code == 405:
        found = ApiError(405, f"{path} does not take {method}", code="request.method", headers=error.headers)
    else:
        found = ApiError(error.status_code, str(error.detail), code="request.refused", headers=error.headers)
    return error_answer(found, request.state.request_id)
