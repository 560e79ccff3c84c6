"""Measure a model's perplexity on held-out conversations with transformers, and print it as one JSON object.

    python perplexity.py MODEL_DIRECTORY ROWS.jsonl [--against MODEL_DIRECTORY]

Each row is a conversation in OpenAI's form. The loss is taken on every token of its last turn, up to the one that ends
it, in float32, one conversation at a time and without padding: nothing of it is Ferry's code, so it may judge what
Ferry trained or quantized.

`--against` names the original: its perplexity and the ratio to it, the mean KL divergence from its predictions, and the
share of tokens where both models have the same first choice.
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
    parser.add_argument("--against", metavar="MODEL", help="the original to compare predictions with")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    models = [load(path) for path in (arguments.model, arguments.against) if path]
    with open(arguments.rows, encoding="utf-8") as file:
        conversations = [json.loads(line)["messages"] for line in file]
    sums = {"loss": 0.0, "loss_original": 0.0, "kl": 0.0, "same": 0.0}
    count = 0
    for messages in conversations:
        found, tokens = answer_sums(models, tokenizer, messages)
        sums = {name: total + found.get(name, 0.0) for name, total in sums.items()}
        count += tokens
    means = {name: total / count for name, total in sums.items()}
    result = {"conversations": len(conversations), "tokens": count, "perplexity": math.exp(means["loss"])}
    if arguments.against:
        result |= {
            "perplexity_original": math.exp(means["loss_original"]),
            "perplexity_ratio": math.exp(means["loss"] - means["loss_original"]),
            "kl": means["kl"],
            "top1": means["same"],
        }
    print(json.dumps(result))


def load(path: str):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def answer_sums(models, tokenizer, messages) -> tuple[dict[str, float], int]:
    """Return sums over the last turn's tokens (loss, and with an original its loss, KL, same choices), and how many."""
    whole_T = tokenize(tokenizer, messages)
    prompt_T = tokenize(tokenizer, messages[:-1], add_generation_prompt=True)
    answer_T = whole_T[len(prompt_T) :]
    with torch.inference_mode():
        predictions = [model(whole_T[None]).logits[0, len(prompt_T) - 1 : -1].log_softmax(dim=-1) for model in models]
    sums = {"loss": float(torch.nn.functional.nll_loss(predictions[0], answer_T, reduction="sum"))}
    if len(models) == 2:
        found_TV, original_TV = predictions
        sums["loss_original"] = float(torch.nn.functional.nll_loss(original_TV, answer_T, reduction="sum"))
        sums["kl"] = float((original_TV.exp() * (original_TV - found_TV)).sum())
        sums["same"] = float((original_TV.argmax(-1) == found_TV.argmax(-1)).sum())
    return sums, len(answer_T)


def tokenize(tokenizer, messages, **options) -> torch.Tensor:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    text = text if options else text.rstrip("\n")
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]


if __name__ == "__main__":
    main()
