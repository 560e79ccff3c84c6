"""The batches that every trainer of this benchmark gets: which samples, in which order, tokenised how.

    python benchmarks/train/batches.py --model MODEL --data alpaca_en_demo.json --batch 4 --steps 4 --output DIR

Padding depends on who meets whom in a batch, so a lucky draw could decide the whole comparison. Of 500 shuffles the one
is taken whose measured steps (all but the first, which warms up) are nearest to the mean of them all, in tokens per
sample and in padding. Two files hold the same samples in the same order: `batches.json` as tokens and labels, for
trainers that take tokens, and `rows.json` as alpaca rows, for trainers that insist on reading text themselves.
Supervised is what the chat template adds for the answer: the text, the end of turn and the newline after it, as in the
peers' own templates.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_SHUFFLES = 500
IGNORED = -100
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # what the template adds by itself


class Row(TypedDict):
    instruction: str
    input: str
    output: str


class Sample(TypedDict):
    row: int
    input_ids: list[int]
    labels: list[int]


class Draw(NamedTuple):
    """An order of samples, and how it compares with the mean of all shuffles."""

    seed: int
    order: list[int]
    padding: float
    tokens_per_sample: float


def question(row: Row) -> str:
    return row["instruction"] + ("\n" + row["input"] if row["input"] else "")


def tokenised(tokenizer: PreTrainedTokenizerBase, number: int, row: Row) -> Sample:
    """Render with the model's own chat template; the supervised tokens are those after the rendered prompt."""
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question(row)}]
    answered = [*asked, {"role": "assistant", "content": row["output"]}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    assert whole.startswith(prompt)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = encoded["input_ids"]
    labels = [
        token if start >= len(prompt) else IGNORED
        for token, (start, _) in zip(input_ids, encoded["offset_mapping"], strict=True)
    ]
    return {"row": number, "input_ids": input_ids, "labels": labels}


def padding(lengths: list[int], batch: int) -> float:
    """Tokens of padded batches over real tokens."""
    batches = [lengths[at : at + batch] for at in range(0, len(lengths), batch)]
    return sum(max(each) * len(each) for each in batches) / sum(lengths)


def draw(lengths: list[int], batch: int, steps: int) -> tuple[Draw, Draw]:
    """Return the shuffle nearest to the mean, and that mean."""
    draws = []
    for seed in range(NUM_SHUFFLES):
        order = random.Random(seed).sample(range(len(lengths)), batch * steps)
        measured = [lengths[number] for number in order[batch:]]
        draws.append(Draw(seed, order, padding(measured, batch), statistics.fmean(measured)))
    mean_padding = statistics.fmean(each.padding for each in draws)
    mean_tokens = statistics.fmean(lengths)
    nearest = min(
        draws,
        key=lambda each: abs(each.padding / mean_padding - 1) + abs(each.tokens_per_sample / mean_tokens - 1),
    )
    return nearest, Draw(-1, [], mean_padding, mean_tokens)


def write(model: Path, data: Path, batch: int, steps: int, output: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows: list[Row] = json.loads(data.read_text(encoding="utf-8"))
    samples = [tokenised(tokenizer, number, row) for number, row in enumerate(rows)]
    drawn, mean = draw([len(sample["input_ids"]) for sample in samples], batch, steps)
    output.mkdir(parents=True, exist_ok=True)
    facts = {
        "batch": batch,
        "steps": steps,
        "seed": drawn.seed,
        "pad_token_id": tokenizer.pad_token_id,
        "padding": drawn.padding,
        "padding_mean": mean.padding,
        "tokens_per_sample": drawn.tokens_per_sample,
        "tokens_per_sample_mean": mean.tokens_per_sample,
        "samples": [samples[number] for number in drawn.order],
    }
    (output / "batches.json").write_text(json.dumps(facts), encoding="utf-8")
    ordered = [{"system": SYSTEM, **rows[number]} for number in drawn.order]
    (output / "rows.json").write_text(json.dumps(ordered, ensure_ascii=False, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    write(options.model, options.data, options.batch, options.steps, options.output)


if __name__ == "__main__":
    main()
