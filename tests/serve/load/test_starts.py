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


@pytest.mark.parametrize("name", ["config.json", "safetensors", "tokenizer"])
def test_a_model_without_some_of_its_files_is_refused_by_name(serve: Serve, broken: Path, name: str) -> None:
    for path in broken.glob(f"*{name}*"):
        path.unlink()
    server = serve(model=broken)
    status, _ = server.ended()
    said = server.errors.text()
    assert status == 3
    assert "this is a defect of Ferry" not in said
    assert name in said.splitlines()[-1]
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
    assert status == 7
    assert "model.layers.0.mlp.gate_proj.weight [128, 64], expected [256, 64]" in server.errors.text()


def test_a_port_that_is_taken_is_named(serve: Serve) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        server = serve(port=port)
        status, _ = server.ended()
    assert status == 2
    assert f"port {port} of 127.0.0.1 is in use" in server.errors.text().splitlines()[-1]


def test_nobody_can_take_the_port_while_the_model_is_loaded(serve: Serve) -> None:
    with socket.socket() as other:
        # Bound and not yet listening: the server finds the port free.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        server = serve(port=port)
        wait_until(lambda: server.engine_id != 0)
        with pytest.raises(OSError, match="in use"):
            other.listen()
        assert server.ready().url == f"http://127.0.0.1:{port}"


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
