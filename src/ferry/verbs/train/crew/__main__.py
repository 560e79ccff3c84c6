"""The program of a supervisor: `python -m ferry.verbs.train.crew SPEC.json FD`, started by `launch`.

FD is one end of a socket pair. Events go up through it; its end means that the command has gone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path

from ferry.verbs.train.crew.channel import Channel
from ferry.verbs.train.crew.kinship import die_with_parent
from ferry.verbs.train.crew.spec import CrewSpec
from ferry.verbs.train.crew.supervisor import supervise


def main(words: list[str]) -> None:
    # Until everything is imported, SIGTERM ends the process at once: there is nothing to save.
    die_with_parent(signal.SIGTERM, os.getppid())
    if sys.version_info < (3, 11):
        sys.path.pop(0)  # the working directory: there is no flag to leave it out
    path = Path(words[0])
    end = socket.socket(fileno=int(words[1]))
    end.set_inheritable(False)
    supervise(CrewSpec.from_json(json.loads(path.read_text(encoding="utf-8"))), Channel(end), path.parent)


if __name__ == "__main__":
    main(sys.argv[1:])
