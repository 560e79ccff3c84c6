"""Write a model's float32 twin: for LLaMA-Factory, which has no switch to train a bfloat16 checkpoint in float32.

python benchmarks/train/float32.py MODEL OUTPUT
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    model, output = Path(sys.argv[1]), Path(sys.argv[2])
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        shutil.copyfile(model / name, output / name)


if __name__ == "__main__":
    main()
