"""One quantization by llm-compressor, as its own examples do it. Runs in an environment of its own.

    python benchmarks/quantize/peers/llm_compressor.py METHOD MODEL WINDOWS OUTPUT [--dtype float32] [--threads N]

METHOD is smoothquant (strength 0.5, W8A8), rtn (W8A8), awq (W4A16, asymmetric, groups of 64), rtn4 (the same grid
without AWQ) or stream (its `model_free_ptq`, W8A8). WINDOWS is the JSON of windows.py.
AWQ pins memory for an accelerator and fails where there is none: here pinning does nothing. That is the one change.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from datasets import Dataset

GROUP_SIZE = 64
NO_QUANTIZING = ["lm_head", "re:.*gate$", "re:.*router.*"]


def recipe(method: str) -> list[object]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if method in ("rtn", "smoothquant"):
        int8 = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=NO_QUANTIZING)
        return [SmoothQuantModifier(smoothing_strength=0.5), int8] if method == "smoothquant" else [int8]
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=GROUP_SIZE, symmetric=False)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    int4 = QuantizationModifier(config_groups=groups, ignore=NO_QUANTIZING)
    return [AWQModifier(), int4] if method == "awq" else [int4]


def dataset(path: Path) -> Dataset:
    from datasets import Dataset

    windows = json.loads(path.read_text(encoding="utf-8"))["calibration"]
    return Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(each) for each in windows]})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=["smoothquant", "rtn", "awq", "rtn4", "stream"])
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", default="float32", help="what the model is loaded as; auto is the checkpoint's own")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.method == "stream":
        from llmcompressor import model_free_ptq

        places = {"model_stub": str(options.model), "save_directory": str(options.output)}
        model_free_ptq(**places, scheme="W8A8", ignore=NO_QUANTIZING, max_workers=1, device="cpu")
        return
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if options.method == "awq":
        torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    arguments = {"model": model, "recipe": recipe(options.method)}
    if options.method in ("smoothquant", "awq"):
        rows = dataset(options.windows)
        arguments |= {
            "dataset": rows,
            "num_calibration_samples": len(rows),
            "max_seq_length": len(rows[0]["input_ids"]),
        }
        arguments |= {"shuffle_calibration_samples": False}
    start = time.process_time()
    oneshot(**arguments)
    quantizing = time.process_time() - start
    model.save_pretrained(options.output, save_compressed=True)
    if (options.model / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output)
    sys.stdout.write("\n" + json.dumps({"quantizing_cpu_s": quantizing}) + "\n")


if __name__ == "__main__":
    main()
