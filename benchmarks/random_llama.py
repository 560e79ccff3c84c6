"""Writes a random Llama of about 3 GB (bfloat16, 3 safetensors files): the load of the conversion benchmark.

    python benchmarks/random_llama.py DIR [LAYERS]

Random bits that are valid, finite bfloat16 values; nothing is held in memory but one tensor.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from ferry.core.safetensors import make_header
from ferry.families.registry import model_of


def config(num_layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 2048,
        "intermediate_size": 6144, "num_hidden_layers": num_layers, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 65536, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
    }  # fmt: skip


def write(directory: Path, num_layers: int, num_files: int = 3) -> None:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config(num_layers), indent=2))
    shapes = list(model_of(config(num_layers), "benchmark").canonical().items())
    generator = np.random.default_rng(0)
    weight_map = {}
    for number in range(num_files):
        name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        own = shapes[number * len(shapes) // num_files : (number + 1) * len(shapes) // num_files]
        header = make_header(((tensor, "BF16", shape) for tensor, shape in own), {"format": "pt"})
        with open(directory / name, "wb") as file:
            file.write(header.raw)
            for tensor, shape in own:
                bits = generator.integers(0, 2**16, size=shape, dtype=np.uint16)
                file.write((bits & 0xBFFF).tobytes())  # clears the top exponent bit: always finite
                weight_map[tensor] = name
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 24)
