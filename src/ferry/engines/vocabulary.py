"""A tokenizer as the front end needs it: text to token ids, and each token as the bytes it stands for.

`tokenizer.json` is read with `tokenizers` alone, which takes a fifth of a second. A model without that file is read by
transformers, slowly. Bytes, not texts: a character may be split over tokens, and only bytes can be put together again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ferry.core.errors import InputError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "*.model", "tokenization_*.py", "tekken.json")
_NFC_SHRINKS = 3
"""By how much NFC can make a text shorter, in bytes."""


class Vocabulary:
    """The tokens of one model."""

    def __init__(self, backend: Any, config: dict[str, Any]) -> None:
        """`backend` is a Tokenizer of `tokenizers`, or a slow one of transformers."""
        self._backend = backend
        self._is_fast = hasattr(backend, "to_str")
        self._bytes: dict[int, bytes] = {}
        added = backend.get_added_tokens_decoder() if self._is_fast else backend.added_tokens_decoder
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._spelling = _spelling(backend) if self._is_fast else "pieces"
        self._before, self._after = self._ends(config)
        if self._is_fast:
            backend.no_truncation()
            backend.no_padding()

    @property
    def num_tokens(self) -> int:
        """One more than the highest id."""
        return int(self._backend.get_vocab_size()) if self._is_fast else len(self._backend)

    @property
    def source(self) -> Any:
        """What `ferry.guided.compiling.tokenizer_of` takes: the text of a tokenizer.json, or a slow tokenizer."""
        return self._backend.to_str() if self._is_fast else self._backend

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its name in the vocabulary."""
        if self._is_fast:
            found: int | None = self._backend.token_to_id(token)
            return found
        return self._backend.get_vocab().get(token)  # type: ignore[no-any-return]

    @cached_property
    def longest_bytes(self) -> int | None:
        """The most bytes of a text that one token can stand for; None where that is not known.

        It is known of byte-level tokenizers that drop nothing.
        """
        if self._spelling != "bytes":
            return None
        normalizer = json.loads(self._backend.normalizer.__getstate__()) if self._backend.normalizer else {}
        splitter = self._backend.pre_tokenizer.__getstate__() if self._backend.pre_tokenizer else b""
        added = self._backend.get_added_tokens_decoder()
        takes_blanks = any(token.lstrip or token.rstrip for token in added.values())
        if takes_blanks or b"Removed" in splitter or normalizer.get("type", "NFC") != "NFC":
            return None
        longest = max(len(self.token_bytes(index)) for index in range(self.num_tokens))
        return longest * (_NFC_SHRINKS if normalizer else 1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text, with what the model expects around it if wanted."""
        if not self._is_fast:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens))
        adds = add_special_tokens and self._before is None
        return self._with_ends(self._backend.encode(text, add_special_tokens=adds).ids, add_special_tokens)

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the same of some texts, whatever their length, without holding up other threads meanwhile."""
        if not self._is_fast:
            return [self.encode(text, add_special_tokens) for text in texts]
        # Unlike `encode`, this lets go of the interpreter's lock.
        adds = add_special_tokens and self._before is None
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=adds)
        return [self._with_ends(one.ids, add_special_tokens) for one in found]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for; of an id without a token, none."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._look_up(token_id)
        return known

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of tokens; bytes that are no text become replacement characters."""
        kept = (one for one in token_ids if not (skip_special_tokens and one in self.special_ids))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def _with_ends(self, ids: list[int], add_special_tokens: bool) -> list[int]:
        if self._before is None or not add_special_tokens:
            return list(ids)
        return [*self._before, *ids, *self._after]

    def _look_up(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if self._is_fast else self._slow_token(token_id)
        if token is None:
            return b""
        if isinstance(token, bytes):
            return token
        if self._spelling == "bytes":
            table = _byte_of_character()
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
            return bytes(token.encode("utf-8"))
        if self._spelling == "pieces":
            match = _BYTE.fullmatch(token)
            return bytes([int(match[1], 16)]) if match else bytes(token.replace(_SPACE, " ").encode("utf-8"))
        return str(self._backend.decode([token_id], skip_special_tokens=False)).encode("utf-8")

    def _slow_token(self, token_id: int) -> Any:
        return self._backend.convert_ids_to_tokens(token_id) if 0 <= token_id < len(self._backend) else None

    def _ends(self, config: dict[str, Any]) -> tuple[list[int] | None, list[int]]:
        """Return the tokens before and after a text where the config says so itself; it wins over tokenizer.json."""
        if not {"add_bos_token", "add_eos_token"} & set(config):
            return None, []
        before, after = (
            [self.id_of(_content(config.get(f"{end}_token")))] if config.get(f"add_{end}_token") else []
            for end in ("bos", "eos")
        )
        return [one for one in before if one is not None], [one for one in after if one is not None]


def open_vocabulary(model_dir: Path, config: dict[str, Any], trust_remote_code: bool = False) -> Vocabulary:
    """Return the vocabulary of a model directory; `config` is its tokenizer_config.json."""
    path = model_dir / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            return Vocabulary(Tokenizer.from_file(str(path)), config)
        except Exception as error:  # `tokenizers` raises plain Exception
            raise InputError(
                f"{path} cannot be read: {str(error).splitlines()[0]}",
                code="data.tokenizer",
                repair="bring the file again, or remove it if the model has other tokenizer files",
            ) from error
    check_tokenizer(model_dir)
    from ferry.data.rendering import load_tokenizer

    found = load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
    return Vocabulary(getattr(found, "backend_tokenizer", None) or found, config)


def check_tokenizer(model_dir: Path) -> None:
    """Refuse a directory without any file of a tokenizer, before anything slow finds out."""
    if not any(file.is_file() for pattern in _TOKENIZER_FILES for file in model_dir.glob(pattern)):
        raise InputError(
            f"{model_dir} holds no tokenizer",
            code="data.tokenizer",
            repair="copy the tokenizer's files from the original model, as tokenizer.json and tokenizer_config.json",
        )


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _spelling(backend: Any) -> str:
    """Return how a fast tokenizer writes its tokens: as bytes of GPT-2, as pieces of SentencePiece, or otherwise."""
    # Its state is its part of tokenizer.json; to write out the whole would take as long as reading it.
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None
    kinds = {part["type"] for part in _parts(decoder)}
    if "ByteLevel" in kinds:
        return "bytes"
    replaced = {str(part.get("pattern")) for part in _parts(decoder) if part["type"] == "Replace"}
    is_pieces = bool(kinds & {"ByteFallback", "Metaspace"}) or any(_SPACE in pattern for pattern in replaced)
    return "pieces" if is_pieces else "other"


def _parts(decoder: Any) -> list[dict[str, Any]]:
    if not decoder:
        return []
    return [part for inner in decoder["decoders"] for part in _parts(inner)] if "decoders" in decoder else [decoder]


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's table: printable bytes are themselves, the others are the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}
