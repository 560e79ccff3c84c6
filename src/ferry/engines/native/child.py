"""The process that the native engine lives in: `python -m ferry.engines.native.child FD`, FD being its end of a socket.

It loads the model, answers requests, and ends when the other end of the socket is closed, whether the parent closed it
or died, and whatever the loop is doing then. It holds nothing that would be lost. Every few seconds it says that it is
there; a loop that is held up in one step does not, so that the parent ends it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from ferry.core.errors import FerryError
from ferry.engines.native import messages
from ferry.engines.request import Output

if TYPE_CHECKING:
    from ferry.engines.native.loop import NativeEngine

Inbox = SimpleQueue[tuple[str, Any]]
LONGEST_STEP_S = 600.0
"""A step that takes longer hangs. A large model on few cores may need minutes for a part of a long prompt."""


class Voice:
    """What is said to the parent, by the loop and by the thread that shows signs of life."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lock = threading.Lock()
        self._begun_s: float | None = None
        threading.Thread(target=self._beat, daemon=True).start()

    def say(self, kind: str, content: Any) -> None:
        """Say something; the step that was begun is over then."""
        with self._lock:
            self._end.sendall(messages.frame(kind, content))
        self._begun_s = None

    def begin_step(self) -> None:
        """Note that a step begins."""
        self._begun_s = time.monotonic()

    def _beat(self) -> None:
        pause = threading.Event()
        # A parent that has gone is the matter of `_listen`.
        with contextlib.suppress(OSError):
            while not pause.wait(messages.BEAT_S):
                begun_s = self._begun_s
                if begun_s is None or time.monotonic() - begun_s < LONGEST_STEP_S:
                    with self._lock:
                        self._end.sendall(messages.frame(messages.ALIVE, None))


def main(fd: int) -> int:
    """Serve until the parent is gone; return the exit status where the engine cannot start."""
    faulthandler.enable()
    # Whoever stops a service may tell all of its processes; answers that run are still wanted then.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = socket.socket(fileno=fd)
    inbox: Inbox = SimpleQueue()
    threading.Thread(target=_listen, args=(end, inbox), daemon=True).start()
    _, settings = inbox.get()
    voice = Voice(end)
    try:
        from ferry.engines.native.loop import NativeEngine

        engine = NativeEngine(messages.settings_from_json(settings))
    except FerryError as error:
        voice.say("failed", messages.error_to_json(error))
        return error.exit_status
    voice.say("ready", engine.info)
    while True:
        outputs = _receive(engine, inbox)
        voice.begin_step()
        if engine.has_work:
            outputs += engine.step()
        voice.say("step", [messages.outputs_to_json(outputs), engine.stats()])


def _listen(end: socket.socket, inbox: Inbox) -> None:
    """Put what the parent says into the inbox. At its end, end the process."""
    try:
        with end.makefile("rb") as file:
            while head := file.read(messages.LENGTH_BYTES):
                inbox.put(messages.parse(file.read(messages.length_of(head))))
    finally:
        os._exit(0)


def _receive(engine: NativeEngine, inbox: Inbox) -> list[Output]:
    """Take all messages that are there; wait for one where there is nothing else to do. Return refusals."""
    refused: list[Output] = []
    must_wait = not engine.has_work
    while True:
        try:
            kind, content = inbox.get(block=must_wait)
        except Empty:
            return refused
        must_wait = False
        if kind == "cancel":
            engine.cancel(content)
            continue
        try:
            engine.add(messages.request_from_json(content))
        except FerryError as error:
            refused.append(Output(content["id"], finish="error", error_code=error.code, error_message=str(error)))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
