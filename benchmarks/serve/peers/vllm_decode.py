"""vLLM in this process (run it by the python of its own environment): the same prompts, greedy, never ending early."""

from __future__ import annotations

import argparse
import json
import os
import resource
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
               "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}  # fmt: skip


def cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    from vllm import LLM, SamplingParams

    words = argparse.ArgumentParser()
    words.add_argument("model")
    words.add_argument("prompts", type=Path)
    words.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    words.add_argument("--new", type=int, default=64)
    words.add_argument("--dtype", default="float32")
    given = words.parse_args()
    llm = LLM(given.model, dtype=given.dtype, enforce_eager=True, max_model_len=2048, enable_prefix_caching=False)
    prompts = json.loads(given.prompts.read_text(encoding="utf-8"))

    def run(batch: int, new: int) -> float:
        ids = [{"prompt_token_ids": prompts[i % len(prompts)]} for i in range(batch)]
        started = cpu_seconds()
        llm.generate(ids, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True), use_tqdm=False)
        return cpu_seconds() - started

    run(2, 4)
    found = {}
    for batch in given.batch:
        prefill_s, whole_s = run(batch, 1), run(batch, given.new)
        found[batch] = {
            "prefill_tokens_per_cpu_s": batch * len(prompts[0]) / prefill_s,
            "decode_tokens_per_cpu_s": batch * (given.new - 1) / (whole_s - prefill_s),
        }
    print("RESULT " + json.dumps({"batches": found}))


if __name__ == "__main__":
    main()
