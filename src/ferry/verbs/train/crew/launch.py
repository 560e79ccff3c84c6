"""Start the supervisor of this node from the command's process, listen to it, and return how it ended.

The supervisor is a new program, so it has one thread whatever this process has imported; this process imports no torch.
Its session is its own: Ctrl-C in a terminal reaches this process only, which passes on one request to stop.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ferry.core.interpreter import module_words
from ferry.verbs.train.crew.channel import Channel, wait_for_any
from ferry.verbs.train.crew.spec import CrewSpec, Failure, Outcome

OnEvent = Callable[[dict[str, Any]], None]
_FOREVER_S = 3600.0
_QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "4294967295",
}
"""What the user's environment may override: idle threads do not spin, and freed memory is kept for the next step, not
given back and faulted in again (glibc; 6 % of the CPU of a step)."""


def launch(spec: CrewSpec, on_event: OnEvent) -> Outcome:
    """Run a crew to its end and pass each event on.

    Whatever is raised while it runs (a signal, an error of `on_event`) asks the crew to stop, waits until it has saved
    and left, and is raised again. A second one kills the crew.
    """
    folder = Path(tempfile.mkdtemp(prefix="ferry-crew-"))
    ours, theirs = socket.socketpair()
    try:
        (folder / "spec.json").write_text(json.dumps(spec.to_json()), encoding="utf-8")
        with _supervisor_log(spec) as log:
            process = subprocess.Popen(
                [*module_words("ferry.verbs.train.crew", "-u"), str(folder / "spec.json"), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # OpenBLAS would start threads when numpy is imported, and a process with threads should not fork.
                env={**_QUIET, **os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        theirs.close()
        return _accompany(process, Channel(ours), on_event, spec)
    finally:
        # If an exception has left the supervisor alive, the end of this connection makes it stop.
        ours.close()
        theirs.close()
        shutil.rmtree(folder, ignore_errors=True)


def _accompany(process: subprocess.Popen[bytes], channel: Channel, on_event: OnEvent, spec: CrewSpec) -> Outcome:
    try:
        return _listen(process, channel, on_event, spec, was_stopped=False)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        try:
            _listen(process, channel, on_event, spec, was_stopped=True)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
        raise


def _listen(
    process: subprocess.Popen[bytes], channel: Channel, on_event: OnEvent, spec: CrewSpec, *, was_stopped: bool
) -> Outcome:
    outcome = None
    while not channel.is_closed:
        wait_for_any([channel], _FOREVER_S)
        for message in channel.receive():
            if "outcome" in message:
                outcome = Outcome.from_json(message["outcome"])
            else:
                on_event(message)
    exit_code = process.wait()
    if outcome is not None:
        return outcome
    if was_stopped or exit_code == -signal.SIGTERM:
        return Outcome("stopped")  # it was still importing: there was nothing to save
    log = _supervisor_log_path(spec).relative_to(spec.output)
    how = f"killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit status {exit_code}"
    failure = Failure("train.supervisor-lost", f"the supervisor was {how}", f"see {log}; start again to resume")
    return Outcome("failed", failure=failure)


def _supervisor_log_path(spec: CrewSpec) -> Path:
    return spec.output / "logs" / f"supervisor-{spec.cluster.node_rank:05d}.log"


def _supervisor_log(spec: CrewSpec) -> Any:
    path = _supervisor_log_path(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab")
