"""The SFTTrainer of TRL on tokenised samples in the given order; `--checkpointing` gives its default, recomputation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
import measure


def main() -> None:
    chosen = measure.options()
    batches = json.loads((chosen.batches / "batches.json").read_text(encoding="utf-8"))
    lora = None
    if chosen.method == "lora":
        from peft import LoraConfig

        lora = LoraConfig(
            r=measure.LORA_RANK,
            lora_alpha=measure.LORA_ALPHA,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    arguments = SFTConfig(
        **measure.trainer_arguments(batches, chosen.work),
        bf16=False,
        max_length=measure.MAX_TOKENS,
        gradient_checkpointing=chosen.checkpointing,
    )
    samples = [{name: sample[name] for name in ("input_ids", "labels")} for sample in batches["samples"]]
    meter = measure.Meter()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(samples),
        processing_class=AutoTokenizer.from_pretrained(chosen.model),
        peft_config=lora,
        callbacks=[meter],
    )
    trainer.train()
    measure.result("TRL SFTTrainer", "trl", meter, chosen)


if __name__ == "__main__":
    main()
