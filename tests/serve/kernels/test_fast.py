"""The executor of our kernels against transformers' own forward, on small random models of every family it takes."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ferry.engines.engine import EngineSettings
from ferry.engines.native.executor import Batch
from ferry.engines.native.fast import FastExecutor, open_fast, why_not
from ferry.engines.native_engine import ENGINE
from ferry.verbs.serve.config import ServeConfig
from ferry.verbs.serve.plan import prepare

BASE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 203, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "llama": ("Llama", {}, torch.float32),
    "llama-tied-bf16": ("Llama", {"tie_word_embeddings": True}, torch.bfloat16),
    "llama-f16-wide-heads": ("Llama", {"head_dim": 48}, torch.float16),
    "llama-eight-to-one": (
        "Llama",
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16},
        torch.float32,
    ),
    "llama-3.1": ("Llama", {"rope_parameters": LLAMA3}, torch.float32),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}, torch.float32),
    "mistral-window": ("Mistral", {"sliding_window": 24}, torch.float32),
    "qwen2-bias": ("Qwen2", {}, torch.float32),
    "qwen2-one-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
        torch.float32,
    ),
    "qwen3-norms": ("Qwen3", {"head_dim": 32}, torch.float32),
}
LENGTH = 300


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models by name, each with its tokens and transformers' logits in float32."""
    kept: dict[str, tuple[Path, np.ndarray, np.ndarray]] = {}

    def get(name: str) -> tuple[Path, np.ndarray, np.ndarray]:
        if name not in kept:
            kind, fields, dtype = MODELS[name]
            torch.manual_seed(0)
            config = getattr(transformers, f"{kind}Config")(**(BASE | fields))
            model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
            for parameter in model.parameters():
                # Norm weights of one and biases of zero would hide what is left out.
                parameter.data += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.02)
            directory = tmp_path_factory.mktemp("models") / name
            model.save_pretrained(directory)
            tokens = np.random.default_rng(1).integers(0, BASE["vocab_size"], LENGTH)
            # Loaded anew: `to(dtype)` has rounded the rotary frequencies as well.
            model = type(model).from_pretrained(directory, dtype=torch.float32)
            with torch.inference_mode():
                logits = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
            kept[name] = directory, tokens, logits
        return kept[name]

    return get


def opened(directory: Path, **settings: Any) -> FastExecutor:
    found = open_fast(EngineSettings(directory, threads=1, **settings))
    assert found is not None
    found.allocate(64)
    return found


def one_step(tokens: list[np.ndarray], starts: list[int], tables: np.ndarray, size: int) -> Batch:
    """Return a step in which each sequence goes on from a place with some tokens."""
    positions = [np.arange(start, start + len(part)) for part, start in zip(tokens, starts, strict=True)]
    slots = [table[place // size] * size + place % size for table, place in zip(tables, positions, strict=True)]
    ends = np.cumsum([0, *map(len, tokens)])
    lengths = np.array([start + len(part) for part, start in zip(tokens, starts, strict=True)])
    flat = [np.concatenate(parts) for parts in (tokens, positions, slots)]
    return Batch(*flat, ends, lengths, tables, np.arange(ends[-1]))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(made: Any, name: str) -> None:
    directory, tokens, expected = made(name)
    model = opened(directory)
    table = np.random.default_rng(2).permutation(64)[None, :20]
    found = model.forward(one_step([tokens], [0], table, 16))
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("settings", [{}, {"quantization": "w8a8"}, {"block_size": 128}])
def test_steps_and_neighbours_do_not_change_a_bit(made: Any, settings: dict[str, Any]) -> None:
    directory, tokens, _ = made("llama-tied-bf16")
    model = opened(directory, **settings)
    size = model.block_size
    tables = np.arange(64)[: 3 * (320 // size + 1)].reshape(3, -1)
    whole = model.forward(one_step([tokens], [0], tables[:1], size)).copy()
    other = tokens[::-1].copy()
    parts = []
    for first, last in ((0, 5), (5, 6), (6, 90), (90, 91), (91, 258), (258, 300)):
        beside = model.forward(
            one_step([other[: 2 * first + 1], tokens[first:last]], [0, first], tables[1:], size)
            if 2 * first + 1 <= LENGTH
            else one_step([tokens[first:last]], [first], tables[2:], size)
        )
        parts.append(beside[-(last - first) :].copy())
    assert np.array_equal(np.concatenate(parts), whole)


def test_threads_do_not_change_a_bit(made: Any) -> None:
    directory, tokens, _ = made("qwen3-norms")
    batch = one_step([tokens], [0], np.arange(20)[None], 16)
    found = []
    for threads in (1, 3):
        model = open_fast(EngineSettings(directory, threads=threads))
        assert model is not None
        model.allocate(20)
        found.append(model.forward(batch).copy())
    assert np.array_equal(*found)


def test_a_closed_model_holds_no_memory(made: Any) -> None:
    directory, _, _ = made("llama")
    open_fast(EngineSettings(directory))  # what stays of a first time is not the model's
    tracemalloc.start()
    try:
        model = opened(directory)
        model.allocate(1000)
        assert tracemalloc.get_traced_memory()[0] > 1000 * model.block_bytes
        model.close()
        assert tracemalloc.get_traced_memory()[0] < 200_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("quantization", ["auto", "w8a8"])
def test_the_plan_of_memory_is_what_is_held(made: Any, quantization: str) -> None:
    directory, _, _ = made("llama-tied-bf16")
    planned = prepare(ServeConfig(model=directory, quantization=quantization, max_model_len=64))
    held = opened(directory, quantization=planned.settings.quantization, max_model_len=64)
    assert planned.memory.weights_bytes == pytest.approx(held.weights_bytes, rel=0.15)  # angles, padded rows
    assert planned.memory.bytes_per_token == held.block_bytes / held.block_size
    assert planned.dtype == held.dtype == "float32"
    assert not ENGINE.widens(EngineSettings(directory, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "mixtral"}, "experts"),
        ({"hidden_act": "gelu"}, "another gate"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "angles that change"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "a factor that is not said"),
        ({"attention_bias": True}, "a bias that the kernels do not know"),
    ],
)
def test_what_the_kernels_do_not_compute_is_left_to_transformers(
    made: Any, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    directory, _, _ = made("llama")
    config = json.loads((directory / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_fast(EngineSettings(tmp_path)) is None, why


@pytest.mark.parametrize("part", ["model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_weights_of_64_bits_are_left_to_transformers(made: Any, tmp_path: Path, part: str) -> None:
    directory, _, _ = made("llama")
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {part: tensors[part].double()}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    assert "32 bits" in why_not(EngineSettings(tmp_path))
