"""`ferry train` on the rows as text in one process, and its run directory in the form of the other runners.

The peers teach the newline behind `<|im_end|>` too. So that all learn the same tokens, Ferry, which by itself leaves it
out, is given SmolLM2's template with the answer and that newline marked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FLAGS = {"seq-len": 1024, "lr": 1e-4, "dtype": "float32", "tp": 1, "pp": 1, "dp": 1, "export": "none"}
SETTINGS = {
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.beta2": 0.999,
    "lora.rank": 8,
    "lora.alpha": 16,
    "rows.shuffle": "false",
    "rows.chat_template": Path(__file__).resolve().with_name("smollm2_marked.jinja"),
    "crew.threads": 1,
}
"""What is not a default of Ferry, or should not change when a default does."""


def command(python: str, model: Path, batches: Path, method: str, work: Path) -> list[str]:
    facts = json.loads((batches / "batches.json").read_text(encoding="utf-8"))
    flags = {"model": model, "data": batches / "rows.json", "method": method, "output": work, **FLAGS}
    flags |= {"steps": facts["steps"], "global-batch": facts["batch"], "save-every": facts["steps"]}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    return [python, "-m", "ferry", "train", *words, "--json"]


def steps_of(output: Path) -> list[dict[str, Any]]:
    """Return the step lines of metrics.jsonl in order; of a repeated step the later line, of a torn line nothing."""
    steps = {}
    for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
        found = json.loads(line) if line.endswith("\n") else {}
        if "loss" in found:
            steps[found["step"]] = found
    return [steps[number] for number in sorted(steps)]


def result(version: str, batches: Path, method: str, work: Path) -> dict[str, Any]:
    """Sum up the run as measure.result does for the peers."""
    facts = json.loads((batches / "batches.json").read_text(encoding="utf-8"))
    size = facts["batch"]
    lengths = [len(sample["input_ids"]) for sample in facts["samples"]]
    learned = [len(sample["labels"]) - sample["labels"].count(-100) for sample in facts["samples"]]
    starts = range(0, len(lengths), size)
    expected = [(sum(lengths[at : at + size]), sum(learned[at : at + size])) for at in starts]
    steps = steps_of(work)
    measured = steps[1:]
    cpu_s = sum(step["cpu_s"] for step in measured)
    num_tokens = sum(step["num_tokens"] for step in measured)
    return {
        "peer": "Ferry",
        "version": version,
        "method": method,
        "batch": size,
        "checkpointing": False,
        "num_steps": len(measured),
        "num_tokens": num_tokens,
        "num_padded": num_tokens + sum(step["num_padding"] for step in measured),
        "cpu_s": cpu_s,
        "wall_s": sum(step["step_s"] for step in measured),
        "ms_per_token": 1000 * cpu_s / num_tokens,
        "peak_rss_mib": max(step["peak_memory_bytes"] for step in steps) / (1 << 20),
        "first_step_cpu_s": steps[0]["cpu_s"],
        "losses": [step["loss"] for step in steps],
        "same_batches": [(step["num_tokens"], step["num_supervised"]) for step in steps] == expected,
        "steps": [{"cpu_s": step["cpu_s"], "num_tokens": step["num_tokens"], "loss": step["loss"]} for step in steps],
    }
