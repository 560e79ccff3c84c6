"""All that is text about a model, without its weights: tokens, chat template, end tokens, its own way of sampling.

The front end of `ferry serve` and the offline API share it. No torch here, and transformers only for a model that has
no tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ferry.core.errors import InputError
from ferry.engines.chat_template import ChatTemplate, open_template, token_names
from ferry.engines.detokenizing import Cut, Detokenizer, StopTexts
from ferry.engines.vocabulary import Vocabulary, open_vocabulary

__all__ = ["Cut", "Detokenizer", "StopTexts", "TextModel", "open_text"]

SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True)
class TextModel:
    """The text side of a model directory."""

    vocabulary: Vocabulary
    template: ChatTemplate | None
    end_token_ids: tuple[int, ...]
    """What ends an answer by itself: the tokenizer's end token, and those of generation_config.json or config.json."""
    default_sampling: Mapping[str, float] = field(default_factory=dict)
    """What generation_config.json says of `SAMPLING_NAMES`."""
    name: str = ""
    """The name of the directory, for messages."""
    vocab_size: int = 0
    """The width of the logits, as config.json says; 0 = it does not."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text, with what the model expects before it unless that is there already."""
        return self.vocabulary.encode(text, add_special_tokens)

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of some texts, without holding up other threads meanwhile."""
        return self.vocabulary.encode_all(texts, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of tokens that are all there."""
        return self.vocabulary.decode(token_ids, skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool = True, keep: Collection[int] = ()) -> Detokenizer:
        """Return what makes text of the tokens of one answer while they come."""
        return Detokenizer(self.vocabulary, skip_special_tokens=skip_special_tokens, keep=keep)

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
        further: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a conversation as text. Encode it with `add_special_tokens=False`: the template wrote them."""
        if self.template is None:
            raise InputError(
                f"{self.name} has no chat template",
                code="data.no-template",
                repair="use completions, or put a chat_template.jinja into the model directory",
            )
        return self.template.render(messages, tools, add_generation_prompt=add_generation_prompt, further=further)


def open_text(model: Path, trust_remote_code: bool = False) -> TextModel:
    """Return the text side of a model directory or a GGUF file."""
    if model.is_dir():
        return _open_directory(model, model.name, trust_remote_code)
    from ferry.formats.gguf_config import generation_config
    from ferry.formats.gguf_file import read_gguf
    from ferry.formats.gguf_tokenizer import tokenizer_assets

    file = read_gguf(model)
    with TemporaryDirectory(prefix="ferry-") as directory:
        assets = tokenizer_assets(file)
        for name, content in {"generation_config.json": json.dumps(generation_config(file)).encode(), **assets}.items():
            (Path(directory) / name).write_bytes(content)
        return _open_directory(Path(directory), model.name, trust_remote_code=False)


def _open_directory(model_dir: Path, name: str, trust_remote_code: bool) -> TextModel:
    config = _json(model_dir / "tokenizer_config.json")
    generation = _json(model_dir / "generation_config.json")
    vocabulary = open_vocabulary(model_dir, config, trust_remote_code)
    named = token_names(model_dir, config).get("eos_token")
    ids = [vocabulary.id_of(named)] if named else []
    model_config = _json(model_dir / "config.json")
    ids += _listed(generation.get("eos_token_id")) or _listed(model_config.get("eos_token_id"))
    sampling = {name: generation[name] for name in SAMPLING_NAMES if isinstance(generation.get(name), (int, float))}
    return TextModel(
        vocabulary=vocabulary,
        template=open_template(model_dir, config),
        end_token_ids=tuple(dict.fromkeys(one for one in ids if one is not None)),
        default_sampling=sampling,
        name=name,
        vocab_size=int((model_config.get("text_config") or model_config).get("vocab_size") or 0),
    )


def _listed(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value or [])


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", code="data.json", repair="bring the file again") from error
    return found if isinstance(found, dict) else {}
