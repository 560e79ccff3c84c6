"""The tokenizer inside a GGUF file, as Hugging Face's tokenizer files.

A GGUF file holds the tokens, their types and the merges, but of the pre-tokenizer only a name. What a name means is a
small table here; a name that is not in it is refused, because a wrong guess would change the tokens without a sign.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ferry.core.errors import InputError
from ferry.formats.gguf_file import GgufFile

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before the merges: digits one by one, then by a pattern ("" = GPT-2's, built into ByteLevel)."""

    pattern: str = ""
    single_digits: bool = False
    normalizer: str = ""
    ignore_merges: bool = False
    """A word that is a token is taken whole, whatever the merges say."""
    adds_bos: bool = False
    """What llama.cpp does where the file does not say."""


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "llama-bpe": PreTokenizer(_LLAMA3, ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer(_QWEN2, normalizer="NFC"),
}

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def tokenizer_assets(file: GgufFile, directory: Path | None = None) -> dict[str, bytes]:
    """Return the tokenizer files by name: made from the GGUF file, or copied from a directory that fits it."""
    if directory is not None:
        return _copied(file, directory)
    name = file.metadata.get("tokenizer.ggml.pre")
    model = file.metadata.get("tokenizer.ggml.model")
    if model != "gpt2" or name not in PRE_TOKENIZERS:
        raise InputError(
            f"{file.path} has tokenizer {model!r} with pre-tokenizer {name!r}, expected 'gpt2' with one of "
            f"{', '.join(PRE_TOKENIZERS)}",
            code="gguf.tokenizer",
            repair="give the original's tokenizer with --tokenizer DIR",
        )
    pre = PRE_TOKENIZERS[name]
    special = _special_tokens(file)
    assets = {
        "tokenizer.json": json.dumps(_tokenizer(file, pre, special), indent=2, ensure_ascii=False),
        "special_tokens_map.json": json.dumps(special, indent=2, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_tokenizer_config(file, pre, special), indent=2, ensure_ascii=False),
    }
    assets |= _chat_templates(file)
    return {asset: text.encode() for asset, text in assets.items()}


def _tokenizer(file: GgufFile, pre: PreTokenizer, special: dict[str, str]) -> dict[str, Any]:
    """Return the content of `tokenizer.json`: byte-level BPE."""
    tokens, types = _tokens(file)
    vocab = {token: index for index, token in enumerate(tokens) if types[index] != UNUSED}
    split = {"type": "Split", "pattern": {"Regex": pre.pattern}, "behavior": "Isolated", "invert": False}
    steps: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if pre.single_digits else []
    steps += [split] if pre.pattern else []
    steps += [_byte_level(add_prefix_space=False, use_regex=not pre.pattern)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(index, tokens[index], special=types[index] == CONTROL)
            for index in range(len(tokens))
            if types[index] in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": pre.normalizer} if pre.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "post_processor": _post_processor(file, pre, special),
        "decoder": _byte_level(add_prefix_space=True, use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre.ignore_merges,
            "vocab": vocab,
            "merges": [merge.split(" ") for merge in file.required("tokenizer.ggml.merges")],
        },
    }


def _tokens(file: GgufFile) -> tuple[list[str], list[int]]:
    tokens = file.required("tokenizer.ggml.tokens")
    types = file.metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    num_rows = file.tensors["token_embd.weight"].shape[0]
    if len(types) != len(tokens) or len(tokens) > num_rows:
        raise InputError(
            f"{file.path} has {len(tokens)} tokens, {len(types)} token types and {num_rows} rows of embeddings",
            code="gguf.tokenizer",
        )
    return tokens, types


def _byte_level(*, add_prefix_space: bool, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}


def _added_token(index: int, text: str, *, special: bool) -> dict[str, Any]:
    token: dict[str, Any] = {"id": index, "content": text}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {**token, "special": special}


def _post_processor(file: GgufFile, pre: PreTokenizer, special: dict[str, str]) -> dict[str, Any] | None:
    """Return the rule that puts the first token in front of a text, if this model wants it."""
    if not _adds_bos(file, pre):
        return None
    bos = special["bos_token"]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    entry = {"id": bos, "ids": [file.metadata["tokenizer.ggml.bos_token_id"]], "tokens": [bos]}
    return {
        "type": "TemplateProcessing",
        "single": [first, a],
        "pair": [first, a, second, b],
        "special_tokens": {bos: entry},
    }


def _adds_bos(file: GgufFile, pre: PreTokenizer) -> bool:
    wanted = file.metadata.get("tokenizer.ggml.add_bos_token", pre.adds_bos)
    return bool(wanted) and "tokenizer.ggml.bos_token_id" in file.metadata


def _special_tokens(file: GgufFile) -> dict[str, str]:
    """Return the content of `special_tokens_map.json`."""
    tokens, _ = _tokens(file)
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def _tokenizer_config(file: GgufFile, pre: PreTokenizer, special: dict[str, str]) -> dict[str, Any]:
    architecture = file.metadata["general.architecture"]
    config: dict[str, Any] = {
        **special,
        "add_bos_token": _adds_bos(file, pre),
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.required(f"{architecture}.context_length"),
        # Named after the generic class: those of a model bring a pre-tokenizer of their own.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    template = file.metadata.get("tokenizer.chat_template")
    return {**config, "chat_template": template} if template else config


def _chat_templates(file: GgufFile) -> dict[str, str]:
    """Return the chat template in a file of its own, where transformers looks first, and any further named ones."""
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): text for key, text in file.metadata.items() if key.startswith(prefix)}
    templates = {f"additional_chat_templates/{name}.jinja": text for name, text in named.items()}
    main = file.metadata.get("tokenizer.chat_template")
    return {**templates, "chat_template.jinja": main} if main else templates


def _copied(file: GgufFile, directory: Path) -> dict[str, bytes]:
    assets = {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()}
    if not assets:
        raise InputError(f"{directory} holds no tokenizer files", code="gguf.tokenizer")
    if "tokenizer.json" in assets:
        _check_fits(file, directory, json.loads(assets["tokenizer.json"]))
    return {**{name: text.encode() for name, text in _chat_templates(file).items()}, **assets}


def _check_fits(file: GgufFile, directory: Path, tokenizer: dict[str, Any]) -> None:
    """Refuse a tokenizer whose tokens stand for other rows of the embedding than the file's own tokens do."""
    tokens, types = _tokens(file)
    vocab = tokenizer.get("model", {}).get("vocab", {})
    pairs = vocab.items() if isinstance(vocab, dict) else ((item[0], index) for index, item in enumerate(vocab))
    for token, index in pairs:
        if index >= len(tokens) or (types[index] == NORMAL and tokens[index] != token):
            found = tokens[index] if index < len(tokens) else "nothing"
            raise InputError(
                f"{directory} is not the tokenizer of {file.path}: token {index} is {token!r} there and {found!r} here",
                code="gguf.tokenizer",
            )
