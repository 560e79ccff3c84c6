"""Measure a model's perplexity on held-out conversations with transformers, and print it as one JSON object.

    python perplexity.py MODEL_DIRECTORY ROWS.jsonl

Each row is a conversation in OpenAI's form. The loss is taken on every token of its last turn, up to the one that ends
it, in float32, one conversation at a time and without padding: nothing of it is Ferry's code, so it may judge what
Ferry trained.
"""

import argparse
import json
import math

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a model's perplexity.")
    parser.add_argument("model")
    parser.add_argument("rows")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    with open(arguments.rows, encoding="utf-8") as file:
        conversations = [json.loads(line)["messages"] for line in file]
    total, count = 0.0, 0
    for messages in conversations:
        loss, tokens = answer_loss(model, tokenizer, messages)
        total, count = total + loss, count + tokens
    print(json.dumps({"conversations": len(conversations), "tokens": count, "perplexity": math.exp(total / count)}))


def answer_loss(model, tokenizer, messages) -> tuple[float, int]:
    """Return the sum of the losses of the last turn's tokens, and their number."""
    whole_T = tokenize(tokenizer, messages)
    prompt_T = tokenize(tokenizer, messages[:-1], add_generation_prompt=True)
    with torch.inference_mode():
        logits_TV = model(whole_T[None]).logits[0, len(prompt_T) - 1 : -1]
    answer_T = whole_T[len(prompt_T) :]
    return float(torch.nn.functional.cross_entropy(logits_TV, answer_T, reduction="sum")), len(answer_T)


def tokenize(tokenizer, messages, **options) -> torch.Tensor:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    text = text if options else text.rstrip("\n")
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]


if __name__ == "__main__":
    main()
