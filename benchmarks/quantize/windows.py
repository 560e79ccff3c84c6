"""The text that every quantizer of this benchmark gets, and the text that judges them: windows of token ids.

    python benchmarks/quantize/windows.py MODEL DATA OUTPUT

DATA holds `c4_demo.jsonl` and `wiki_demo.txt` of hiyouga/LLaMA-Factory. Documents are joined by a blank line, tokenised
without special tokens and cut in windows of 512. Calibration is the first 16 windows of the C4 file; evaluation the
first 4 of the Wikipedia file, so that nothing is judged on text it was tuned on.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW_TOKENS = 512
NUM_CALIBRATION = 16
NUM_EVALUATION = 4


def cut(tokenizer: PreTrainedTokenizerBase, text: str, num_windows: int) -> list[list[int]]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < num_windows * WINDOW_TOKENS:
        raise SystemExit(f"{len(ids)} tokens are too few for {num_windows} windows of {WINDOW_TOKENS}")
    return [ids[at * WINDOW_TOKENS : (at + 1) * WINDOW_TOKENS] for at in range(num_windows)]


def digest(windows: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(windows).encode()).hexdigest()


def main() -> None:
    from transformers import AutoTokenizer

    model, data, output = map(Path, sys.argv[1:])
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (data / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    calibration = cut(tokenizer, "\n\n".join(json.loads(line)["text"] for line in lines), NUM_CALIBRATION)
    evaluation = cut(tokenizer, (data / "wiki_demo.txt").read_text(encoding="utf-8"), NUM_EVALUATION)
    found = {"calibration": calibration, "evaluation": evaluation}
    output.write_text(json.dumps({**found, "sha256": {name: digest(each) for name, each in found.items()}}))


if __name__ == "__main__":
    main()
