"""Training against the usual tools: same model, samples, order and mathematics; CPU time per real token, peak memory.

    python benchmarks/train/bench.py --install                  # makes the peers' environments, about 8 GB
    python benchmarks/train/bench.py [--rounds 3] [--methods lora sft] [--batches 4 8] [--peers ferry hf trl swift]

A real token is one of a sample, a padded token is one the model computes. Every run has one thread and float32, and the
model whole. In a round all trainers run one after the other, so that a ratio compares neighbours in time; rounds repeat
and medians are given. `trl*`, `swift*` and `llamafactory*` are these peers with their own default, recomputation of
activations: less memory for more time. Writes results.json in the working folder, prints the table of
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import ferry_train

from ferry.core.environment import hardware

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
TRANSFORMERS = ["transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0"]
LLAMA_FACTORY_NEEDS = [  # all that it declares but torchvision and torchaudio, which are built for CUDA
    "transformers==5.6.0", "accelerate<=1.11.0", "peft<=0.18.1", "trl<=0.24.0", "datasets<=4.0.0", "torchdata<=0.11.0",
    "av<=16.0.0", "gradio<=5.50.0", "tyro<0.9.0", "einops", "fastapi", "fire", "hf-transfer", "matplotlib",
    "modelscope", "numpy", "omegaconf", "packaging", "pandas", "protobuf", "pydantic", "pyyaml", "safetensors", "scipy",
    "sentencepiece", "sse-starlette", "tiktoken", "uvicorn",
]  # fmt: skip
ENVIRONMENTS = {
    "hf": [[TORCH], TRANSFORMERS],
    "trl": [[TORCH], [*TRANSFORMERS, "trl==1.16.0", "datasets==5.2.0"]],
    "swift": [[TORCH], [TORCH, "ms-swift==4.6.0"]],
    "llamafactory": [[TORCH], [TORCH, *LLAMA_FACTORY_NEEDS], ["--no-deps", "llamafactory==0.9.5"]],
}
"""Arguments of `pip install`, one call after the other. torch comes first and by itself, as in the Makefile."""

SCRIPTS = {
    "hf": "peers/hf_trainer.py",
    "trl": "peers/trl_sft.py",
    "swift": "peers/ms_swift.py",
    "llamafactory": "peers/llama_factory.py",
}
PEERS = ["ferry", "hf", "trl", "trl*", "swift", "swift*", "llamafactory", "llamafactory*"]


class Place(NamedTuple):
    """The working folder and what lies in it."""

    work: Path
    python: str

    def model(self, peer: str) -> Path:
        return self.work / ("model-float32" if peer == "llamafactory" else "model")

    def batches(self, batch: int, steps: int) -> Path:
        return self.work / f"batches-{batch}x{steps}"


def install(place: Place) -> None:
    """Make what is missing of the peers' environments."""
    for name, calls in ENVIRONMENTS.items():
        target = place.work / "envs" / name
        if (target / "complete").exists():
            continue
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run([place.python, "-m", "venv", str(target)], check=True)
        for words in calls:
            subprocess.run([str(target / "bin/python"), "-m", "pip", "install", "--quiet", *words], check=True)
        (target / "complete").touch()


def prepare(place: Place, data: Path, batches: list[int], steps: int) -> None:
    """Make the model, its float32 twin and the batches, where they are missing."""
    if not place.model("ferry").exists():
        pull = ["pull", "smollm2-135m-instruct", "-o", str(place.model("ferry"))]
        subprocess.run([place.python, "-m", "ferry", *pull], check=True)
    if not place.model("llamafactory").exists():
        twin = [str(HERE / "float32.py"), str(place.model("ferry")), str(place.model("llamafactory"))]
        subprocess.run([place.python, *twin], check=True)
    for batch in batches:
        if not (place.batches(batch, steps) / "rows.json").exists():
            words = ["--model", place.model("ferry"), "--data", data, "--batch", batch, "--steps", steps]
            words += ["--output", place.batches(batch, steps)]
            subprocess.run([place.python, str(HERE / "batches.py"), *map(str, words)], check=True)


def run(place: Place, peer: str, method: str, batches: Path) -> dict[str, Any]:
    """Run one trainer to its end and return what it measured, with the peak memory as the system counted it."""
    name, recompute = peer.removesuffix("*"), peer.endswith("*")
    output = place.work / "out" / name
    shutil.rmtree(output, ignore_errors=True)
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    homes = {key: str(place.work / "home") for key in ("HF_HOME", "MODELSCOPE_CACHE", "FERRY_HOME")}
    if name == "ferry":
        command = ferry_train.command(place.python, place.model(name), batches, method, output)
    else:
        python = place.work / "envs" / name / "bin/python"
        words = ["--model", place.model(name), "--batches", batches, "--method", method, "--work", output]
        command = [
            str(python),
            str(HERE / SCRIPTS[name]),
            *map(str, words),
            *(["--checkpointing"] if recompute else []),
        ]
    log = place.work / "logs" / f"{peer}-{method}-{batches.name}.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w+", encoding="utf-8") as stdout, log.with_suffix(".err").open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(command, env={**os.environ, **quiet, **homes}, stdout=stdout, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        lines = stdout.read().strip().splitlines()
    if process.returncode:
        raise SystemExit(f"{peer} failed with status {process.returncode}; see {log}")
    if name == "ferry":
        found = ferry_train.result(importlib.metadata.version("llmferry"), batches, method, output)
    else:
        found = json.loads(lines[-1])
    return {**found, "peak_rss_mib": usage.ru_maxrss / 1024, "process_cpu_s": usage.ru_utime + usage.ru_stime}


def table(rounds: list[dict[str, Any]], peers: list[str]) -> str:
    """Medians over rounds; the last columns compare with Ferry in the same round: median, least and most."""
    ours = "ferry" in peers
    lines = [
        "| trainer | CPU ms / real token | padded / real | peak RSS MiB | first-step loss | same tokens | "
        + ("CPU / Ferry's | Ferry's RSS / its |" if ours else ""),
        "|---|--:|--:|--:|--:|---|" + ("--:|--:|" if ours else ""),
    ]

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    for peer in peers:
        found = [each[peer] for each in rounds]
        first = found[0]
        cells = [
            f"{first['peer']} {first['version']}{', recomputing' if peer.endswith('*') else ''}",
            spread([each["ms_per_token"] for each in found]),
            f"{first['num_padded'] / first['num_tokens']:.2f}",
            f"{statistics.median(each['peak_rss_mib'] for each in found):.0f}",
            f"{first['losses'][0]:.6f}",
            "yes" if all(each["same_batches"] for each in found) else "**no**",
        ]
        if ours:
            cells.append(spread([each[peer]["ms_per_token"] / each["ferry"]["ms_per_token"] for each in rounds]))
            cells.append(spread([each["ferry"]["peak_rss_mib"] / each[peer]["peak_rss_mib"] for each in rounds]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="make the peers' environments first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run; the first only warms up")
    parser.add_argument("--methods", nargs="+", choices=["lora", "sft"], default=["lora", "sft"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared/data/train/alpaca_en_demo.json")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "bench-work/train")
    options = parser.parse_args()
    place = Place(options.work.resolve(), sys.executable)
    place.work.mkdir(parents=True, exist_ok=True)
    if options.install:
        install(place)
    prepare(place, options.data.resolve(), options.batches, options.steps)
    results: dict[str, list[dict[str, Any]]] = {}
    for number in range(1, options.rounds + 1):
        for method in options.methods:
            for batch in options.batches:
                batches = place.batches(batch, options.steps)
                found = {peer: run(place, peer, method, batches) for peer in options.peers}
                results.setdefault(f"{method}, batch {batch}", []).append(found)
                (place.work / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        print(f"round {number} of {options.rounds} done, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    print(f"{date.today()}, {hardware()['cpu']}, {os.cpu_count()} cores, {options.rounds} rounds, medians (least-most)")
    for title, rounds in results.items():
        print(f"\n**{title}**\n\n{table(rounds, options.peers)}")


if __name__ == "__main__":
    main()
