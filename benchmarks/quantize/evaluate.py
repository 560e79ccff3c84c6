"""The one judge of all results: how far a quantized model is from its original, on text that no quantizer has seen.

    python benchmarks/quantize/evaluate.py ORIGINAL WINDOWS RESULT [RESULT ...]

The models are loaded by transformers (with compressed-tensors for the quantized ones) in float32 and run side by side,
window by window. Integers are what the files hold; activations are rounded to int8 as the checkpoint's own scheme says.
Prints one JSON object a result: KL(original || quantized) in nats, mean of all predictions and by window, its 99th
percentile, top-1 agreement, perplexities.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

Facts = dict[str, object]


def load(path: Path) -> PreTrainedModel:
    """Load a model; refuse one of which transformers did not find every weight, or not every weight a place."""
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    if lost := sorted([*found["missing_keys"], *found["unexpected_keys"]]):
        raise SystemExit(f"transformers has no place or no weight for {len(lost)} tensors, such as {lost[0]}")
    return model.eval()


def compare(original: PreTrainedModel, quantized: PreTrainedModel, windows: list[list[int]]) -> Facts:
    kl, same, losses, losses_original = [], [], [], []
    for ids in windows:
        ids_BT = torch.tensor([ids])
        with torch.no_grad():
            expected_TV = original(ids_BT).logits[0, :-1].float().log_softmax(-1)
            found_TV = quantized(ids_BT).logits[0, :-1].float().log_softmax(-1)
        kl.append((expected_TV.exp() * (expected_TV - found_TV)).sum(-1))
        same.append((expected_TV.argmax(-1) == found_TV.argmax(-1)).float())
        next_T1 = ids_BT[0, 1:, None]
        losses.append(-found_TV.gather(-1, next_T1))
        losses_original.append(-expected_TV.gather(-1, next_T1))
    every = torch.cat(kl)
    return {
        "kl": every.mean().item(),
        "kl_by_window": [each.mean().item() for each in kl],
        "kl_p99": every.quantile(0.99).item(),
        "top1": torch.cat(same).mean().item(),
        "perplexity": torch.cat(losses).mean().exp().item(),
        "perplexity_original": torch.cat(losses_original).mean().exp().item(),
        "tokens": every.numel(),
    }


def main() -> None:
    logging.set_verbosity_error()
    original, windows = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))["evaluation"]
    reference = load(original)
    for result in sys.argv[3:]:
        start = time.process_time()
        found = compare(reference, load(Path(result)), windows)
        print(json.dumps({"result": result, **found, "judging_cpu_s": time.process_time() - start}), flush=True)


if __name__ == "__main__":
    main()
