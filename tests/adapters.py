"""LoRA adapters with random matrices for the models of `models.py`, as Ferry writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ferry.core.progress import Reporter
from ferry.core.staging import StagedDirectory
from ferry.formats.opening import open_checkpoint
from ferry.formats.peft_targets import target_modules
from ferry.formats.peft_write import Making, base_of, new_config, write_adapter


def make_adapter(
    model: Path, target: Path, words: Sequence[str] = ("all-linear",), *, rank: int = 4, seed: int = 1, **settings: Any
) -> Path:
    """Write an adapter for a model: both matrices random, so that its change is of the size of the weights."""
    source = open_checkpoint(model)
    modules = target_modules(source.model, words)
    shapes = source.model.canonical()
    random = np.random.default_rng(seed)
    tensors = {}
    for module in modules:
        rows, cols = shapes[f"{module}.weight"]
        tensors[f"{module}.lora_A.weight"] = random.normal(0, 0.2, (rank, cols)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = random.normal(0, 0.2, (rows, rank)).astype(np.float32)
    config = new_config(source.model, modules, rank=rank, alpha=6, base_name=model.name, **settings)
    with StagedDirectory(target) as staged:
        write_adapter(
            staged.work, config, tensors, base=base_of(source, Reporter()), making=Making(target.name, "random")
        )
        staged.commit()
    return target
