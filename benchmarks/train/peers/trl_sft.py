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
        output_dir=str(chosen.work),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=batches["batch"],
        max_steps=batches["steps"],
        max_length=measure.MAX_TOKENS,
        learning_rate=measure.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=measure.MAX_GRAD_NORM,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        gradient_checkpointing=chosen.checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=1,
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
