"""Ferry's native engine in this process: prompts as tokens in a JSON file, so many at once; CPU seconds out.

    python benchmarks/serve/ferry_decode.py MODEL PROMPTS.json --batch 1 8 32 --new 64 [--quantization w8a8]

A run with one new token is the prefill; what a run with all of them takes longer is the decoding.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from ferry.engines.engine import EngineSettings
from ferry.engines.native.loop import NativeEngine
from ferry.engines.request import Request, Sampling

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 3, "maxItems": 8},
        "kind": {"enum": ["leather", "chainmail", "plate"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 1000},
        "text": {"type": "string", "minLength": 200, "maxLength": 4000},
    },
    "required": ["name", "tags", "kind", "score", "text"],
}


def grammar_of_schema() -> str:
    """Return the schema above as the front end would hand it to an engine."""
    from ferry.guided.building import build
    from ferry.guided.request import constraint_of

    constraint = constraint_of({"guided_json": SCHEMA})
    assert constraint is not None
    return build(constraint, lambda: None).lark


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("model", type=Path)
    words.add_argument("prompts", type=Path)
    words.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    words.add_argument("--new", type=int, default=64)
    words.add_argument("--quantization", default="")
    words.add_argument("--threads", type=int, default=1)
    given = words.parse_args()
    prompts = json.loads(given.prompts.read_text(encoding="utf-8"))
    settings = EngineSettings(
        given.model, quantization=given.quantization, threads=given.threads, prefix_caching=False, max_model_len=2048
    )
    engine = NativeEngine(settings)

    def run(batch: int, new: int) -> tuple[float, int]:
        for i in range(batch):
            prompt = tuple(prompts[i % len(prompts)])
            engine.add(Request(f"{batch}-{new}-{i}", prompt, Sampling(max_tokens=new, temperature=0.0)))
        started, made = time.process_time(), 0
        while engine.has_work:
            made += sum(len(output.token_ids) for output in engine.step())
        return time.process_time() - started, made

    run(2, 8)
    found = {}
    for batch in given.batch:
        prefill_s, _ = run(batch, 1)
        whole_s, made = run(batch, given.new)
        found[batch] = {
            "prefill_tokens_per_cpu_s": sum(len(prompts[i % len(prompts)]) for i in range(batch)) / prefill_s,
            "decode_tokens_per_cpu_s": (made - batch) / (whole_s - prefill_s),
            "made": made,
        }
    print(json.dumps({"batches": found, "notes": engine.info.notes}))
    engine.close()


if __name__ == "__main__":
    main()
