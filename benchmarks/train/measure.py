"""What is measured of a trainer built on the Trainer of transformers, from outside and without changing its math.

A callback takes the CPU time of this process between the ends of steps: data, forward, backward, clipping, optimizer
and logging. A hook before the model's forward looks at the batch: how many real and padded tokens, and whether they are
the tokens of `batches.json` in its order. The first step warms up; it is reported and left out of the sums.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

LEARNING_RATE = 1e-4
LORA_RANK = 8
LORA_ALPHA = 16
MAX_GRAD_NORM = 1.0
MAX_TOKENS = 1024  # longer than any sample of the set: nothing is cut


def options() -> argparse.Namespace:
    """The command line that all runners share; threads are set here, before anything computes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--batches", type=Path, required=True, help="directory made by batches.py")
    parser.add_argument("--method", choices=["lora", "sft"], required=True)
    parser.add_argument("--work", type=Path, required=True, help="directory for what the peer leaves behind")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, a default of some")
    torch.set_num_threads(1)
    return parser.parse_args()


def trainer_arguments(batches: dict[str, Any], work: Path) -> dict[str, Any]:
    """The settings that all trainers on transformers' Trainer share: the samples in their order, and the same AdamW."""
    return {
        "output_dir": str(work),
        "use_cpu": True,
        "per_device_train_batch_size": batches["batch"],
        "max_steps": batches["steps"],
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }


@dataclass
class Step:
    cpu_s: float
    wall_s: float
    num_tokens: int
    num_padded: int
    digest: str
    loss: float = float("nan")


def digest(rows: Iterable[list[int]]) -> str:
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()[:16]


def expected_digests(batches: dict[str, Any]) -> list[str]:
    rows = [sample["input_ids"] for sample in batches["samples"]]
    return [digest(rows[at : at + batches["batch"]]) for at in range(0, len(rows), batches["batch"])]


@dataclass
class Meter(TrainerCallback):
    """Counts one run. A callback of transformers has to be a subclass; the fields are what it has seen so far."""

    steps: list[Step] = field(default_factory=list)
    batch: tuple[int, int, str] = (0, 0, "")
    cpu_s: float = 0.0
    wall_s: float = 0.0
    dtypes: set[str] = field(default_factory=set)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.dtypes = {str(parameter.dtype) for parameter in model.parameters()}
        model.register_forward_pre_hook(self.look, with_kwargs=True)
        self.cpu_s, self.wall_s = time.process_time(), time.perf_counter()

    def look(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.bool()
        rows = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
        self.batch = (sum(map(len, rows)), ids.numel(), digest(rows))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        self.steps.append(Step(cpu_s - self.cpu_s, wall_s - self.wall_s, *self.batch))
        self.cpu_s, self.wall_s = cpu_s, wall_s

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.steps[-1].loss = float(logs["loss"])


def result(peer: str, package: str, meter: Meter, chosen: argparse.Namespace) -> None:
    """Print one JSON object: the last line of every runner."""
    batches = json.loads((chosen.batches / "batches.json").read_text(encoding="utf-8"))
    measured = meter.steps[1:]
    cpu_s = sum(step.cpu_s for step in measured)
    num_tokens = sum(step.num_tokens for step in measured)
    found = {
        "peer": peer,
        "version": importlib.metadata.version(package),
        "transformers": importlib.metadata.version("transformers"),
        "torch": torch.__version__,
        "method": chosen.method,
        "batch": batches["batch"],
        "checkpointing": chosen.checkpointing,
        "dtypes": sorted(meter.dtypes),
        "num_steps": len(measured),
        "num_tokens": num_tokens,
        "num_padded": sum(step.num_padded for step in measured),
        "cpu_s": cpu_s,
        "wall_s": sum(step.wall_s for step in measured),
        "ms_per_token": 1000 * cpu_s / num_tokens,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_step_cpu_s": meter.steps[0].cpu_s,
        "losses": [step.loss for step in meter.steps],
        "same_batches": [step.digest for step in meter.steps] == expected_digests(batches),
        "steps": [vars(step) for step in meter.steps],
    }
    sys.stdout.write("\n" + json.dumps(found) + "\n")
