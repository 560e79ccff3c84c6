"""Probabilities of tokens in the shapes that clients know: of chat, of completions, and of prompts after vLLM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ferry.engines.request import TokenLogprobs
from ferry.engines.vocabulary import Vocabulary
from ferry.verbs.serve.http.answering import Token

LOWEST = -9999.0
"""What is written for a probability of nothing: JSON has no infinity."""
JsonObject = dict[str, Any]


class TokenNames:
    """How tokens are called in answers: by their text, or by `token_id:7`."""

    def __init__(self, vocabulary: Vocabulary, *, by_id: bool) -> None:
        self._vocabulary = vocabulary
        self._by_id = by_id

    def name(self, token_id: int) -> str:
        """Return the name of a token; one that is no text by itself is named by its bytes."""
        if self._by_id:
            return f"token_id:{token_id}"
        raw = self._vocabulary.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def bytes(self, token_id: int) -> list[int]:
        """Return the bytes of a token."""
        return list(self._vocabulary.token_bytes(token_id))


def of_chat(tokens: Iterable[Token], names: TokenNames, num_top: int) -> JsonObject:
    """Return `logprobs` of a choice of a chat."""

    def one(token_id: int, logprob: float) -> JsonObject:
        return {"token": names.name(token_id), "logprob": finite(logprob), "bytes": names.bytes(token_id)}

    content = []
    for token in tokens:
        assert token.logprobs is not None, "logprobs were asked for, and the engine gave none"
        top = [one(*pair) for pair in token.logprobs.top[:num_top]]
        content.append({**one(token.id, token.logprobs.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """`logprobs` of a choice of completions: four lists, and where in the text each token begins."""

    def __init__(self, names: TokenNames, num_top: int) -> None:
        self._names = names
        self._num_top = num_top
        self._offset = 0

    def of_tokens(self, tokens: Iterable[Token]) -> JsonObject:
        """Return the lists for some tokens."""
        return self._lists((token.id, token.text, token.logprobs) for token in tokens)

    def of_prompt(self, ids: Sequence[int], texts: Sequence[str], found: Sequence[TokenLogprobs | None]) -> JsonObject:
        """Return the lists for a prompt; its first token has no probability."""
        return self._lists(zip(ids, texts, found, strict=True))

    def _lists(self, tokens: Iterable[tuple[int, str, TokenLogprobs | None]]) -> JsonObject:
        lists: JsonObject = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, text, logprobs in tokens:
            lists["text_offset"].append(self._offset)
            self._offset += len(text)
            lists["tokens"].append(self._names.name(token_id))
            lists["token_logprobs"].append(finite(logprobs.logprob) if logprobs else None)
            lists["top_logprobs"].append(self._top(logprobs) if logprobs else None)
        return lists

    def _top(self, logprobs: TokenLogprobs) -> dict[str, float]:
        pairs = [*logprobs.top[: self._num_top], (logprobs.token_id, logprobs.logprob)]
        found: dict[str, float] = {}
        for token_id, logprob in pairs:
            # Two tokens may have one name; the likelier one counts.
            found.setdefault(self._names.name(token_id), finite(logprob))
        return found


def joined(first: JsonObject, second: JsonObject) -> JsonObject:
    """Return two results of `CompletionLogprobs`, one after the other."""
    return {key: [*first[key], *second[key]] for key in first}


def of_prompt(found: Sequence[TokenLogprobs | None], names: TokenNames) -> list[JsonObject | None]:
    """Return `prompt_logprobs` as vLLM writes them: by token id, with rank."""
    lines: list[JsonObject | None] = []
    for one in found:
        if one is None:
            lines.append(None)
            continue
        line = {}
        for rank, (token_id, logprob) in enumerate(one.top, 1):
            line[str(token_id)] = _ranked(logprob, rank, names.name(token_id))
        line[str(one.token_id)] = _ranked(one.logprob, one.rank, names.name(one.token_id))
        lines.append(line)
    return lines


def finite(logprob: float) -> float:
    """Return a logarithm that JSON can hold."""
    return max(logprob, LOWEST)


def _ranked(logprob: float, rank: int, name: str) -> JsonObject:
    return {"logprob": finite(logprob), "rank": rank, "decoded_token": name}
