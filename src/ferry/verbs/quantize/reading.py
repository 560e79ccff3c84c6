"""Text cut into windows in a process of its own: a tokenizer and its text need not stay in memory.

Not by multiprocessing, whose children import the caller's script once more: `ferry.quantize(...)` would then work only
in scripts that are written for it. Question and answer are files of a directory that is removed.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from ferry.core.errors import FerryError, InputError
from ferry.data.windows import TextSpec, Windows, windows

PROGRAM = "import sys; place, *sys.path = sys.argv[1:]; from ferry.verbs.quantize.reading import answer; answer(place)"


def cut(spec: TextSpec, tokenizer_dir: Path, vocab_size: int, *, calibrate: bool, evaluate: bool) -> Windows:
    """Return what `ferry.data.windows.windows` returns, or raise what it raises."""
    with TemporaryDirectory(prefix="ferry-text-") as place:
        question = (spec, tokenizer_dir, {"vocab_size": vocab_size, "calibrate": calibrate, "evaluate": evaluate})
        (Path(place) / "question").write_bytes(pickle.dumps(question))
        # A session of its own: Ctrl-C is ours to see, and ends the child with us.
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, place, *sys.path],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise InputError(
                f"the process that reads the text ended with status {done.returncode}",
                code="quantize.text",
                repair="see above what it said; give less text if memory was short (status -9)",
            )
        found: Windows | FerryError = pickle.loads((Path(place) / "answer").read_bytes())  # written by ourselves
    if isinstance(found, FerryError):
        raise found
    return found


def answer(place: str) -> None:
    """Be the child: leave the windows, or the user's mistake, in `place`."""
    spec, tokenizer_dir, options = pickle.loads((Path(place) / "question").read_bytes())
    found: Windows | FerryError
    try:
        found = windows(spec, tokenizer_dir, **options)
    except FerryError as error:
        found = error
    (Path(place) / "answer").write_bytes(pickle.dumps(found))
