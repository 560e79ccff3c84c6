"""What the tests of quantization share: tiny models with a tokenizer of bytes, text, and two ways to quantize.

`quantized` does everything `ferry quantize` does, but cuts its text in this process, where transformers is imported
already: a run takes a second. `command` starts the real program.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ferry.core.gather import Sources
from ferry.core.progress import Reporter
from ferry.core.verb import Result
from ferry.data.windows import windows
from ferry.engines.blocks import Blocks
from ferry.formats.hf import open_hf
from ferry.verbs.quantize import run as verb
from ferry.verbs.quantize.config import QuantizeConfig
from ferry.verbs.quantize.manual import resolve
from ferry.verbs.quantize.plan import prepare
from forked import REAL, Forked
from surroundings import without_hub
from words import words_of

SPECIAL = ("<unk>", "<s>", "</s>")
VOCAB = 256 + len(SPECIAL) + 1
TOKENS = 32
FEW: dict[str, Any] = {"samples": 8, "seq_len": TOKENS, "threads": 1, "limits": {"max_kl": 100.0, "min_top1": 0.0,
                       "max_perplexity_ratio": 100.0}}  # fmt: skip
"""Small windows; limits that random weights keep."""
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": VOCAB, "bos_token_id": 257,
    "eos_token_id": 258, "tie_word_embeddings": False,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-bf16": ("Llama", {"dtype": torch.bfloat16}),
    "llama-long": ("Llama", {"num_hidden_layers": 6}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2-sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2-f16": ("Qwen2", {"dtype": torch.float16}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "glm": ("Glm", {"head_dim": 8, "attention_bias": True, "pad_token_id": 0}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                               "mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen3-moe-bf16": ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                                    "moe_intermediate_size": 32, "dtype": torch.bfloat16}),
}  # fmt: skip


def with_few(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with the small ones where they say nothing else; no limits where nothing is measured."""
    measures = options.get("evaluate", True) and (
        options.get("method") != "rtn" or "data" in options or "evaluation" in options
    )
    return {name: value for name, value in FEW.items() if measures or name != "limits"} | options


@cache
def _transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def write_model(kind: str, directory: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Write a random model. Some channels of its norms are far larger than others, as in trained models."""
    transformers = _transformers()
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **fields}, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            if parameter.ndim == 1 and name.endswith("weight"):
                values = 1 + values
                if name.endswith("layernorm.weight"):
                    values[::11] *= 8
            parameter.copy_(values * (5 if "embed" in name else 1))
    model.save_pretrained(directory)
    return add_tokenizer(directory)


def add_tokenizer(directory: Path) -> Path:
    """Put a tokenizer with a token for every byte beside a model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    fast.save_pretrained(directory)
    return directory


def write_text(path: Path, count: int = 40, seed: int = 3) -> Path:
    """Write rows of text, the same on every machine."""
    draw = random.Random(seed)
    letters = [chr(number) for number in range(33, 250)]
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            words = ["".join(draw.choices(letters, k=draw.randrange(2, 9))) for _ in range(draw.randrange(5, 12))]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def settings(**options: Any) -> QuantizeConfig:
    return QuantizeConfig.model_validate(with_few(options))


def quantized(reporter: Reporter | None = None, **options: Any) -> Result:
    """Quantize as `ferry quantize` does."""
    reporter = reporter or Reporter()
    config = QuantizeConfig.model_validate(options) if options.get("dequantize") else settings(**options)
    torch.set_num_threads(1)
    job = resolve(config)
    if job.action != "quantize" and job.action != "scales":
        return verb.run(config, reporter)
    prepared = prepare(job)
    text = None
    if job.needs_text:
        text = windows(
            job.text, prepared.source.directory, vocab_size=prepared.source.model.dims.vocab_size,
            calibrate=job.calibrate or (job.scale_input is not None and bool(job.text.data)), evaluate=job.evaluate,
        )  # fmt: skip
    if not job.write:
        return verb._scales_alone(prepared, text, reporter)
    return verb._quantize(prepared, text, config, reporter)


def flags(**options: Any) -> list[str]:
    """Return options as words of the command line."""
    return words_of(with_few(options))


def start(log: Path, *words: str, program: Sequence[str] = REAL) -> subprocess.Popen[bytes]:
    """Start `ferry quantize`; what it says goes to a file."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, *program, "quantize", *words],
            env=without_hub({**os.environ, "OMP_NUM_THREADS": "1"}), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


def forked(log: Path, *words: str) -> Forked:
    """The same, forked from this process, which has imported what it needs."""
    return Forked(log, ["quantize", *words], without_hub({**os.environ, "OMP_NUM_THREADS": "1"}))


def files_of(directory: Path, *, but: Sequence[str] = ("ferry.json",)) -> dict[str, str]:
    """Return the sha256 of every file of a directory. The manifest has times in it."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in but
    }


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def hidden_beside(target: Path) -> list[str]:
    """Return what is left under hidden names beside a target."""
    return sorted(path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}"))


@contextmanager
def blocks_of(directory: Path) -> Iterator[Blocks]:
    source = open_hf(directory)
    with Sources(source.slots) as sources:
        yield Blocks(directory, source.model, sources, torch.device("cpu"))


def some_ids(num_windows: int = 2, tokens: int = TOKENS, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(5).integers(0, vocab, (num_windows, tokens)).astype(np.int32)
