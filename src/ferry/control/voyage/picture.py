"""The picture of a voyage: artifacts as cards from left to right, arrows for the verbs between them.

A card shows its shards as a grid (rows are tensor ranks, columns pipeline ranks). Cards of one colour hold the same
model. Under a card stand the steps that looked at it. This module places things; `picture.svg.j2` draws them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ferry.control.voyage.artifacts import Artifact, kind_text, looked_at
from ferry.core.units import duration_text, size_text

CARD_WIDTH, CARD_HEIGHT = 172, 118
GAP_X, GAP_Y = 84, 26
NOTE_HEIGHT = 21
GRID_WIDTH, GRID_HEIGHT = 42, 34
MAX_CELLS = 8
NUM_COLOURS = 6
MARGIN = 6


@dataclass
class Card:
    """One node. `key` is the step that made it, or the id of an ancestor from elsewhere; `form` is kind and layout."""

    key: str
    form: list[str]
    title: str
    line: str
    fingerprint: str = ""
    rows: int = 1
    columns: int = 1
    is_outside: bool = False
    notes: list[tuple[str, str]] = field(default_factory=list)
    x: int = 0
    y: int = 0
    colour: int = -1

    @property
    def height(self) -> int:
        return CARD_HEIGHT + NOTE_HEIGHT * len(self.notes)

    @property
    def cells(self) -> list[tuple[float, float, float, float]]:
        """Return the rectangles of the shard grid, within the card."""
        rows, columns = min(self.rows, MAX_CELLS), min(self.columns, MAX_CELLS)
        width, height = GRID_WIDTH / columns, GRID_HEIGHT / rows
        return [
            (round(12 + column * width, 1), round(13 + row * height, 1), round(width - 2, 1), round(height - 2, 1))
            for row in range(rows)
            for column in range(columns)
        ]


@dataclass
class Arrow:
    """One verb from a card to another."""

    start: Card
    end: Card
    verb: str
    cost: str

    @property
    def path(self) -> str:
        x1, y1 = self.start.x + CARD_WIDTH, self.start.y + CARD_HEIGHT / 2
        x2, y2 = self.end.x - 4, self.end.y + CARD_HEIGHT / 2
        middle = (x1 + x2) / 2
        return f"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}"

    @property
    def middle(self) -> tuple[float, float]:
        return (self.start.x + CARD_WIDTH + self.end.x) / 2, (self.start.y + self.end.y + CARD_HEIGHT) / 2


@dataclass
class Picture:
    cards: list[Card]
    arrows: list[Arrow]
    width: int
    height: int


def picture_of(artifacts: list[Artifact], entries: Iterable[Mapping[str, Any]]) -> Picture | None:
    """Return the picture, or None where there is nothing to draw."""
    if not artifacts:
        return None
    cards = {artifact.step: _card(artifact) for artifact in artifacts}
    arrows: list[Arrow] = []
    for index, artifact in enumerate(artifacts):
        _connect(artifact, artifacts[:index], cards, arrows)
    by_step = {artifact.step: artifact for artifact in artifacts}
    for entry in entries:
        if entry["name"] not in by_step and entry["status"] != "failed":
            _note(entry, artifacts, cards)
    _place(list(cards.values()), arrows)
    _colour(list(cards.values()))
    width = max(card.x for card in cards.values()) + CARD_WIDTH + MARGIN
    height = max(card.y + card.height for card in cards.values()) + MARGIN
    return Picture(list(cards.values()), arrows, width, height)


def _card(artifact: Artifact) -> Card:
    rows, columns = artifact.grid
    size = f"{size_text(artifact.num_bytes)} in {len(artifact.manifest.files)} files"
    name, fingerprint = _cut(artifact.path.name, 19), artifact.manifest.model_sha256
    return Card(artifact.step, [artifact.kind, artifact.layout], name, size, fingerprint, rows, columns)


def _connect(artifact: Artifact, earlier: list[Artifact], cards: dict[str, Card], arrows: list[Arrow]) -> None:
    """Draw the arrows into one artifact; its parents may be earlier steps, artifacts from elsewhere, or a source."""
    manifest, end = artifact.manifest, cards[artifact.step]
    cost = duration_text(artifact.seconds)
    for parent in manifest.parents:
        made = [other for other in earlier if other.manifest.id == parent]
        told = [other for other in made if looked_at(artifact.told, other.path)]
        if made:
            arrows.append(Arrow(cards[(told or made)[-1].step], end, artifact.verb, cost))
            continue
        node = next((node for node in manifest.lineage if node.id == parent), None)
        if node is not None:
            card = Card(node.id, [kind_text(node.kind)], _cut(node.name, 19), _cut(node.summary, 26), node.model_sha256)
            card.is_outside = True
            arrows.append(Arrow(cards.setdefault(node.id, card), end, artifact.verb, cost))
    source = manifest.details.get("source")
    if not manifest.parents and isinstance(source, dict) and source.get("kind"):
        name = str(source.get("name", ""))
        from_where = f"from {source['wheel']}" if source.get("wheel") else str(source.get("holds", ""))
        kind = kind_text(str(source["kind"]))
        card = Card(f"source of {artifact.step}", [kind], _cut(name, 19), _cut(from_where, 26))
        card.is_outside = True
        cards[card.key] = card
        arrows.append(Arrow(card, end, artifact.verb, cost))


def _note(entry: Mapping[str, Any], artifacts: list[Artifact], cards: dict[str, Card]) -> None:
    """Write a step under the card it looked at: the last one, where it looked at several."""
    seen = [artifact for artifact in artifacts if looked_at(entry["told"], artifact.path)]
    if seen:
        text = f"{_cut(entry['name'], 17)} {duration_text(entry['seconds'])}"
        cards[seen[-1].step].notes.append((entry["kind"], text))


def _place(cards: list[Card], arrows: list[Arrow]) -> None:
    """Put each card in the column behind its furthest parent, and the cards of a column under each other."""
    depth = {card.key: 0 for card in cards}
    for _ in cards:
        for arrow in arrows:
            depth[arrow.end.key] = max(depth[arrow.end.key], depth[arrow.start.key] + 1)
    bottom: dict[int, int] = defaultdict(lambda: MARGIN)
    for card in sorted(cards, key=lambda card: depth[card.key]):
        column = depth[card.key]
        card.x, card.y = MARGIN + column * (CARD_WIDTH + GAP_X), bottom[column]
        bottom[column] += card.height + GAP_Y


def _colour(cards: list[Card]) -> None:
    fingerprints = list(dict.fromkeys(card.fingerprint for card in cards if card.fingerprint))
    for card in cards:
        if card.fingerprint:
            card.colour = fingerprints.index(card.fingerprint) % NUM_COLOURS


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
