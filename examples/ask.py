"""Ask a model one question with transformers, and print the answer as one JSON object.

    python ask.py MODEL_DIRECTORY [QUESTION]

Greedy, in float32 and with no randomness, so that the same weights give the same answer. `logits_sha256` is a digest of
all logits of the whole conversation: equal digests mean that the model computes the same, bit for bit.
"""

import argparse
import hashlib
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a model one question.")
    parser.add_argument("model")
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    print(json.dumps(ask(model, tokenizer, arguments.question, arguments.max_new_tokens)))


def ask(model, tokenizer, question: str, max_new_tokens: int) -> dict[str, object]:
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        tokens_BT = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        logits_BTV = model(tokens_BT).logits
    answer_T = tokens_BT[0, num_prompt_tokens:]
    return {
        "question": question,
        "answer": tokenizer.decode(answer_T, skip_special_tokens=True).strip(),
        "tokens": len(answer_T),
        "logits_sha256": hashlib.sha256(logits_BTV.contiguous().numpy().tobytes()).hexdigest(),
    }


if __name__ == "__main__":
    main()
