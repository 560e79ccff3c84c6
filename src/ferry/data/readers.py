"""Files of training data as rows, each with the place it came from.

Reading is lazy and in file order. Lines of JSON stay bytes here: whoever works on them parses them, in another process.
A row that cannot be parsed is a finding (BadRow); a file that cannot be read is an error.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

from ferry.core.errors import InputError, UnavailableError
from ferry.data.conversation import BadRow, Text

ENDINGS = (".json", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
DOCUMENT_END = "<|endoftext|>"
"""Between two documents of a .txt file. A file without it is one document."""
MAX_DOCUMENT_CHARS = 1 << 20
"""A longer document of a .txt file is cut at a line end, so that memory does not grow with it."""
_READ_BYTES = 1 << 22


class Source(NamedTuple):
    """A file of data. `name` is what messages and the index call it; `ending` says how it is read."""

    path: Path
    name: str
    ending: str
    num_bytes: int


class Row(NamedTuple):
    """One row. `place` is `:12` for line 12, `[12]` for item 12 (from 0). `payload` is bytes of JSON, or the value."""

    place: str
    payload: Any
    num_bytes: int


class Fingerprint(NamedTuple):
    """What one reading of a file tells: its digest, and its number of rows where that is cheap (an upper bound)."""

    sha256: str
    num_rows: int | None


def sources_of(path: Path) -> tuple[list[Source], list[str]]:
    """Return the data files at a path in the order of their names, and the names of files that are none."""
    if path.is_file():
        ending = _ending(path.name)
        if not ending:
            raise InputError(
                f"{path} is no file of training data", code="data.file", repair=f"give one of {', '.join(ENDINGS)}"
            )
        return [_source(path, path.name, ending)], []
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    names = {str(file.relative_to(path)): file for file in visible}
    found = [_source(file, name, _ending(name)) for name, file in names.items() if _ending(name)]
    if not found:
        raise InputError(
            f"{path} holds no training data", code="data.file", repair=f"put files there of {', '.join(ENDINGS)}"
        )
    return found, [name for name in names if not _ending(name)]


def fingerprint(source: Source) -> Fingerprint:
    """Read a file once for its digest and, for lines, their number."""
    digest, num_lines = hashlib.sha256(), 0
    with open(source.path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            num_lines += block.count(b"\n")
    return Fingerprint(digest.hexdigest(), num_lines + 1 if source.ending == ".jsonl" else None)


def read_rows(source: Source) -> Iterator[Row]:
    """Give the rows of a file. Blank lines are no rows."""
    if source.ending == ".json":
        yield from _json_rows(source)
    elif source.ending == ".parquet":
        yield from _parquet_rows(source)
    elif source.ending == ".txt":
        yield from _documents(source)
    else:
        yield from _lines(source)


def parse(payload: Any) -> Any:
    """Return the value of a row."""
    if not isinstance(payload, bytes):
        return payload
    try:
        return json.loads(payload.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise BadRow(f"not JSON: {error}") from None
    except RecursionError:
        raise BadRow("nested too deeply") from None


def _ending(name: str) -> str:
    return max((ending for ending in ENDINGS if name.lower().endswith(ending)), key=len, default="")


def _source(path: Path, name: str, ending: str) -> Source:
    return Source(path, name, ending, path.stat().st_size)


def _lines(source: Source) -> Iterator[Row]:
    with open(source.path, "rb") as raw, _expanded(source, raw) as lines:
        told_bytes = 0
        for number, line in enumerate(lines, start=1):
            # Of a compressed file, what has been read of it so far: progress is in bytes of input.
            new_bytes = len(line) if lines is raw else raw.tell() - told_bytes
            told_bytes += new_bytes
            if line.strip():
                yield Row(f":{number}", line, new_bytes)


@contextmanager
def _expanded(source: Source, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    try:
        if source.ending == ".jsonl.gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield io.BufferedReader(stream)
        elif source.ending == ".jsonl.zst":
            zstandard = _package("zstandard", source)
            with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as frames:
                yield io.BufferedReader(frames)
        else:
            yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{source.path} is damaged: {error}", code="data.compressed", repair="fetch or compress it again"
        ) from None


def _package(name: str, source: Source) -> Any:
    """Return a package that only some files need."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        package = name.partition(".")[0]
        raise UnavailableError(
            f"{source.path} needs the package {package}", code="data.package", repair=f"pip install {package}"
        ) from None


def _json_rows(source: Source) -> Iterator[Row]:
    data = source.path.read_bytes()
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _unreadable(source, f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and _is_json(data.split(b"\n", 1)[0]):
            yield from _lines(source)  # lines of JSON under another name
            return
        raise _unreadable(source, str(error)) from None
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise _unreadable(source, 'neither a list of rows nor {"data": [...]}')
    for index, row in enumerate(rows):
        share = source.num_bytes * (index + 1) // len(rows) - source.num_bytes * index // len(rows)
        yield Row(f"[{index}]", row, share)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _unreadable(source: Source, reason: str) -> InputError:
    return InputError(f"{source.path} cannot be read: {reason}", code="data.unreadable", repair="repair the file")


def _parquet_rows(source: Source) -> Iterator[Row]:
    parquet, pyarrow = (_package(name, source) for name in ("pyarrow.parquet", "pyarrow"))
    try:
        with parquet.ParquetFile(source.path) as file:
            num_rows, index = file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    share = source.num_bytes * (index + 1) // num_rows - source.num_bytes * index // num_rows
                    yield Row(f"[{index}]", _without_nothing(row), share)
                    index += 1
    except pyarrow.ArrowException as error:
        raise _unreadable(source, str(error).splitlines()[0]) from None


def _without_nothing(value: Any) -> Any:
    """Return a value without keys that hold nothing: columns of structures give every row every key."""
    if isinstance(value, dict):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None}
    return [_without_nothing(item) for item in value] if isinstance(value, list) else value


def _documents(source: Source) -> Iterator[Row]:
    """Give the documents of a .txt file. Its place is the line on which a document begins."""
    try:
        with open(source.path, encoding="utf-8-sig", newline="") as file:
            document, num_chars, first, number = [""], 0, 1, 0
            for number, line in enumerate(file, start=1):
                *ended, rest = line.split(DOCUMENT_END)
                for end in ended:
                    yield from _document("".join([*document, end]), first, is_complete=True)
                    document, num_chars, first = [""], 0, number
                document.append(rest)
                num_chars += len(rest)
                if num_chars >= MAX_DOCUMENT_CHARS:
                    yield from _document("".join(document), first, is_complete=False)
                    document, num_chars, first = [""], 0, number + 1
            yield from _document("".join(document), first, is_complete=True)
    except UnicodeDecodeError as error:
        raise _unreadable(source, f"not UTF-8 at byte {error.start}") from None


def _document(text: str, line: int, *, is_complete: bool) -> Iterator[Row]:
    if text.strip():
        yield Row(f":{line}", Text(text, is_complete), len(os.fsencode(text)))
