"""transformers' own generate, eager, float32, one thread; the same prompts as Ferry gets, never ending early."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("model")
    words.add_argument("prompts", type=Path)
    words.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    words.add_argument("--new", type=int, default=64)
    given = words.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    prompts = json.loads(given.prompts.read_text(encoding="utf-8"))

    def run(batch: int, new: int) -> float:
        ids = torch.tensor([prompts[i % len(prompts)] for i in range(batch)])
        started = time.process_time()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new,
                           max_new_tokens=new, pad_token_id=0)  # fmt: skip
        return time.process_time() - started

    run(2, 4)
    found = {}
    for batch in given.batch:
        prefill_s, whole_s = run(batch, 1), run(batch, given.new)
        found[batch] = {
            "prefill_tokens_per_cpu_s": batch * len(prompts[0]) / prefill_s,
            "decode_tokens_per_cpu_s": batch * (given.new - 1) / (whole_s - prefill_s),
        }
    print(json.dumps({"batches": found}))


if __name__ == "__main__":
    main()
