"""A small Llama with random weights, a long context, and the tokenizer and chat template of SmolLM2.

A step of it takes about a millisecond, so that the server around it is what a test sees. Its answers are noise: they
never end by themselves when `ignore_eos` is set, and they are the same each time.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

NAME = "small"
LONGEST = 16384
NUM_TOKENS = 49152
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def make_small_model(directory: Path, text_of: Path) -> Path:
    """Write the model into a new directory, with the text files of another, and return it."""
    directory.mkdir(parents=True)
    for name in TEXT_FILES:
        shutil.copyfile(text_of / name, directory / name)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
