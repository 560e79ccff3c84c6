"""A place of data to a token file: found in the cache by what it depends on, or made there.

The key is a digest over the bytes of the data, the bytes of the tokenizer, the chat template, and those settings that
change tokens. Equal keys mean equal bytes, whatever the number of workers. Too many bad rows are refused as soon as
they are certain to be too many.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ferry.core.errors import InputError, IntegrityError, OutputError
from ferry.core.progress import Reporter
from ferry.core.staging import StagedDirectory
from ferry.data import chunks, readers
from ferry.data.conversation import BadRow, Text
from ferry.data.handlers import Handler, choose_handler, named_handler
from ferry.data.megatron import MegatronData, find_megatron, read_megatron
from ferry.data.rendering import RendererSpec, renderer, tokenizer_sha256
from ferry.data.samples import shown, shown_indices
from ferry.data.settings import DataSettings
from ferry.data.tally import Tally, judge, judge_bad, tally_from_json
from ferry.data.tokenset import TokenSet, TokenWriter

NUM_SNIFFED = 20
RECIPE = "ferry.tokens/1"
"""Changed when the same rows would give other tokens."""

WAIT_S = 0.2
"""Between two looks whether another process has made the same token file."""


class File(NamedTuple):
    """A file of data, its digest, and the format of its rows."""

    source: readers.Source
    fingerprint: readers.Fingerprint
    handler: Handler


class Work(NamedTuple):
    """What would be done for one place of data, before any of it is: `described` decides the key."""

    path: Path
    described: dict[str, Any]
    formats: list[dict[str, str]]
    skipped: list[str]
    num_bytes: int
    num_rows: int | None
    start: Callable[[], Iterator[chunks.Done]]


def prepare_tokens(path: Path, settings: DataSettings, reporter: Reporter) -> TokenSet:
    """Return the token file of a place of data, made if it is not in the cache; wait for another who is making it."""
    while True:
        try:
            return _prepare_tokens(path, settings, reporter)
        except OutputError as error:
            if error.code not in ("output.busy", "output.exists"):
                raise
            time.sleep(WAIT_S)


def _prepare_tokens(path: Path, settings: DataSettings, reporter: Reporter) -> TokenSet:
    data = find_megatron(path)
    work = _rows_work(path, settings) if data is None else _megatron_work(path, data, settings)
    for found in work.formats:
        reporter.event("data", **found)
    key = hashlib.sha256(json.dumps(work.described, sort_keys=True).encode()).hexdigest()
    target = settings.cache_dir / key[:32]
    cached = _cached(target, key, reporter)
    if cached is not None:
        tally = tally_from_json(cached.index["rows"])
        judge_bad(tally, tally.num_rows, settings)
        return cached
    with StagedDirectory(target, overwrite=target.exists()) as staged:
        with TokenWriter(staged.work, with_pictures=settings.vision is not None) as writer:
            tally = _write(writer, work, settings, reporter)
            judge(tally, writer.num_samples, path, settings)
            facts = {"formats": work.formats, "skipped_files": work.skipped, "rows": tally.to_json()}
            writer.finish({"key": key, **work.described, **facts})
        staged.commit()
    return TokenSet.open(target)


def rendered_samples(tokens: TokenSet, settings: DataSettings) -> list[list[tuple[str, bool]]]:
    """Return three samples of a token file, each as spans of text with whether they are supervised."""
    tokenizer = renderer(rendering_spec(settings)).tokenizer
    return [shown(tokens.sample(index), tokenizer) for index in shown_indices(tokens.num_samples)]


def rendering_spec(settings: DataSettings, *, learn_all: bool = False) -> RendererSpec:
    """Return how conversations are rendered under these settings."""
    template = settings.chat_template
    if template is not None and not template.is_file():
        raise InputError(f"{template} is not there", code="data.no-template", repair="give the file of a chat template")
    return RendererSpec(
        tokenizer_dir=settings.tokenizer_dir,
        train_on="all" if learn_all or settings.method == "pretrain" else settings.train_on,
        chat_template=template.read_text(encoding="utf-8") if template is not None else "",
        template_name=str(template) if template is not None else "",
        trust_remote_code=settings.trust_remote_code,
        vision=settings.vision,
    )


def _rows_work(path: Path, settings: DataSettings) -> Work:
    sources, skipped = readers.sources_of(path)
    files = [File(source, readers.fingerprint(source), _handler(source, settings.handler)) for source in sources]
    spec = _spec(settings, learn_all=any(file.handler.learn_all for file in files))
    num_bytes = sum(file.source.num_bytes for file in files)
    num_workers = settings.num_workers if settings.num_workers is not None else chunks.derived_workers(num_bytes)
    counts = [file.fingerprint.num_rows for file in files]
    listed = [
        {
            "name": file.source.name,
            "sha256": file.fingerprint.sha256,
            "num_bytes": file.source.num_bytes,
            "format": file.handler.format.name,
        }
        for file in files
    ]

    def start() -> Iterator[chunks.Done]:
        cut = (chunk for file in files for chunk in chunks.chunked(file.source, file.handler.format.name))
        return chunks.tokenise(cut, spec, num_workers)

    return Work(
        path=path,
        described=_described(listed, spec, settings),
        formats=[
            {"file": file.source.name, "format": file.handler.format.name, "reason": file.handler.reason}
            for file in files
        ],
        skipped=skipped,
        num_bytes=num_bytes,
        num_rows=None if None in counts else sum(count or 0 for count in counts),
        start=start,
    )


def _megatron_work(path: Path, data: MegatronData, settings: DataSettings) -> Work:
    spec = _spec(settings, learn_all=False)
    sources = [readers.Source(file, file.name, file.suffix, file.stat().st_size) for file in data.files]
    listed = [
        {"name": source.name, "sha256": readers.fingerprint(source).sha256, "num_bytes": source.num_bytes}
        for source in sources
    ]
    vocab_size = len(renderer(spec.rendering).tokenizer)
    return Work(
        path=path,
        described=_described(listed, spec, settings),
        formats=[{"file": data.prefix.name, "format": f"megatron {data.kind}", "reason": "it has an index (.idx)"}],
        skipped=[],
        num_bytes=sum(source.num_bytes for source in sources if source.ending == ".bin"),
        num_rows=None,
        start=lambda: read_megatron(data, spec, vocab_size),
    )


def _spec(settings: DataSettings, *, learn_all: bool) -> chunks.Spec:
    max_len = None if settings.method == "pretrain" else settings.seq_len
    return chunks.Spec(rendering_spec(settings, learn_all=learn_all), max_len, settings.truncation)


def _handler(source: readers.Source, name: str) -> Handler:
    if source.ending == ".txt":
        return named_handler("text")._replace(reason="its name ends with .txt")
    if name:
        return named_handler(name)
    return choose_handler("", list(islice(_values(source), NUM_SNIFFED)), str(source.path))


def _values(source: readers.Source) -> Iterator[object]:
    """Give the rows of a file that can be parsed; raise for a file whose first rows all cannot."""
    problem, num_seen = "", 0
    for row in islice(readers.read_rows(source), 10 * NUM_SNIFFED):
        try:
            value = readers.parse(row.payload)
        except BadRow as reason:
            problem = problem or f"{source.name}{row.place}: {reason}"
            continue
        num_seen += 1
        yield "" if isinstance(value, Text) else value
    if not num_seen:
        raise InputError(
            f"{source.path} holds no row that can be read{f' ({problem})' if problem else ''}",
            code="data.empty",
            repair="give data, or leave the file out",
        )


def _described(sources: list[dict[str, Any]], spec: chunks.Spec, settings: DataSettings) -> dict[str, Any]:
    """Return everything the tokens depend on; its digest is the key."""
    template, vision = renderer(spec.rendering).template, spec.rendering.vision
    return {
        "recipe": RECIPE,
        "sources": sources,
        "tokenizer_sha256": tokenizer_sha256(settings.tokenizer_dir),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else "",
        "settings": {
            "train_on": spec.rendering.train_on,
            "seq_len": spec.max_len,
            "truncation": spec.truncation if spec.max_len is not None else None,
        },
        **({"image_processor_sha256": vision.processor_sha256, "image_token": vision.image_token} if vision else {}),
    }


def _cached(target: Path, key: str, reporter: Reporter) -> TokenSet | None:
    if not target.exists():
        return None
    try:
        found = TokenSet.open(target)
    except IntegrityError as error:
        reporter.event("data-rejected", directory=target.name, reason=error.message)
        return None
    if found.index.get("key") != key:
        reporter.event("data-rejected", directory=target.name, reason="it was made from something else")
        return None
    changed = found.pictures.first_changed() if found.pictures is not None else ""
    if changed:
        reporter.event("data-rejected", directory=target.name, reason=f"the picture {changed} changed")
        return None
    reporter.event("data-reused", directory=target.name, num_samples=found.num_samples, num_tokens=found.num_tokens)
    return found


def _write(writer: TokenWriter, work: Work, settings: DataSettings, reporter: Reporter) -> Tally:
    tally = Tally()
    reporter.start(f"tokenising {work.path.name}", work.num_bytes)
    try:
        with closing(work.start()) as results:  # type: ignore[type-var]
            for done in results:
                tally.add(done)
                writer.append(done.ids_T, done.supervised_T, done.lengths, done.pictures)
                reporter.advance(done.num_bytes)
                if work.num_rows is not None:
                    judge_bad(tally, work.num_rows, settings)
    finally:
        reporter.finish()
    judge_bad(tally, tally.num_rows, settings)
    return tally
