"""Write training data from the standard library's own documentation, and print what was made as one JSON object.

    python stdlib_text.py OUTPUT_DIRECTORY [--max-rows N] [--max-chars N]

    OUTPUT/train.jsonl     conversations: a question about a topic or an object, and what the documentation says
    OUTPUT/heldout.jsonl   the same, of topics and modules that train.jsonl has nothing of
    OUTPUT/text.txt        the topics of train.jsonl as plain text, for pretraining
    OUTPUT/heldout.txt     those of heldout.jsonl

The same Python always writes the same bytes. Another version of Python has other documentation.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import pathlib
import re
import sys
from pydoc_data.topics import topics

MODULES = (  # noqa: SIM905 - a list would be forty lines
    "argparse base64 bisect calendar collections contextlib copy csv dataclasses datetime difflib fnmatch fractions "
    "functools glob hashlib heapq html inspect itertools json logging math operator os.path pathlib pprint random re "
    "shutil statistics string struct subprocess tempfile textwrap threading time urllib.parse zlib"
).split()
HELD_OUT_EVERY = 8
MIN_CHARS = 80
DOCUMENT_END = "<|endoftext|>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write training data from the standard library's documentation.")
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--max-rows", type=int, default=400, help="rows of train.jsonl at most")
    parser.add_argument("--max-chars", type=int, default=500, help="characters of an answer at most")
    arguments = parser.parse_args()
    print(json.dumps(write(arguments.output, arguments.max_rows, arguments.max_chars)))


def write(output: pathlib.Path, max_rows: int, max_chars: int) -> dict[str, object]:
    output.mkdir(parents=True, exist_ok=True)
    groups = {**topic_groups(), **module_groups()}
    names = spread(sorted(groups))
    held_out = set(names[::HELD_OUT_EVERY])
    rows = {True: [], False: []}
    texts = {True: [], False: []}
    for name in names:
        part, entries = name in held_out, groups[name]
        rows[part] += [row(question, trimmed(answer, max_chars)) for question, answer in entries]
        texts[part] += [answer for _, answer in entries if name.startswith("topic ")]
    train, heldout = spread(rows[False])[:max_rows], spread(rows[True])[: max(max_rows // HELD_OUT_EVERY, 1)]
    files = {
        "train": (output / "train.jsonl", "".join(train)),
        "heldout": (output / "heldout.jsonl", "".join(heldout)),
        "text": (output / "text.txt", DOCUMENT_END.join(f"{text}\n" for text in texts[False])),
        "heldout_text": (output / "heldout.txt", DOCUMENT_END.join(f"{text}\n" for text in texts[True])),
    }
    for path, text in files.values():
        path.write_text(text, encoding="utf-8")
    return {
        "output": str(output),
        "python": sys.version.split()[0],
        "train_rows": len(train),
        "heldout_rows": len(heldout),
        **{name: str(path) for name, (path, _) in files.items()},
        "train_sha256": hashlib.sha256(files["train"][1].encode()).hexdigest(),
        "heldout_sha256": hashlib.sha256(files["heldout"][1].encode()).hexdigest(),
    }


def topic_groups() -> dict[str, list[tuple[str, str]]]:
    """Return question and answer of each topic of `help()`. The same text under several names is taken once."""
    found: dict[str, tuple[str, str]] = {}
    for name, text in sorted(topics.items()):
        body = without_title(text)
        if len(body) >= MIN_CHARS:
            question = f"What does Python's documentation say about {name.replace('-', ' ').lower()}?"
            found.setdefault(body, (f"topic {name}", question))
    return {name: [(question, body)] for body, (name, question) in found.items()}


def module_groups() -> dict[str, list[tuple[str, str]]]:
    """Return the questions and answers about each module's functions and classes, those of a module together."""
    groups = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        entries = []
        for name in sorted(public):
            thing = getattr(module, name)
            text = (inspect.getdoc(thing) or "").strip() if inspect.isroutine(thing) or inspect.isclass(thing) else ""
            if len(text) >= MIN_CHARS:
                kind = "class" if inspect.isclass(thing) else "function"
                entries.append((f"What does the {kind} {module_name}.{name} do?", text))
        groups[f"module {module_name}"] = entries
    return groups


def without_title(text: str) -> str:
    """Return a topic without its underlined title."""
    return re.sub(r"\A\s*[^\n]+\n[*=~^\"-]{3,}\n", "", text).strip()


def trimmed(text: str, max_chars: int) -> str:
    """Return the first paragraphs of a text, or the first sentences of its first paragraph, within a length."""
    if len(text) <= max_chars:
        return text
    for ends in (r"\n\n", r"(?<=[.!?:])\s", r"\s"):
        places = [match.start() for match in re.finditer(ends, text[: max_chars + 1])]
        if places and places[-1] >= MIN_CHARS:
            return text[: places[-1]].rstrip()
    return text[:max_chars]


def row(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def spread(items: list[str]) -> list[str]:
    """Return items in an order that has nothing to do with their names, and is always the same."""
    return sorted(items, key=lambda item: hashlib.sha256(item.encode()).digest())


if __name__ == "__main__":
    main()
