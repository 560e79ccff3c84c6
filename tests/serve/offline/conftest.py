"""One tiny model with a token for every byte, opened once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ferry import LLM
from quantize.making import write_model

CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_model("Llama", tmp_path_factory.mktemp("offline") / "tiny", max_position_embeddings=512)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(tiny, threads=1, max_num_batched_tokens=128) as opened:
        yield opened
