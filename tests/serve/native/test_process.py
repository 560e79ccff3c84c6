"""The process around the loop: deaths of the child and of the parent, refusals that cross over, none left running."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferry.core.errors import ConfigError, InputError, UnavailableError
from ferry.engines.engine import EngineInfo, EngineSettings
from ferry.engines.native import messages
from ferry.engines.native.parent import ChildEngine
from ferry.engines.native_engine import ENGINE
from ferry.engines.request import Output, Request, Sampling, Stats, TokenLogprobs
from native.reading import ask, tokens_of
from native.tiny import write_model

PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("llama", tmp_path_factory.mktemp("models") / "llama")


def settings_for(model: Path, **fields: object) -> EngineSettings:
    return replace(EngineSettings(model, threads=1, log_file=model.parent / "engine.log"), **fields)  # type: ignore[arg-type]


async def answer(engine: ChildEngine, request: Request) -> list[Output]:
    return [output async for output in engine.generate(request)]


async def until(is_so: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < give_up_s
        await asyncio.sleep(0.02)


def is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process_id}/status").read_text() if os.path.exists(f"/proc/{process_id}/status") else ""
    return "State:\tZ" not in status


def test_a_killed_child_ends_its_requests_and_is_started_again(model: Path) -> None:
    async def story() -> None:
        engine = ChildEngine(settings_for(model))
        with pytest.raises(UnavailableError):
            _ = engine.info
        await engine.start()
        assert (engine.condition.state, engine.info.max_model_len) == ("ready", 256)
        before = tokens_of(await answer(engine, ask("a", [1, 2, 3], max_tokens=20)))
        assert len(before) == 20

        # A refusal of the child is the end of that request alone.
        (refused,) = await answer(engine, ask("b", [1] * 300))
        assert (refused.finish, refused.error_code) == ("error", "engine.too-long")

        # Closing the iterator cancels: the engine has nothing left to do.
        stream = engine.generate(ask("c", [1], max_tokens=250))
        assert (await anext(stream)).request_id == "c"
        await stream.aclose()  # type: ignore[attr-defined]
        await answer(engine, ask("d", [1], max_tokens=1))
        assert (await engine.stats()).num_running == 0

        streams = [engine.generate(ask(f"e{number}", [number], max_tokens=250)) for number in range(3)]
        for stream in streams:
            await anext(stream)
        child = engine.process_id
        assert child is not None
        os.kill(child, signal.SIGKILL)
        for stream in streams:
            *_, last = [output async for output in stream]
            assert (last.finish, last.error_code) == ("error", "engine.lost")
            assert "SIGKILL" in last.error_message
        assert engine.condition.state == "restarting"
        (lost,) = await answer(engine, ask("f", [1]))
        assert lost.error_code == "engine.lost"

        await until(lambda: engine.condition.state == "ready")
        assert engine.condition.num_restarts == 1
        assert tokens_of(await answer(engine, ask("g", [1, 2, 3], max_tokens=20))) == before
        assert (await engine.stats()).num_generated_tokens > 40

        stream = engine.generate(ask("h", [1], max_tokens=250))
        await anext(stream)
        child = engine.process_id
        assert child is not None
        await engine.close()
        assert [output async for output in stream][-1].finish == "cancelled"
        assert not is_alive(child)
        assert engine.condition.state == "closed"

    asyncio.run(story())


PARENT = """
import asyncio, sys
from pathlib import Path
from ferry.engines.engine import EngineSettings
from ferry.engines.native.parent import ChildEngine

async def main():
    engine = ChildEngine(EngineSettings(Path(sys.argv[1]), threads=1))
    await engine.start()
    sys.stdout.write(f"{engine.process_id}\\n")
    sys.stdout.flush()
    await asyncio.Event().wait()

asyncio.run(main())
"""


POISON = "import pathlib; pathlib.Path(__file__).with_name('was run').touch()"


def test_a_killed_parent_takes_the_child_with_it_and_no_code_of_the_directory_is_run(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "program").mkdir()
    program = tmp_path / "program" / "parent.py"
    program.write_text(PARENT)
    here = tmp_path / "a model from the network"
    here.mkdir()
    (here / "numpy.py").write_text(POISON)
    words = [sys.executable, str(program), str(model)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=here) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_alive(child)
        parent.kill()
    asyncio.run(until(lambda: not is_alive(child)))
    assert not (here / "was run").exists()


BABBLER = """
import socket, sys
from ferry.engines.engine import EngineInfo
from ferry.engines.native import messages

def receive():
    return messages.parse(file.read(messages.length_of(file.read(messages.LENGTH_BYTES))))

end = socket.socket(fileno=int(sys.argv[1]))
file = end.makefile("rb")
receive()
end.sendall(messages.frame("ready", EngineInfo("native", 5, 6, "float32")))
receive()
end.sendall(messages.frame("step", 5))
file.read()
"""


class Babbling(ChildEngine):
    """An engine whose child answers a request with what no engine says."""

    async def _fork(self, theirs: socket.socket) -> Process:
        fd = theirs.fileno()
        return await asyncio.create_subprocess_exec(sys.executable, "-c", BABBLER, str(fd), pass_fds=(fd,))


def test_a_child_that_cannot_be_understood_is_a_death_like_another(tmp_path: Path) -> None:
    async def story() -> None:
        engine = Babbling(EngineSettings(tmp_path))
        await engine.start()
        child = engine.process_id
        (lost,) = await answer(engine, ask("a", [1]))
        assert lost.error_code == "engine.lost"
        assert "cannot be read" in lost.error_message
        await until(lambda: engine.condition.state == "ready")
        assert engine.process_id != child
        assert "cannot be read" in engine.condition.last_death
        await engine.close()

    asyncio.run(story())


def test_an_engine_can_be_closed_while_it_starts(model: Path) -> None:
    async def story() -> None:
        engine = ChildEngine(settings_for(model))
        start = asyncio.create_task(engine.start())
        await until(lambda: engine.process_id is not None)
        child = engine.process_id
        assert child is not None
        await engine.close()
        with pytest.raises(UnavailableError):
            await start
        assert engine.condition.state == "closed"
        assert not is_alive(child)

    asyncio.run(story())


def test_what_the_child_cannot_start_for_crosses_over(model: Path) -> None:
    async def story() -> None:
        engine = ChildEngine(settings_for(model, kv_cache_memory_bytes=1000))
        with pytest.raises(ConfigError) as caught:
            await engine.start()
        assert caught.value.code == "engine.cache-too-small"
        assert engine.condition.state == "failed"
        assert engine.process_id is None
        await engine.close()

    asyncio.run(story())


def test_the_front_end_learns_about_the_engine_without_torch(model: Path) -> None:
    code = (
        "import sys, pathlib; from ferry.engines.native_engine import ENGINE; "
        "from ferry.engines.engine import EngineSettings; s = EngineSettings(pathlib.Path(sys.argv[1])); "
        "assert ENGINE.available(s).usable and ENGINE.runs(s).usable; ENGINE.make(s); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(model)], check=True, timeout=PATIENCE_S)


def test_models_it_cannot_run_are_told_from_their_files(tmp_path: Path) -> None:
    found = EngineSettings(tmp_path)
    assert "config.json" in ENGINE.runs(found).reason
    (tmp_path / "config.json").write_text('{"is_encoder_decoder": true}')
    assert "encoder" in ENGINE.runs(found).reason
    (tmp_path / "config.json").write_text("{}")
    assert "safetensors" in ENGINE.runs(found).reason


TOLD = st.builds(
    TokenLogprobs, st.integers(0, 9), st.floats(-9, 0), st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 9), st.floats(-9, 0)), max_size=2).map(tuple),
)  # fmt: skip
OUTPUTS = st.builds(
    Output, st.text(), st.lists(st.integers(0, 9), max_size=3).map(tuple), st.lists(TOLD, max_size=2).map(tuple),
    st.sampled_from([None, "stop", "error"]), st.none() | st.integers(0, 9),
    st.none() | st.lists(st.none() | TOLD, max_size=2).map(tuple), st.integers(0, 9), st.text(), st.text(),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(OUTPUTS, max_size=3))
def test_outputs_cross_over_unchanged(outputs: list[Output]) -> None:
    body = messages.frame("step", [messages.outputs_to_json(outputs), Stats(num_steps=3)])
    assert messages.length_of(body[:4]) == len(body) - 4
    kind, (found, stats) = messages.parse(body[4:])
    assert (kind, messages.outputs_from_json(found), Stats(*stats)) == ("step", outputs, Stats(num_steps=3))


def test_requests_settings_and_errors_cross_over_unchanged() -> None:
    def crossed(value: object) -> object:
        return messages.parse(messages.frame("x", value)[4:])[1]

    sampling = Sampling(seed=2**63, end_token_ids=(1, 2), logit_bias={3: -1.5}, logprobs=0, top_p=0.5)
    for request in (ask("a", [1, 2]), Request("b", (3,), sampling, 'start: "ä"')):
        assert messages.request_from_json(crossed(messages.request_to_json(request))) == request  # type: ignore[arg-type]
    told = EngineSettings(Path("m"), environment=Path("e"), further=("--x", "1"), threads=2)
    assert messages.settings_from_json(crossed(messages.settings_to_json(told))) == told  # type: ignore[arg-type]
    info = EngineInfo("native", 5, 6, "float32", notes=("a", "b"))
    assert messages.info_from_json(crossed(info)) == info  # type: ignore[arg-type]
    error = messages.error_from_json(crossed(messages.error_to_json(InputError("m", code="c", repair="r"))))  # type: ignore[arg-type]
    assert (type(error), error.message, error.code, error.repair) == (InputError, "m", "c", "r")
