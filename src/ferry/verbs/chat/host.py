"""A server of one's own for a conversation: started for a model directory, and ended with it."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ferry.core import errors
from ferry.core.errors import FerryError, UnavailableError
from ferry.core.interpreter import module_words
from ferry.core.progress import Reporter
from ferry.engines import leash
from ferry.verbs.chat.client import Server

LOOK_INTERVAL_S = 0.1
NUM_LINES = 6


@contextmanager
def served(model: Path, words: str, reporter: Reporter) -> Iterator[Server]:
    """Start `ferry serve` on a free port, wait until it is ready, and end it when the block ends."""
    reporter.say(f"starting ferry serve for {model}")
    with tempfile.TemporaryDirectory(prefix="ferry-chat-") as folder:
        said, log = Path(folder, "said"), Path(folder, "log")
        port = _free_port()
        where = ["--host", "127.0.0.1", "--port", str(port), "--drain-timeout", "0"]
        command = [*module_words("ferry"), "serve", str(model), "--json", *where, *shlex.split(words)]
        leashed = [sys.executable, "-I", "-S", leash.__file__, *command]
        with open(said, "wb") as stdout, open(log, "wb") as stderr:
            # In a session of its own: Ctrl-C is for the answer, not for the server.
            child = subprocess.Popen(
                leashed,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            server = Server(f"http://127.0.0.1:{port}", is_own=True)
            _wait(child, server, said, log)
            yield server
        finally:
            _end(child)


def _wait(child: subprocess.Popen[bytes], server: Server, said: Path, log: Path) -> None:
    while server.why_not_ready(timeout_s=2.0):
        if child.poll() is not None:
            raise _reason(child.returncode, said.read_text(errors="replace"), log.read_text(errors="replace"))
        time.sleep(LOOK_INTERVAL_S)


def _reason(status: int, said: str, log: str) -> FerryError:
    """Return why a server ended: its own error as it is, else the last it wrote."""
    try:
        error = json.loads(said)["error"]
        kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FerryError)]
        kind = next((kind for kind in kinds if kind.exit_status == error["exit_status"]), UnavailableError)
        return kind(error["message"], code=error["code"], repair=error["repair"])
    except (ValueError, KeyError, TypeError):
        last = " | ".join(log.strip().splitlines()[-NUM_LINES:]) or "it said nothing"
        return UnavailableError(f"ferry serve ended with status {status}: {last}", code="chat.serve")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Let go of the leash: it ends the server, at the latest after its own patience."""
    assert child.stdin is not None
    child.stdin.close()
    child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
