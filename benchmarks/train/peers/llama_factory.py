"""LLaMA-Factory's `run_exp` on the rows as text, with the meter as one of its callbacks.

Two things it needs to start at all on a torch for CPUs. It imports torchaudio even for text, and the published
torchaudio is built for CUDA: an empty module takes its place here (nothing of text training touches it). And without
bf16 and fp16 it trains in the type of the checkpoint: `--model` has to be a float32 twin made by float32.py.
"""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import measure

COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}


def main() -> None:
    chosen = measure.options()
    batches = json.loads((chosen.batches / "batches.json").read_text(encoding="utf-8"))
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    from llamafactory.train.tuner import run_exp

    shutil.rmtree(chosen.work, ignore_errors=True)
    data = chosen.work / "data"
    data.mkdir(parents=True)
    shutil.copyfile(chosen.batches / "rows.json", data / "rows.json")
    listed = {"rows": {"file_name": "rows.json", "columns": COLUMNS}}
    (data / "dataset_info.json").write_text(json.dumps(listed), encoding="utf-8")
    settings = {
        "model_name_or_path": str(chosen.model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": {"lora": "lora", "sft": "full"}[chosen.method],
        "dataset": "rows",
        "dataset_dir": str(data),
        "template": "chatml",
        "cutoff_len": measure.MAX_TOKENS,
        "disable_shuffling": True,
        "overwrite_cache": True,
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": not chosen.checkpointing,
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "per_device_train_batch_size": batches["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": batches["steps"],
        "learning_rate": measure.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": measure.MAX_GRAD_NORM,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(chosen.work / "out"),
    }
    if chosen.method == "lora":
        settings |= {
            "lora_rank": measure.LORA_RANK,
            "lora_alpha": measure.LORA_ALPHA,
            "lora_dropout": 0.0,
            "lora_target": "all",
        }
    meter = measure.Meter()
    run_exp(settings, callbacks=[meter])
    measure.result("LLaMA-Factory", "llamafactory", meter, chosen)


if __name__ == "__main__":
    main()
