"""What a schema costs at 32 streams: free and guided decoding in turns, in one process, so that noise meets both.

python benchmarks/serve/guided.py MODEL PROMPTS.json [--turns 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from ferry_decode import grammar_of_schema

from ferry.engines.engine import EngineSettings
from ferry.engines.native.loop import NativeEngine
from ferry.engines.request import Request, Sampling

STREAMS, NEW_TOKENS = 32, 40


def decode_rate(engine: NativeEngine, prompts: list[list[int]], grammar: str, new: int, tag: str) -> float:
    """Return decoded tokens a CPU second, without the prefill."""
    for i in range(STREAMS):
        sampling = Sampling(max_tokens=new, temperature=0.0)
        engine.add(Request(f"{tag}-{i}", tuple(prompts[i % len(prompts)]), sampling, grammar))
    made = 0
    while made < STREAMS:
        made += sum(len(output.token_ids) for output in engine.step())
    begun_s, begun = time.process_time(), made
    while engine.has_work:
        made += sum(len(output.token_ids) for output in engine.step())
    return (made - begun) / max(time.process_time() - begun_s, 1e-9)


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("model", type=Path)
    words.add_argument("prompts", type=Path)
    words.add_argument("--turns", type=int, default=5)
    given = words.parse_args()
    prompts = json.loads(given.prompts.read_text(encoding="utf-8"))
    engine, grammar = NativeEngine(EngineSettings(given.model, threads=1, max_model_len=2048)), grammar_of_schema()
    decode_rate(engine, prompts, "", 2, "warm")
    decode_rate(engine, prompts, grammar, 2, "warm-guided")
    turns = []
    for turn in range(given.turns):
        free = decode_rate(engine, prompts, "", NEW_TOKENS, f"free-{turn}")
        turns.append((free, decode_rate(engine, prompts, grammar, NEW_TOKENS, f"guided-{turn}")))
    costs = sorted(1 - guided / free for free, guided in turns)
    print(json.dumps({"turns": turns, "cost": statistics.median(costs), "least": costs[0], "most": costs[-1]}))
    engine.close()


if __name__ == "__main__":
    main()
