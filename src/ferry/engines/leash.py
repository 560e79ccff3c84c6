"""Runs a program that must not outlive whoever started it, whatever that one dies of.

    python leash.py PROGRAM WORD ...

The other end of standard input is held by the parent. When it is closed, by the parent or by its death, the program is
asked to end, and after a while it is ended with all that it started. This file imports nothing of Ferry: it runs beside
programs of other environments. The caller gives it a process group of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

PATIENCE_S = 15.0


def main(words: list[str]) -> int:
    """Run the program and return its exit status, or 128 + n where signal n ended it."""
    child = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _: child.send_signal(number))
    threading.Thread(target=_end_with_parent, args=(child,), daemon=True).start()
    status = child.wait()
    return 128 - status if status < 0 else status


def _end_with_parent(child: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1):
        continue
    child.terminate()
    try:
        child.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
