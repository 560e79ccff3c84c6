"""Text as windows of tokens of one length: what calibration looks at, and what a result is judged on.

Documents are joined by a blank line, tokenised together without special tokens, and cut; conversations go through the
chat template, and tokens of Megatron are taken as they are. The first windows calibrate; the windows right after them
are held out, unless a text of its own is given for that. Reading stops when there is enough: a text of any size costs
what is used of it. torch is not needed.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ferry.core.errors import InputError
from ferry.data import readers
from ferry.data.chunks import Spec
from ferry.data.conversation import BadRow, Conversation, Message, Text
from ferry.data.handlers import Handler, choose_handler, convert, named_handler
from ferry.data.megatron import find_megatron, read_megatron
from ferry.data.rendering import Renderer, RendererSpec, renderer
from ferry.data.settings import parse_item
from ferry.data.standard_library import documents

Int32 = npt.NDArray[np.int32]
NUM_SNIFFED = 20
CHARS_PER_TOKEN = 6
"""More than most text has: the first reading is then nearly always enough."""
SLICE_CHARS = 1 << 16
TAIL_TOKENS = 64
"""Where reading stops early, the last tokens might be others if the text went on: they are not used."""


@dataclass(frozen=True)
class TextSpec:
    """Which text, and how much of it. Without `data` it is Python's own documentation."""

    data: tuple[str, ...] = ()
    """Each `PATH` or `PATH:WEIGHT`; several give windows in proportion to their weights."""
    num_windows: int = 16
    window_tokens: int = 512
    evaluation: Path | None = None
    """Held-out text; None = the windows of `data` that follow the calibration windows."""
    num_held_out: int = 4
    handler: str = ""
    chat_template: Path | None = None


class Windows(NamedTuple):
    """Tokens [windows, tokens] to calibrate and to judge with; the digests are of the token ids as little-endian int32.

    What was not asked for has no windows, and "" for its name and digest.
    """

    calibration_BT: Int32
    held_out_BT: Int32
    name: str
    held_out_name: str
    sha256: str
    held_out_sha256: str
    choices: tuple[str, ...]


@dataclass
class _Reading:
    """One place of text while it is read."""

    name: str
    num_rows: int = 0
    num_bad: int = 0
    first_bad: str = ""

    def refuse(self, where: str, reason: object) -> None:
        self.num_bad += 1
        self.first_bad = self.first_bad or f"{where}: {reason}"

    @property
    def text(self) -> str:
        dropped = f", {self.num_bad} of them left out ({self.first_bad})" if self.num_bad else ""
        return f"{self.num_rows} rows were read{dropped}"


def windows(
    spec: TextSpec,
    tokenizer_dir: Path,
    *,
    vocab_size: int,
    calibrate: bool = True,
    evaluate: bool = True,
) -> Windows:
    """Return the windows that a text gives; fewer than asked for if it is short, and an error if that leaves none."""
    rendering = renderer(_rendering_spec(spec, tokenizer_dir))
    choices: list[str] = []
    follows = evaluate and spec.evaluation is None
    empty_BT = np.zeros((0, spec.window_tokens), np.int32)
    calibration_BT, held_out_BT, name, held_out_name = empty_BT, empty_BT, "", ""
    if calibrate or follows:
        name, first_BT, next_BT = _from_data(spec, rendering, spec.num_held_out if follows else 0, choices)
        calibration_BT = first_BT if calibrate else empty_BT
        held_out_BT, held_out_name = (next_BT, name) if follows else (empty_BT, "")
    if evaluate and spec.evaluation is not None:
        held_out_BT = _cut(spec.evaluation, spec, rendering, 0, spec.num_held_out, choices)[1]
        held_out_name = spec.evaluation.name
    _check(calibration_BT, held_out_BT, held_out_name, tokenizer_dir, vocab_size)
    return Windows(
        calibration_BT=calibration_BT,
        held_out_BT=held_out_BT,
        name=name if calibrate else "",
        held_out_name=held_out_name,
        sha256=_sha256(calibration_BT),
        held_out_sha256=_sha256(held_out_BT),
        choices=tuple(choices),
    )


def _rendering_spec(spec: TextSpec, tokenizer_dir: Path) -> RendererSpec:
    template = spec.chat_template
    if template is not None and not template.is_file():
        raise InputError(f"{template} is not there", code="data.no-template", repair="give the file of a chat template")
    text = template.read_text(encoding="utf-8") if template is not None else ""
    return RendererSpec(tokenizer_dir, "all", text, str(template or ""))


def _from_data(spec: TextSpec, rendering: Renderer, num_held_out: int, choices: list[str]) -> tuple[str, Int32, Int32]:
    """Return the name of the text, its first windows, and the ones that follow them; each place gives its share."""
    if not spec.data:
        choices.append("the text is Python's own documentation: give --data for one like what the model will see")
        first_BT, next_BT = _cut(None, spec, rendering, spec.num_windows, num_held_out, choices)
        return f"Python {sys.version_info.major}.{sys.version_info.minor} documentation", first_BT, next_BT
    items = [parse_item(text) for text in spec.data]
    weights = [1.0 if item.weight is None else item.weight for item in items]
    shares = zip(items, _shares(spec.num_windows, weights), _shares(num_held_out, weights), strict=True)
    parts = []
    for item, num_first, num_next in shares:
        if len(items) > 1:
            choices.append(f"{item.path.name} gives {num_first} of {spec.num_windows} windows, by its weight")
        if num_first or num_next:
            parts.append(_cut(item.path, spec, rendering, num_first, num_next, choices))
    name = " + ".join(dict.fromkeys(item.path.name for item in items))
    return name, np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _shares(total: int, weights: list[float]) -> list[int]:
    """Return whole parts of a total in proportion to weights; the first ones get what is left over."""
    bounds = np.cumsum([0.0, *weights]) / sum(weights) * total
    edges = np.ceil(bounds - 1e-9).astype(int).tolist()
    return [last - first for first, last in pairwise(edges)]


def _cut(
    path: Path | None, spec: TextSpec, rendering: Renderer, num_first: int, num_next: int, choices: list[str]
) -> tuple[Int32, Int32]:
    """Return the first windows of a text and the ones that follow; fewer of both if it is short."""
    reading = _Reading(path.name if path else "Python's documentation")
    size, wanted = spec.window_tokens, num_first + num_next
    ids_T = _enough(_pieces(path, spec, rendering, reading), wanted * size, rendering.tokenizer)
    found = min(len(ids_T) // size, wanted)
    if found < wanted:
        kept = min(num_next, max(1, found * num_next // wanted)) if num_next else 0
        if not found or (num_first and found == kept):
            needed = size * (bool(num_first) + bool(num_next))
            raise InputError(
                f"{reading.name} gives {len(ids_T)} tokens, expected {wanted * size} ({wanted} windows of {size}) and "
                f"{needed} at least; {reading.text}",
                code="data.too-short",
                repair="give more text, or a smaller seq_len",
            )
        num_first, num_next = found - kept, kept
        choices.append(
            f"{reading.name} is short: {found} windows of {size} tokens instead of {wanted}, {kept} of them held out"
        )
    if reading.num_bad:
        choices.append(f"{reading.name}: {reading.text}")
    cut_BT = ids_T[: found * size].reshape(found, size)
    return cut_BT[:num_first], cut_BT[num_first:]


def _enough(pieces: Iterator[str | Int32], needed: int, tokenizer: Any) -> Int32:
    """Return the tokens of pieces, at least `needed` of them if there are so many; neighbouring texts are one text."""
    done, texts = [np.zeros(0, np.int32)], list[str]()
    num_done, num_chars, look_at = 0, 0, needed * CHARS_PER_TOKEN
    for piece in _sliced(pieces):
        if isinstance(piece, str):
            texts.append(piece)
            num_chars += len(piece)
            if num_chars < look_at:
                continue
            ids_T = _tokenised(texts, tokenizer)
            if num_done + len(ids_T) >= needed + TAIL_TOKENS:
                return np.concatenate([*done, ids_T])
            look_at = 2 * num_chars
        else:
            done += [_tokenised(texts, tokenizer), piece]
            num_done, texts, num_chars = sum(map(len, done)), [], 0
            if num_done >= needed:
                break
    return np.concatenate([*done, _tokenised(texts, tokenizer)])


def _sliced(pieces: Iterator[str | Int32]) -> Iterator[str | Int32]:
    """Give long texts in slices: of a book, only what is needed is tokenised."""
    for piece in pieces:
        if isinstance(piece, str):
            yield from (piece[start : start + SLICE_CHARS] for start in range(0, len(piece), SLICE_CHARS))
        else:
            yield piece


def _tokenised(texts: list[str], tokenizer: Any) -> Int32:
    if not texts:
        return np.zeros(0, np.int32)
    ids = tokenizer("".join(texts).removeprefix("\n\n"), add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, np.int32)


def _pieces(path: Path | None, spec: TextSpec, rendering: Renderer, reading: _Reading) -> Iterator[str | Int32]:
    """Give a place of text as texts (each document begins with a blank line) and as tokens."""
    if path is None:
        for number, (name, text) in enumerate(documents()):
            reading.num_rows += 1
            asked = number % 2 == 0 and rendering.template
            yield f"\n\n{_answered(name, text, rendering) if asked else text}"
        return
    megatron = find_megatron(path)
    if megatron is not None:
        for done in read_megatron(megatron, Spec(rendering.spec, None, "cut"), len(rendering.tokenizer)):
            reading.num_rows += done.num_rows
            yield done.ids_T
        return
    is_inside = False
    for source in readers.sources_of(path)[0]:
        handler = _handler(source, spec.handler)
        for row in readers.read_rows(source):
            reading.num_rows += 1
            try:
                meaning = convert(handler, readers.parse(row.payload))
                if not isinstance(meaning, Text) and meaning.images:
                    raise BadRow("the conversation has pictures")
                if not isinstance(meaning, Text):
                    yield rendering.encode(meaning).ids_T
                    continue
            except BadRow as reason:
                reading.refuse(f"{source.name}{row.place}", reason)
                continue
            yield meaning.content if is_inside else f"\n\n{meaning.content}"
            is_inside = not meaning.is_complete


def _answered(name: str, text: str, rendering: Renderer) -> str:
    """Return a document as the answer in a conversation: what a chat model sees, with the tokens of its template."""
    question = Message("user", f"What does Python's documentation say about the {name}?")
    return rendering.render(Conversation((question, Message("assistant", text))))[0]


def _handler(source: readers.Source, name: str) -> Handler:
    """Return how the rows of a file are read."""
    if source.ending == ".txt":
        return named_handler("text")
    if name:
        return named_handler(name)
    rows: list[object] = []
    for row in islice(readers.read_rows(source), NUM_SNIFFED):
        try:
            rows.append(readers.parse(row.payload))
        except BadRow as reason:
            rows.append(str(reason))
    if not rows:
        raise InputError(f"{source.path} holds no rows", code="data.empty", repair="give another text")
    return choose_handler("", rows, str(source.path))


def _check(calibration_BT: Int32, held_out_BT: Int32, held_out_name: str, tokenizer_dir: Path, vocab_size: int) -> None:
    """Refuse tokens the model has not, and a judgement on what calibration has seen."""
    largest = max((int(part.max()) for part in (calibration_BT, held_out_BT) if part.size), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer of {tokenizer_dir} makes token {largest}, the model has 0 to {vocab_size - 1}",
            code="data.vocabulary",
            repair="put the tokenizer of this model beside it",
        )
    seen = {window.tobytes() for window in calibration_BT}
    if any(window.tobytes() in seen for window in held_out_BT):
        raise InputError(
            f"{held_out_name} is held out, and has windows that calibration sees too",
            code="data.overlap",
            repair="give another --evaluation, or none: then windows of --data are kept for it",
        )


def _sha256(ids_BT: Int32) -> str:
    return hashlib.sha256(ids_BT.astype("<i4").tobytes()).hexdigest() if ids_BT.size else ""
