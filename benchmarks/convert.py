"""Conversion against `cp -r` of the same files: wall time, CPU seconds and peak memory, paired, medians.

    python benchmarks/convert.py [--runs 5] [--layers 24] [--work bench-work] [--json FILE]

Every run times `cp -r` first (as it is, and with a sync), then each job, so that a ratio compares neighbours in time.
`cp` leaves its pages to be written later; Ferry syncs before its result becomes visible, so both ratios are given.
The source is a random Llama of 2.95 GB (24 layers). Prints the table of docs/benchmarks.md.
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

from ferry.core.environment import hardware

JOBS = {
    "hf2mg TP2 PP2": ["hf2mg", "model", "out", "--tp", "2", "--pp", "2"],
    "hf2mg TP2 PP2, no sha256": ["hf2mg", "model", "out", "--tp", "2", "--pp", "2", "--no-hash"],
    "hf2mg TP4 PP1": ["hf2mg", "model", "out", "--tp", "4"],
    "mg2mg TP2 PP2 -> TP4 PP1": ["mg2mg", "shards", "out", "--tp", "4"],
    "mg2mg TP2 PP2 -> TP4 PP1, no sha256": ["mg2mg", "shards", "out", "--tp", "4", "--no-hash"],
    "mg2hf TP2 PP2": ["mg2hf", "shards", "out"],
    "mg2hf TP2 PP2, no sha256": ["mg2hf", "shards", "out", "--no-hash"],
}
MEBIBYTE = 1 << 20


def timed(command: list[str], work: Path) -> dict[str, float]:
    """Run a command and return its wall seconds, CPU seconds and peak resident MiB, as the system counted them."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "rss_mib": usage.ru_maxrss * 1024 / MEBIBYTE}


def fresh(work: Path) -> None:
    """Remove the last result and let the disk come to rest, so that no run pays for the one before."""
    shutil.rmtree(work / "out", ignore_errors=True)
    os.sync()


def measure(work: Path, runs: int) -> list[dict[str, dict[str, float]]]:
    ferry = [sys.executable, "-m", "ferry", "convert", "--quiet"]
    rounds = []
    for number in range(runs + 1):
        found = {}
        fresh(work)
        found["cp -r"] = timed(["cp", "-r", "model", "out"], work)
        fresh(work)
        found["cp -r, synced"] = timed(["sh", "-c", "cp -r model out && sync -f out"], work)
        for name, words in JOBS.items():
            fresh(work)
            found[name] = timed([*ferry, *words], work)
        fresh(work)
        found["verify (reads only)"] = timed([sys.executable, "-m", "ferry", "verify", "shards", "--quiet"], work)
        if number:  # the first round only warms the page cache
            rounds.append(found)
            print(f"round {number} of {runs} done", file=sys.stderr)
    return rounds


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    def median(name: str, key: str) -> float:
        return statistics.median(found[name][key] for found in rounds)

    def ratio(name: str, base: str, key: str) -> str:
        values = sorted(found[name][key] / found[base][key] for found in rounds)
        return f"{statistics.median(values):.2f} ({values[0]:.2f}-{values[-1]:.2f})"

    lines = [
        "| job | wall s | wall / cp | wall / cp synced | CPU s | CPU / cp | peak RSS MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in rounds[0]:
        cells = [
            f"{median(name, 'wall_s'):.2f}",
            ratio(name, "cp -r", "wall_s"),
            ratio(name, "cp -r, synced", "wall_s"),
        ]
        cells += [f"{median(name, 'cpu_s'):.2f}", ratio(name, "cp -r", "cpu_s"), f"{median(name, 'rss_mib'):.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["FERRY_HOME"] = str(work / "home")
    generator = Path(__file__).with_name("random_llama.py")
    if not (work / "model" / "model.safetensors.index.json").exists():
        shutil.rmtree(work / "model", ignore_errors=True)
        subprocess.run([sys.executable, str(generator), str(work / "model"), str(options.layers)], check=True)
    shutil.rmtree(work / "shards", ignore_errors=True)
    timed([sys.executable, "-m", "ferry", "convert", "--quiet", "model", "shards", "--tp", "2", "--pp", "2"], work)
    rounds = measure(work, options.runs)
    fresh(work)
    load = os.getloadavg()[0]
    num_bytes = sum(path.stat().st_size for path in (work / "model").iterdir())
    machine = f"{hardware()['cpu']}, {os.cpu_count()} cores, load {load:.1f}"
    print(f"{date.today()}, {machine}, {num_bytes / 1e9:.2f} GB, ", end="")
    print(f"{len(rounds)} rounds, medians (ratios: median, least and most of the pairs)\n\n{table(rounds)}")
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=1))


if __name__ == "__main__":
    main()
