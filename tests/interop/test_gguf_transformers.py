"""transformers is the judge of what Ferry reads from a GGUF file: its tensors, its tokenizer, the model's answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from ferry.core.progress import Reporter
from ferry.formats.gguf import gguf_plan
from gguf_files import finish, gguf_name, new_file, tiny_model, tiny_tokens, write_model, write_tokenizer

TEXTS = [
    "What is the capital of France?",
    "  two  spaces,\ttabs\t\tand\nnew\r\nlines \n\n\n at   the end   ",
    "it's we're I'll they've he'd I'm DON'T",
    "Grüße, Ærøskøbing, naïve café, ﬁne",
    "日本語のテキスト。中文，한국어",
    "Привет! مرحبا שלום नमस्ते",
    "👩‍👩‍👧‍👦 🇫🇷 emoji \u200b zero width \ufeff",
    "def f(x):\n    return {'a': [1.5e-3, 0xFF], \"b\": x ** 2}  # comment\n",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|><empty_output> <|not_a_token|>",
    "",
    " ",
    "a" * 300,
]
NUMBERS = ["In 2024 there were 365 days", "3.14159, 1,000,000 and x2y33z", "٣٤ ४५", "10 m², a ½ and ①②"]
DECOMPOSED = "cafe\u0301 A\u030a"


class Pair(NamedTuple):
    """A tokenizer as Ferry wrote it, and as transformers reads it from the GGUF file."""

    ours: Any
    theirs: Any


@pytest.fixture(scope="module")
def real(smollm2: Path, smollm2_gguf: Path) -> Pair:
    return tokenizers_of(smollm2, smollm2_gguf)


def write(path: Path, directory: Path) -> Path:
    directory.mkdir()
    gguf_plan(path).write(directory, Reporter())
    return directory


def judged_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What transformers' own loader makes of a GGUF file, as bfloat16."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    return {name: tensor.to(torch.bfloat16) for name, tensor in loaded.items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name].view(torch.int16), theirs[name].view(torch.int16))]
    assert different == []


def test_every_tensor_of_the_real_model_is_bit_equal_to_transformers(smollm2: Path, smollm2_gguf: Path) -> None:
    ours = load_file(smollm2 / "model.safetensors")
    assert len(ours) == 272
    assert_same(ours, judged_tensors(smollm2_gguf))


def test_the_real_model_answers_paris(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, do_sample=False, max_new_tokens=16)[0][ids["input_ids"].shape[1] :]
    assert model.dtype == torch.bfloat16
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_the_real_tokenizer_gives_the_same_ids_as_transformers(real: Pair) -> None:
    for text in TEXTS:
        assert real.ours.encode(text) == real.theirs.encode(text)


def test_digits_stand_alone_as_in_the_original(real: Pair) -> None:
    """The original's pre-tokenizer is Digits(individual_digits=True), then ByteLevel.

    transformers 5.23 does not know the name `smollm` and leaves Digits out, so a space and a number sign like `²`
    become one token. The judge here is its tokenizer with the original's pre-tokenizer put in.
    """
    from tokenizers import pre_tokenizers

    judge = copy.deepcopy(real.theirs.backend_tokenizer)
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    judge.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    for text in [*TEXTS, *NUMBERS]:
        assert real.ours.encode(text) == judge.encode(text).ids
        assert real.ours.decode(real.ours.encode(text)) == text
    assert any(real.ours.encode(text) != real.theirs.encode(text) for text in NUMBERS), "transformers is mended"


def test_the_tokenizer_files_agree_with_each_other_and_with_transformers(smollm2: Path, real: Pair) -> None:
    ours, theirs = real
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.model_max_length == 8192
    assert ours.added_tokens_decoder.keys() == theirs.added_tokens_decoder.keys()
    assert PreTrainedTokenizerFast.from_pretrained(smollm2).encode(TEXTS[7]) == ours.encode(TEXTS[7])


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_chat_template_renders_equally(real: Pair, add_generation_prompt: bool) -> None:
    for chat in (
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "He"}],
    ):
        rendered = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
            for tokenizer in real
        ]
        assert rendered[0] == rendered[1]


def test_what_transformers_saves_again_is_the_same_tokenizer(smollm2: Path, tmp_path: Path) -> None:
    ours = AutoTokenizer.from_pretrained(smollm2)
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == (smollm2 / "chat_template.jinja").read_text()
    for text in [*TEXTS, *NUMBERS]:
        assert again.encode(text) == ours.encode(text)


CHANGES: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "one-kv-head": {"num_key_value_heads": 1},
    "head-dim": {"head_dim": 32},
    "theta-eps": {"rope_theta": 500000.0, "rms_norm_eps": 1e-5},
}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_comes_back_from_gguf_bit_for_bit(arch: str, change: str, tmp_path: Path) -> None:
    if arch == "qwen2" and change == "head-dim":
        pytest.skip("Qwen2 has no head_dim of its own")
    model = tiny_model(arch, **CHANGES[change])
    write_model(tmp_path / "model.gguf", model, arch)
    back = AutoModelForCausalLM.from_pretrained(write(tmp_path / "model.gguf", tmp_path / "hf"))
    state = model.state_dict()
    assert_same(dict(back.state_dict()), dict(state))
    ids = torch.arange(40).unsqueeze(0)
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_biases_of_a_llama_come_back(tmp_path: Path) -> None:
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    write_model(tmp_path / "model.gguf", model, "llama")
    back = AutoModelForCausalLM.from_pretrained(write(tmp_path / "model.gguf", tmp_path / "hf"))
    assert_same(dict(back.state_dict()), dict(model.state_dict()))
    ids = torch.arange(40).unsqueeze(0)
    assert torch.equal(back(ids).logits, model(ids).logits)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_scaling_of_llama_3_is_recognised(factor: float, tmp_path: Path) -> None:
    """The file holds the factors by which frequencies are divided; transformers 5.23's own loader ignores them."""
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    sizes = {"head_dim": 64, "max_position_embeddings": 131072, "rope_parameters": {**scaling, "rope_theta": 500000.0}}
    model = tiny_model("llama", **sizes)
    plain = tiny_model("llama", head_dim=64, rope_theta=500000.0)
    factors = (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).float().numpy()
    writer = new_file(tmp_path / "model.gguf", "llama", model.config)
    write_tokenizer(writer, tiny_tokens(512))
    writer.add_tensor("rope_freqs.weight", factors)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(gguf_name(name), tensor.float().numpy())
    finish(writer)
    config = AutoConfig.from_pretrained(write(tmp_path / "model.gguf", tmp_path / "hf"))
    assert config.rope_parameters == model.config.rope_parameters


QUANTIZED = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_types_that_can_be_written_are_bit_equal_to_transformers(kind: Type, tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", tiny_model("llama"), "llama", kind=kind)
    ours = load_file(write(tmp_path / "model.gguf", tmp_path / "hf") / "model.safetensors")
    assert_same(ours, judged_tensors(tmp_path / "model.gguf"))


ONLY_READ = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS, Type.IQ2_XXS, Type.IQ3_S]


@pytest.mark.parametrize("kind", ONLY_READ, ids=lambda kind: kind.name)
def test_types_that_can_only_be_read_are_bit_equal_to_transformers(kind: Type, tmp_path: Path) -> None:
    model = tiny_model("llama")
    writer = new_file(tmp_path / "model.gguf", "llama", model.config)
    write_tokenizer(writer, tiny_tokens(512))
    random = np.random.default_rng(0)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            writer.add_tensor(gguf_name(name), tensor.float().numpy())
            continue
        values, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        # Bytes below 0x3c make every float16 scale a finite number.
        raw = random.integers(0, 0x3C, (tensor.shape[0], tensor.shape[1] // values * num_bytes), dtype=np.uint8)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
    finish(writer)
    ours = load_file(write(tmp_path / "model.gguf", tmp_path / "hf") / "model.safetensors")
    assert_same(ours, judged_tensors(tmp_path / "model.gguf"))


@pytest.fixture(scope="module")
def with_pre(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Tokenizers by the name of their pre-tokenizer; each is read once."""
    return cache(lambda pre: tokenizers_with_pre(pre, smollm2_gguf, tmp_path_factory.mktemp("pre")))


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_other_pre_tokenizers_give_the_same_ids_as_transformers(pre: str, with_pre: Callable[[str], Pair]) -> None:
    ours, theirs = with_pre(pre)
    for text in [*TEXTS, *NUMBERS]:
        bos = [1] if pre == "llama-bpe" else []
        assert ours.encode(text) == bos + theirs.encode(text, add_special_tokens=False)


def test_qwen2_composes_characters_as_its_original_does(with_pre: Callable[[str], Pair]) -> None:
    """Qwen2's tokenizer.json has an NFC normalizer; transformers 5.23's GGUF conversion leaves it out."""
    ours, theirs = with_pre("qwen2")
    assert ours.encode(DECOMPOSED) == ours.encode("café Å") == theirs.encode("café Å", add_special_tokens=False)


def tokenizers_of(directory: Path, path: Path) -> Pair:
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return Pair(AutoTokenizer.from_pretrained(directory), theirs)


def tokenizers_with_pre(pre: str, real: Path, folder: Path) -> Pair:
    """SmolLM2's tokens under another pre-tokenizer, read by Ferry and by transformers."""
    from ferry.formats.gguf_file import read_gguf

    metadata = read_gguf(real).metadata
    tokens = {"pre": pre, "ids": {"bos": 1, "eos": 2}}
    for key, name in (("tokens", "tokens"), ("types", "token_type"), ("merges", "merges")):
        tokens[key] = metadata[f"tokenizer.ggml.{name}"]
    model = tiny_model("llama", vocab_size=49152, hidden_size=32, num_hidden_layers=1)
    write_model(folder / "model.gguf", model, "llama", tokens=tokens)
    directory = write(folder / "model.gguf", folder / "hf")
    return tokenizers_of(directory, folder / "model.gguf")
