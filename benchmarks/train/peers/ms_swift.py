"""ms-swift's own command line, `swift sft`, on the rows as text; the meter is a callback registered as its plugins are.

ms-swift reads and renders the rows itself, with its ChatML template, whose words are those of SmolLM2's. Whether the
tokens are the same is checked batch by batch. Its defaults that are other mathematics (weight decay 0.1, beta2 0.95,
shuffling, cosine) are set to what the others do; what only costs time (recomputation) is `--checkpointing`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from swift.callbacks import callbacks_map
from swift.pipelines import sft_main

sys.path.insert(0, str(Path(__file__).parents[1]))
import measure


def main() -> None:
    chosen = measure.options()
    batches = json.loads((chosen.batches / "batches.json").read_text(encoding="utf-8"))
    meter = measure.Meter()

    def metered(args: Any, trainer: Any) -> measure.Meter:
        return meter

    callbacks_map["meter"] = metered
    settings = {
        "model": chosen.model,
        "model_type": "llama",
        "template": "chatml",
        "dataset": chosen.batches / "rows.json",
        "tuner_type": {"lora": "lora", "sft": "full"}[chosen.method],
        "torch_dtype": "float32",
        "fp16": "false",
        "bf16": "false",
        "use_cpu": "true",
        "attn_impl": "sdpa",
        "per_device_train_batch_size": batches["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": batches["steps"],
        "max_length": measure.MAX_TOKENS,
        "learning_rate": measure.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "weight_decay": 0,
        "adam_beta2": 0.999,
        "max_grad_norm": measure.MAX_GRAD_NORM,
        "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        "split_dataset_ratio": 0,
        "dataloader_num_workers": 0,
        "gradient_checkpointing": str(chosen.checkpointing).lower(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": chosen.work,
        "callbacks": "meter",
    }
    if chosen.method == "lora":
        settings |= {
            "lora_rank": measure.LORA_RANK,
            "lora_alpha": measure.LORA_ALPHA,
            "lora_dropout": 0,
            "target_modules": "all-linear",
        }
    sft_main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
    measure.result("ms-swift", "ms-swift", meter, chosen)


if __name__ == "__main__":
    main()
