"""A hub on 127.0.0.1: the endpoints of Hugging Face's that huggingface_hub uses to find and fetch a model.

It keeps a log of what was asked, and can misbehave on purpose: break off, stall, or send other bytes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """A request for a file: its name, the first byte wanted, and how many were sent."""

    name: str
    first: int
    sent: int


@dataclass
class Hub:
    """What the hub holds and how it behaves."""

    repo: str
    files: dict[str, bytes]
    commit: str = "c0ffee" + "0" * 34
    large: tuple[str, ...] = (".safetensors", ".bin", ".onnx")
    """Endings of files that the hub keeps by sha256; of others it knows the git id."""
    break_after: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which the connection is closed, once."""
    stall_after: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which nothing more comes, until `go_on`."""
    send_instead: dict[str, bytes] = field(default_factory=dict)
    error: tuple[int, str] | None = None
    """Status and X-Error-Code of every answer."""
    log: list[Asked] = field(default_factory=list)
    num_api_calls: int = 0
    go_on: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def tree(self) -> list[dict[str, Any]]:
        """What `tree/COMMIT?recursive=true` answers; snapshot_download asks for it."""
        entries = []
        for sibling in self.describe()["siblings"]:
            entry = {"type": "file", "path": sibling["rfilename"], "size": sibling["size"], "oid": sibling["blobId"]}
            if "lfs" in sibling:
                entry["lfs"] = {"oid": sibling["lfs"]["sha256"], "size": sibling["size"], "pointerSize": 134}
            entries.append(entry)
        return entries

    def describe(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data)}
            sibling["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if name.endswith(self.large):
                sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        return {"id": self.repo, "modelId": self.repo, "sha": self.commit, "siblings": siblings, "tags": []}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Let a hub answer until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Stay quiet: the hub keeps its own log."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if hub.error:
                return self.refuse(*hub.error)
            if path.startswith("/api/models/"):
                hub.num_api_calls += 1
                if path == f"/api/models/{hub.repo}/tree/{hub.commit}":
                    return self.answer(200, json.dumps(hub.tree()).encode(), {"Content-Type": "application/json"})
                repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
                if repo != hub.repo:
                    return self.refuse(404, "RepoNotFound")
                if revision not in ("main", "", hub.commit):
                    return self.refuse(404, "RevisionNotFound")
                return self.answer(200, json.dumps(hub.describe()).encode(), {"Content-Type": "application/json"})
            name = path.removeprefix(f"/{hub.repo}/resolve/{hub.commit}/")
            if name not in hub.files:
                return self.refuse(404, "EntryNotFound")
            return self.send_file(name, hub.send_instead.get(name, hub.files[name]))

        def send_file(self, name: str, data: bytes) -> None:
            wanted = self.headers.get("Range")
            first = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": hub.commit}
            headers |= {"X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"}
            if wanted:
                headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self.answer(206 if wanted else 200, data[first:], headers, name, first)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def answer(self, status: int, data: bytes, headers: dict[str, str], name: str = "", first: int = 0) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            sent = len(data)
            if name in hub.break_after:
                sent = min(sent, hub.break_after.pop(name))
                self.close_connection = True
            if name in hub.stall_after:
                sent = min(sent, hub.stall_after.pop(name))
            if name:
                hub.log.append(Asked(name, first, sent))
            self.wfile.write(data[:sent])
            self.wfile.flush()
            if sent < len(data) and not self.close_connection:
                hub.stalled.set()
                hub.go_on.wait()
                self.close_connection = True

    return Handler
