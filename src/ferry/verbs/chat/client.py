"""A server with the OpenAI API, as far as a conversation needs it: its models, and answers that stream.

The standard library does it. Whatever goes wrong becomes one FerryError that says what the server said.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from ferry.core.errors import ConfigError, FerryError, InputError, UnavailableError

SILENCE_LIMIT_S = 600.0
"""A server that says nothing for so long is taken for dead: a long prompt on a small machine may take minutes."""
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d{1,5}")


def address_of(target: str) -> str | None:
    """Return the address of a server without `/v1`, or nothing if the words name a model directory."""
    if re.match(r"https?://", target):
        return re.sub(r"(/v1)?(/chat/completions)?/*$", "", target)
    if Path(target).exists():
        return None
    if _HOST_AND_PORT.fullmatch(target):
        return f"http://{target}"
    raise InputError(
        f"{target!r} is neither a directory nor an address",
        code="chat.target",
        repair="give a model directory or an address like http://localhost:8080",
    )


class Server:
    """One server. Holds no connection between requests."""

    def __init__(self, address: str, api_key: str = "", *, is_own: bool = False) -> None:
        self.address = address
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # A server of our own is on this machine: no proxy can reach it.
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_own else []))

    def models(self) -> list[dict[str, Any]]:
        """Return the models of the server, the preferred one first."""
        with closing(self._ask("/v1/models")) as response:
            found = _read(response.read()).get("data")
        models = [one for one in found if isinstance(one, dict) and "id" in one] if isinstance(found, list) else []
        if not models:
            raise UnavailableError(f"{self.address} serves no model", code="chat.no-model")
        return models

    def why_not_ready(self, timeout_s: float) -> str:
        """Return "" if the server is ready, else what it says."""
        try:
            self._ask("/ready", timeout_s=timeout_s).close()
        except FerryError as error:
            return error.message
        return ""

    def stream(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Give the events of an answer as they come. Closing the iterator ends the request."""
        with closing(self._ask("/v1/chat/completions", body)) as response:
            for line in _lines(response, self.address):
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = _read(data)
                if "error" in event:
                    raise _refusal(event, 500)
                yield event
        raise UnavailableError(f"the answer of {self.address} has no end: part of it may be missing", code="chat.lost")

    def _ask(
        self, path: str, body: Mapping[str, Any] | None = None, timeout_s: float = SILENCE_LIMIT_S
    ) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.address + path, data, self._headers)
            response: HTTPResponse = self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with closing(error):
                raise _refusal(_read(error.read()), error.code) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise UnavailableError(
                f"{self.address} cannot be reached: {reason}", code="chat.unreachable", repair="is the server running?"
            ) from error
        except ValueError as error:
            raise InputError(f"{self.address} is no address: {error}", code="chat.target") from error
        return response


def _lines(response: HTTPResponse, address: str) -> Iterator[bytes]:
    try:
        yield from response
    except (OSError, HTTPException) as error:
        raise UnavailableError(f"the connection to {address} was lost: {error}", code="chat.lost") from error


def _read(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"error": {"message": data[:300].decode("utf-8", "replace").strip()}}


def _refusal(document: Mapping[str, Any], status: int) -> FerryError:
    """Return what a server refused as an error of ours; the server's own words say why."""
    error = document.get("error")
    fields = error if isinstance(error, dict) else {"message": str(error or document.get("detail") or "")}
    message = str(fields.get("message") or f"the server answered {status} and nothing else")
    if fields.get("request_id"):
        message += f" (request {fields['request_id']})"
    if status == 401:
        return ConfigError(message, code="chat.key", repair="give the key with --api-key-file")
    if status == 429 or status >= 500:
        return UnavailableError(message, code="chat.unavailable")
    return ConfigError(message, code="chat.request")
