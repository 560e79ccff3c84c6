"""The Trainer of transformers, with peft for LoRA: padding to the longest of the batch, samples in the given order."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
import measure


def main() -> None:
    chosen = measure.options()
    batches = json.loads((chosen.batches / "batches.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    if chosen.method == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=measure.LORA_RANK,
            lora_alpha=measure.LORA_ALPHA,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)

    def padded(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = [torch.tensor(sample["input_ids"]) for sample in samples]
        labels = [torch.tensor(sample["labels"]) for sample in samples]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=batches["pad_token_id"]),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True, padding_value=0),
            "labels": pad(labels, batch_first=True, padding_value=-100),
        }

    arguments = TrainingArguments(
        **measure.trainer_arguments(batches, chosen.work),
        remove_unused_columns=False,
        activation_checkpointing=chosen.checkpointing,
    )
    meter = measure.Meter()
    trainer = Trainer(
        model=model, args=arguments, data_collator=padded, train_dataset=batches["samples"], callbacks=[meter]
    )
    trainer.train()
    measure.result("HF Trainer", "transformers", meter, chosen)


if __name__ == "__main__":
    main()
