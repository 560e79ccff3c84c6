"""A server that cannot start says why, in one line, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from pathlib import Path

import pytest

from load.conftest import Serve
from load.serving import is_alive, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def broken(small: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be broken."""
    return Path(shutil.copytree(small, tmp_path / "broken"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_without_one_of_its_files_is_refused_by_name(serve: Serve, broken: Path, name: str) -> None:
    (broken / name).unlink()
    server = serve(model=broken)
    status, _ = server.ended()
    said = server.errors.text()
    assert status == 3
    assert "this is a defect of Ferry" not in said
    assert name.partition(".")[2] in said.splitlines()[-1]
    assert str(broken) in said.splitlines()[-1]


def test_weights_that_were_cut_off_are_refused(serve: Serve, broken: Path) -> None:
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    server = serve(model=broken)
    status, _ = server.ended()
    assert status in (3, 5)
    assert "model.safetensors" in server.errors.text().splitlines()[-1]


def test_weights_of_another_shape_are_refused(serve: Serve, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    server = serve(model=broken)
    status, _ = server.ended()
    said = server.errors.text()
    assert status == 3
    assert "this is a defect of Ferry" not in said


def test_a_port_that_is_taken_is_named(serve: Serve) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = serve("--port", str(port))
        status, _ = server.ended()
    assert status == 2
    assert f"port {port} of 127.0.0.1 is in use" in server.errors.text().splitlines()[-1]


def test_a_port_that_is_taken_while_the_server_starts_is_named(serve: Serve) -> None:
    with socket.socket() as other:
        # Bound and not yet listening: the server finds it free, and both hold it until one of them listens.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        server = serve("--port", str(port))
        server.errors.wait_for("engine: native")
        try:
            other.listen()
        except OSError:
            assert server.listening().url == f"http://127.0.0.1:{port}"
            return
        status, _ = server.ended()
    assert status == 2
    assert f"port {port} of 127.0.0.1 is in use" in server.errors.text().splitlines()[-1]


def test_an_engine_that_dies_while_it_loads_is_told_with_the_reason(serve: Serve) -> None:
    server = serve()
    wait_until(lambda: server.engine_id != 0)
    engine_id = server.engine_id
    os.kill(engine_id, signal.SIGKILL)
    status, _ = server.ended()
    assert status == 7
    last = server.errors.text().splitlines()[-1]
    assert "the engine's process ended while it started (signal SIGKILL)" in last
    assert "memory ran out" in last
    assert "engine.start" in last
    assert not is_alive(engine_id)


def test_a_cache_that_holds_no_request_is_refused_with_what_to_change(serve: Serve) -> None:
    server = serve(cache="1MB")
    status, _ = server.ended()
    if status == 0:
        pytest.fail("it started")
    last = server.errors.text().splitlines()[-1]
    assert "--kv-cache-memory" in last or "--max-model-len" in last
