"""Quantization against llm-compressor: what each result loses by one independent judge, and what it costs to make.

    python benchmarks/quantize/bench.py --install        # makes llm-compressor's environment, 1.5 GB
    python benchmarks/quantize/bench.py [--models smol qwen2 mixtral qwen3] [--only smoothquant rtn awq] [--rounds 3]
    python benchmarks/quantize/bench.py --memory         # a random Llama of 2.7 GB: peak memory, nothing is judged

Everybody calibrates on the same 16 windows of 512 tokens and is judged by evaluate.py on the same 4 windows of another
text. CPU seconds and peak memory are the system's, of a whole run from start to the files on disk; the peer's model is
loaded in float32, where it loses least. Runs of one method follow each other, so that a ratio compares neighbours in
time. Writes results/*.json in the working folder and prints the tables of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import environments

import models
from ferry.core.environment import hardware

HERE = Path(__file__).resolve().parent
DATA_FILES = ("c4_demo.jsonl", "wiki_demo.txt")
MEBIBYTE = 1 << 20


class Job(NamedTuple):
    """One way to quantize: who does it, and its words on the command line."""

    title: str
    tool: str
    words: tuple[str, ...]
    proves: bool = False


JOBS = {
    "smoothquant": [
        Job("llm-compressor SmoothQuant 0.5, W8A8", "llmcompressor", ("smoothquant",)),
        Job("Ferry smoothquant, W8A8", "ferry", ("--method", "smoothquant")),
        Job("Ferry smoothquant, W8A8, with its proof", "ferry", ("--method", "smoothquant"), proves=True),
    ],
    "rtn": [
        Job("llm-compressor rounding, W8A8", "llmcompressor", ("rtn",)),
        Job("Ferry rtn, W8A8", "ferry", ("--method", "rtn")),
    ],
    "awq": [
        Job("llm-compressor AWQ, W4A16 g64", "llmcompressor", ("awq",)),
        Job("Ferry awq, W4A16 g64", "ferry", ("--method", "awq", "--group-size", "64")),
    ],
    "rtn4": [
        Job("llm-compressor rounding, W4A16 g64", "llmcompressor", ("rtn4",)),
        Job("Ferry rtn, W4A16 g64", "ferry", ("--method", "rtn", "--bits", "4", "--group-size", "64")),
    ],
}
MEMORY_JOBS = {
    "rtn": [
        Job("Ferry rtn, W8A8", "ferry", ("--method", "rtn")),
        Job("llm-compressor model_free_ptq, W8A8", "llmcompressor", ("stream",)),
        Job("llm-compressor rounding, W8A8", "llmcompressor", ("rtn", "--dtype", "auto")),
    ],
    "smoothquant": [
        Job("Ferry smoothquant, W8A8", "ferry", ("--method", "smoothquant")),
        Job("llm-compressor SmoothQuant 0.5, W8A8", "llmcompressor", ("smoothquant", "--dtype", "auto")),
    ],
}


class Place(NamedTuple):
    """The working folder, the texts, and how many threads a run gets (0: as many as the tool takes)."""

    work: Path
    data: Path
    threads: int

    def model(self, name: str) -> Path:
        return self.work / "models" / name

    def windows(self, name: str) -> Path:
        return self.work / f"windows-{name}.json"

    def environment(self, name: str) -> Path:
        return self.work / "envs" / name


def prepare(place: Place, name: str) -> None:
    """Make a model and its windows where they are missing.

    In a process of its own: the peak memory of a child counts what its parent held when it was started.
    """
    subprocess.run([sys.executable, str(HERE / "models.py"), name, str(place.model(name))], check=True)
    if not place.windows(name).exists():
        words = [place.model(name), place.data, place.windows(name)]
        subprocess.run([sys.executable, str(HERE / "windows.py"), *map(str, words)], check=True)


def command(place: Place, job: Job, name: str, output: Path) -> list[str]:
    if job.tool == "llmcompressor":
        python = place.environment(job.tool) / "bin/python"
        method, *rest = job.words
        words = [method, place.model(name), place.windows(name), output, *rest, "--threads", place.threads]
        return [str(python), str(HERE / "peers/llm_compressor.py"), *map(str, words)]
    words = ["-m", "ferry", "quantize", place.model(name), "--output", output, *job.words, "--overwrite", "--json"]
    if job.words[1] != "rtn":
        words += ["--data", place.data / DATA_FILES[0], "--samples", 16, "--seq-len", 512]
    words += ["--evaluation", place.data / DATA_FILES[1]] if job.proves else ["--no-evaluate"]
    if place.threads:
        words += ["--threads", place.threads]
    return [sys.executable, *map(str, words)]


def run(place: Place, job: Job, name: str) -> dict[str, Any]:
    """Quantize once; return cost and size. A tool that fails is a result too: its last line is kept."""
    label = f"{name}-{job.title.replace(',', '').replace(' ', '-')}"
    output = place.work / "out" / label
    shutil.rmtree(output, ignore_errors=True)
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "FERRY_HOME": str(place.work / "home")}
    if place.threads:
        quiet |= {"OMP_NUM_THREADS": str(place.threads), "MKL_NUM_THREADS": str(place.threads)}
    log = place.work / "logs" / f"{label}.log"
    for folder in (log.parent, output.parent):
        folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        words = command(place, job, name, output)
        process = subprocess.Popen(words, env={**os.environ, **quiet}, stdout=stream, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    found = {
        "title": job.title,
        "output": str(output),
        "wall_s": time.perf_counter() - start,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_mib": usage.ru_maxrss / 1024,
        "load": os.getloadavg()[0],
    }
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {**found, "failed": lines[-1] if lines else f"status {process.returncode}"}
    return {**found, "output_bytes": sum(path.stat().st_size for path in output.rglob("*.safetensors"))}


def judge(place: Place, name: str, rows: list[dict[str, Any]]) -> None:
    """Add to every row what the judge says of its output. A model that cannot be loaded is a result too.

    The judge runs in llm-compressor's environment: transformers 5.23 cannot load zero points as compressed-tensors
    packs them, 5.17 can.
    """
    for row in rows:
        if "failed" in row:
            continue
        words = [HERE / "evaluate.py", place.model(name), place.windows(name), row["output"]]
        python = str(place.environment("llmcompressor") / "bin/python")
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([python, *map(str, words)], env=one_thread, capture_output=True, text=True, check=False)
        if done.returncode:
            row["not_loaded"] = done.stderr.strip().splitlines()[-1]
        else:
            row |= json.loads(done.stdout.strip().splitlines()[-1])


def spread(values: list[float], digits: int) -> str:
    middle = f"{statistics.median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def table(rounds: list[list[dict[str, Any]]]) -> str:
    """One line a job: medians over rounds (least-most); KL and CPU over the peer's, the first of its group."""
    lines = [
        "| quantizer | KL | over the peer's | KL p99 | top-1 | perplexity | CPU s | over the peer's | wall s | "
        "peak RSS MiB | weights MB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for number, first in enumerate(rounds[0]):
        found = [each[number] for each in rounds]
        peers = [next(row for row in each if row["group"] == first["group"]) for each in rounds]
        compared = not peers[0]["title"].startswith("Ferry")
        if problem := first.get("failed"):
            lines.append(f"| {first['title']} | failed: {problem} " + "| " * 9 + "|")
            continue
        cells = [first["title"]]
        if "kl" in first:
            ratio = f"{first['kl'] / peers[0]['kl']:.2f}" if compared and "kl" in peers[0] else ""
            cells += [f"{first['kl']:.4f}", ratio, f"{first['kl_p99']:.3f}", f"{100 * first['top1']:.1f} %"]
            cells += [f"{first['perplexity']:.2f}"]
        else:
            cells += [first.get("not_loaded", ""), "", "", "", ""]
        cells.append(spread([row["cpu_s"] for row in found], 1))
        ratios = [row["cpu_s"] / peer["cpu_s"] for row, peer in zip(found, peers, strict=True)]
        cells.append(spread(ratios, 2) if compared else "")
        cells.append(spread([row["wall_s"] for row in found], 1))
        cells.append(f"{statistics.median(row['peak_rss_mib'] for row in found):,.0f}")
        cells.append(f"{first['output_bytes'] / 1e6:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(
    place: Place, name: str, groups: dict[str, list[Job]], num_rounds: int, judged: bool
) -> list[list[dict[str, Any]]]:
    """Run every job of the groups in every round; judge the first round's outputs, which later rounds repeat."""
    rounds: list[list[dict[str, Any]]] = []
    for number in range(num_rounds):
        rows = [{**run(place, job, name), "group": group} for group, jobs in groups.items() for job in jobs]
        rounds.append(rows)
        path = place.work / "results" / f"{name}-{'-'.join(groups)}-{place.threads}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rounds, indent=1), encoding="utf-8")
        if not number and judged:
            judge(place, name, rows)
            path.write_text(json.dumps(rounds, indent=1), encoding="utf-8")
        print(f"{name}: round {number + 1} of {num_rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="make llm-compressor's environment first")
    parser.add_argument("--models", nargs="+", choices=list(models.MAKERS), default=["smol", "qwen2", "mixtral"])
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=["smoothquant", "rtn", "awq"])
    parser.add_argument("--tools", nargs="+", choices=["llmcompressor", "ferry"], default=["llmcompressor", "ferry"])
    parser.add_argument("--memory", action="store_true", help="peak memory on a random Llama, and nothing else")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="0: what each tool takes by itself")
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared/data/train")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "bench-work/quantize")
    options = parser.parse_args()
    place = Place(options.work.resolve(), options.data.resolve(), options.threads)
    missing = [name for name in DATA_FILES if not (place.data / name).exists()]
    if missing:
        raise SystemExit(
            f"{place.data} has no {' and no '.join(missing)}: they are in hiyouga/LLaMA-Factory, folder data, commit "
            "ff6d4d12eeb0; give their folder with --data"
        )
    if options.install:
        environments.make("llmcompressor", place.environment("llmcompressor"))
    jobs, names = (MEMORY_JOBS, ["random", "shallow"]) if options.memory else (JOBS, options.models)
    groups = {
        group: chosen
        for group in jobs
        if group in options.only and (chosen := [job for job in jobs[group] if job.tool in options.tools])
    }
    threads = f"{options.threads} thread" if options.threads else "as many threads as they take"
    tables = []
    for name in names:
        prepare(place, name)
        tables.append(f"**{name}**\n\n{table(measure(place, name, groups, options.rounds, not options.memory))}")
        if options.memory:
            shutil.rmtree(place.model(name))
    print(f"{date.today()}, {hardware()['cpu']}, {os.cpu_count()} cores, {threads}, {options.rounds} rounds\n")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
