"""What 8 bits cost, by the engine's own arithmetic: perplexity of a text under each way to hold the weights.

    python benchmarks/serve/perplexity.py MODEL[:w8a8] ... --text FILE --windows 8

Windows of 512 tokens, each a text of its own. The first model named is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from ferry.engines.engine import EngineSettings
from ferry.engines.native.executor import Batch
from ferry.engines.native.fast import open_fast
from ferry.engines.text import open_text

WINDOW = 512


def losses(model: Path, quantization: str, windows: list[list[int]]) -> np.ndarray:
    """Return the negative log-likelihood of every token but the first of each window."""
    engine = open_fast(EngineSettings(model, quantization=quantization, max_model_len=WINDOW))
    assert engine is not None, f"the kernels do not run {model}"
    engine.allocate(WINDOW // engine.block_size)
    places = np.arange(WINDOW)
    found = []
    for window in windows:
        table = np.arange(WINDOW // engine.block_size)[None]
        step = Batch(np.array(window), places, places, np.array([0, WINDOW]), np.array([WINDOW]), table, places)
        logits = engine.forward(step).astype(np.float64)
        top = logits.max(axis=1)
        total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        found.append(total[:-1] - logits[places[:-1], window[1:]])
    return np.concatenate(found)


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("models", nargs="+")
    words.add_argument("--text", type=Path, required=True)
    words.add_argument("--windows", type=int, default=8)
    given = words.parse_args()
    first = Path(given.models[0].partition(":")[0])
    ids = open_text(first).encode(given.text.read_text(encoding="utf-8"), add_special_tokens=False)
    windows = [list(ids[i * WINDOW : (i + 1) * WINDOW]) for i in range(given.windows)]
    assert len(windows[-1]) == WINDOW, "the text is too short"
    reference = None
    for name in given.models:
        model, _, quantization = name.partition(":")
        found = losses(Path(model), quantization, windows)
        reference = found if reference is None else reference
        ratio = float(np.exp(found.mean() - reference.mean()))
        print(json.dumps({"model": name, "perplexity": float(np.exp(found.mean())), "ratio": ratio}))


if __name__ == "__main__":
    main()
