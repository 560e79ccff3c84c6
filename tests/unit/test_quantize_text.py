"""Windows of text: the tokens that were meant, the same ones every time, and what is refused instead of guessed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ferry.core.errors import FerryError, InputError
from ferry.data.rendering import load_tokenizer
from ferry.data.standard_library import documents
from ferry.data.windows import TextSpec, Windows, windows
from ferry.formats.megatron_data import IndexedWriter

VOCABULARY = 49152
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "mix")


def sentences(number: int, seed: int = 0) -> str:
    """Return text that never repeats itself for long."""
    random = np.random.default_rng([seed, number])
    return " ".join(f"{WORDS[index]} {int(index) * number}" for index in random.integers(0, len(WORDS), 40)) + "."


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "meta": {"pile_set_name": "x"}}) + "\n" for text in texts))
    return path


def cut(tokenizer_dir: Path, vocab_size: int = VOCABULARY, **fields: Any) -> Windows:
    fields = {"num_windows": 3, "window_tokens": 64, "num_held_out": 2, **fields}
    return windows(TextSpec(**fields), tokenizer_dir, vocab_size=vocab_size)


def tokens(tokenizer_dir: Path, text: str) -> list[int]:
    return list(load_tokenizer(tokenizer_dir)(text, add_special_tokens=False)["input_ids"])


def refused(code: str, tokenizer_dir: Path, **fields: Any) -> str:
    with pytest.raises(FerryError) as caught:
        cut(tokenizer_dir, **fields)
    assert caught.value.code == code
    return str(caught.value)


def test_windows_are_the_tokens_of_all_documents_joined_by_blank_lines(smollm2: Path, tmp_path: Path) -> None:
    texts = [sentences(number) for number in range(1, 30)]
    found = cut(smollm2, data=(str(jsonl(tmp_path / "val.jsonl", texts)),))
    expected = tokens(smollm2, "\n\n".join(texts))
    assert found.calibration_BT.dtype == np.int32
    assert found.calibration_BT.reshape(-1).tolist() == expected[: 3 * 64]
    assert found.held_out_BT.reshape(-1).tolist() == expected[3 * 64 : 5 * 64]
    assert (found.name, found.held_out_name) == ("val.jsonl", "val.jsonl")
    as_bytes = np.asarray(expected[: 3 * 64], "<i4").tobytes()
    assert found.sha256 == hashlib.sha256(as_bytes).hexdigest()
    assert found.held_out_sha256 != found.sha256


def test_reading_stops_when_there_is_enough(smollm2: Path, tmp_path: Path) -> None:
    texts = [sentences(number) for number in range(1, 200)]
    path = jsonl(tmp_path / "val.jsonl", texts)
    with open(path, "ab") as file:
        file.write(b"\xff not a row\n" * 1000)  # rows that would be counted as left out if they were read
    found = cut(smollm2, data=(str(path),))
    assert found.choices == ()
    short = cut(smollm2, data=(str(jsonl(tmp_path / "short.jsonl", texts[:60])),))
    assert np.array_equal(found.calibration_BT, short.calibration_BT)
    assert found.sha256 == short.sha256


def test_text_of_every_form_gives_the_same_tokens(smollm2: Path, tmp_path: Path) -> None:
    import zstandard

    texts = [sentences(number) for number in range(1, 30)]
    plain = jsonl(tmp_path / "a.jsonl", texts)
    zst, txt = tmp_path / "b.jsonl.zst", tmp_path / "c.txt"
    zst.write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    txt.write_text("<|endoftext|>".join(texts))
    folder = tmp_path / "folder"
    folder.mkdir()
    jsonl(folder / "1.jsonl", texts[:2])
    jsonl(folder / "2.jsonl", texts[2:])
    digests = {cut(smollm2, data=(str(path),)).sha256 for path in (plain, zst, txt, folder)}
    assert len(digests) == 1


def test_conversations_go_through_the_chat_template(smollm2: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": sentences(n)}, {"role": "assistant", "content": sentences(n, 1)}]}
        for n in range(1, 12)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = cut(smollm2, data=(str(path),))
    text = load_tokenizer(smollm2).decode(found.calibration_BT.reshape(-1).tolist())
    assert text.count("<|im_start|>user") >= 1
    assert sentences(1) in text


def test_tokens_of_megatron_are_taken_as_they_are(smollm2: Path, tmp_path: Path) -> None:
    ids = np.arange(400, dtype=np.int32) % 300
    with IndexedWriter(tmp_path / "pile_text_document") as writer:
        writer.append(ids[:150])
        writer.append(ids[150:])
    found = cut(smollm2, data=(str(tmp_path / "pile"),))
    assert found.calibration_BT.reshape(-1).tolist() == ids[: 3 * 64].tolist()
    assert found.held_out_BT.reshape(-1).tolist() == ids[3 * 64 : 5 * 64].tolist()


def test_several_texts_give_windows_by_their_weights(smollm2: Path, tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", [sentences(n) for n in range(1, 30)])
    two = jsonl(tmp_path / "two.jsonl", [sentences(n, 7) for n in range(1, 30)])
    found = cut(smollm2, data=(f"{one}:2", f"{two}:1"), num_windows=6)
    alone = cut(smollm2, data=(str(one),), num_windows=4)
    assert np.array_equal(found.calibration_BT[:4], alone.calibration_BT)
    assert found.calibration_BT.shape == (6, 64)
    assert "one.jsonl gives 4 of 6 windows, by its weight" in found.choices


def test_a_text_of_its_own_for_judging_leaves_the_calibration_text_whole(smollm2: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "val.jsonl", [sentences(n) for n in range(1, 30)])
    other = tmp_path / "wiki.txt"
    other.write_text("\n\n".join(sentences(n, 3) for n in range(1, 30)))
    found = cut(smollm2, data=(str(path),), evaluation=other)
    assert found.held_out_BT.reshape(-1).tolist() == tokens(smollm2, other.read_text())[: 2 * 64]
    assert (found.name, found.held_out_name) == ("val.jsonl", "wiki.txt")


def test_what_is_not_asked_for_is_empty(smollm2: Path, tmp_path: Path) -> None:
    other = tmp_path / "wiki.txt"
    other.write_text("\n\n".join(sentences(n, 3) for n in range(1, 30)))
    spec = TextSpec(window_tokens=64, evaluation=other, num_held_out=2)
    judged = windows(spec, smollm2, vocab_size=VOCABULARY, calibrate=False)
    assert (judged.calibration_BT.shape, judged.name, judged.sha256) == ((0, 64), "", "")
    assert judged.held_out_BT.shape == (2, 64)
    seen = windows(spec, smollm2, vocab_size=VOCABULARY, evaluate=False)
    assert (seen.held_out_BT.shape, seen.held_out_name, seen.held_out_sha256) == ((0, 64), "", "")


def test_a_short_text_gives_fewer_windows_and_says_so(smollm2: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "short.jsonl", [sentences(n) for n in range(1, 3)])
    num_tokens = len(tokens(smollm2, "\n\n".join(sentences(n) for n in range(1, 3))))
    found = cut(smollm2, data=(str(path),), num_windows=30, num_held_out=4)
    num_found = num_tokens // 64
    assert len(found.calibration_BT) + len(found.held_out_BT) == num_found
    assert len(found.held_out_BT) == 1
    assert found.choices == (
        f"short.jsonl is short: {num_found} windows of 64 tokens instead of 34, 1 of them held out",
    )


def test_too_little_text_is_refused_with_what_was_found_and_needed(smollm2: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "tiny.jsonl", ["A few words, and a few more."])
    message = refused("data.too-short", smollm2, data=(str(path),))
    assert "expected 320 (5 windows of 64) and 128 at least" in message
    assert "1 rows were read" in message


def test_a_text_of_which_no_row_is_left_says_how_many_there_were_and_why(smollm2: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "blank.jsonl", [" ", "", "\n"])
    message = refused("data.too-short", smollm2, data=(str(path),))
    assert "3 rows were read, 3 of them left out (blank.jsonl:1: the text is empty)" in message


def test_rows_that_cannot_be_read_are_left_out_and_told(smollm2: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "val.jsonl", [sentences(n) for n in range(1, 4)])
    with open(path, "ab") as file:
        file.write(b"{broken\n")
    found = cut(smollm2, data=(str(path),), num_windows=100)
    assert any("1 of them left out (val.jsonl:4: not JSON" in choice for choice in found.choices)


def test_judging_on_what_calibration_sees_is_refused(smollm2: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "val.jsonl", [sentences(n) for n in range(1, 30)])
    refused("data.overlap", smollm2, data=(str(path),), evaluation=path)


def test_tokens_the_model_does_not_have_are_refused(smollm2: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "val.jsonl", [sentences(n) for n in range(1, 30)])
    with pytest.raises(InputError, match="the model has 0 to 99") as caught:
        cut(smollm2, data=(str(path),), vocab_size=100)
    assert caught.value.code == "data.vocabulary"


def test_a_text_that_is_not_there_is_an_error(smollm2: Path, tmp_path: Path) -> None:
    refused("data.missing", smollm2, data=(str(tmp_path / "nothing.jsonl"),))


def test_without_data_there_is_pythons_own_documentation(smollm2: Path) -> None:
    found = windows(TextSpec(), smollm2, vocab_size=VOCABULARY)
    assert (found.calibration_BT.shape, found.held_out_BT.shape) == ((16, 512), (4, 512))
    assert found.name == f"Python {sys.version_info.major}.{sys.version_info.minor} documentation"


def test_the_documentation_is_long_and_no_document_comes_twice(smollm2: Path) -> None:
    texts = [text for _, text in documents()]
    assert len(set(texts)) == len(texts)
    assert len(tokens(smollm2, "\n\n".join(texts)[:300_000])) >= 60_000


def test_the_documentation_is_the_same_in_every_process_and_imports_none_of_its_modules() -> None:
    code = (
        "import hashlib, sys; from ferry.data.standard_library import documents; "
        "text = '|'.join(text for _, text in documents()); "
        "print(hashlib.sha256(text.encode()).hexdigest(), {'smtplib', 'optparse', 'pydoc_data'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{hashlib.sha256('|'.join(text for _, text in documents()).encode()).hexdigest()} set()\n"
