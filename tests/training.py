"""What the tests of training share: tiny models with a real tokenizer, small data, and two ways to train.

`train` does everything `ferry train` does, but forks its workers from the test's process, where torch is imported
already: a run takes a second. `command` starts the real program. Both end in a run directory, which `losses`, `events`
and `digests` read.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# The parents of all forks: what the supervisor of the real command imports before it forks.
import ferry.verbs.train.engine.worker
from ferry.core.progress import Reporter
from ferry.core.verb import Result
from ferry.data.prepare import prepare as prepare_data
from ferry.formats import training
from ferry.verbs.train import run as verb
from ferry.verbs.train import runfiles
from ferry.verbs.train.config import TrainConfig
from ferry.verbs.train.crew.channel import Channel, wait_for_any
from ferry.verbs.train.crew.spec import CrewSpec, Outcome
from ferry.verbs.train.crew.supervisor import supervise
from ferry.verbs.train.plan import prepare
from forked import FORK, Forked
from surroundings import without_hub
from words import words_of

LIMIT_S = 500.0
TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 1024, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
WHOLE_VOCABULARY = 49152
FEW = {"global_batch": 4, "seq_len": 128, "lr": 1e-3, "dtype": "float32", "device": "cpu", "export": "none"}
"""Small steps; the dtype that is the same on every machine."""


def tiny(kind: str, smollm2: Path, directory: Path, **fields: Any) -> Path:
    """Write a random model with the tokenizer of SmolLM2. `kind` is the prefix of transformers' classes.

    Weights are as large as those of a trained model, so that the loss and its gradient say something.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    directory.mkdir(parents=True)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, "tie_word_embeddings": False, **fields}, dtype="float32")
    generator = torch.Generator().manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))
    model.save_pretrained(directory)
    add_tokenizer(directory, smollm2, config.vocab_size)
    return directory


def add_tokenizer(directory: Path, smollm2: Path, vocab_size: int) -> None:
    """Write the tokenizer, cut to the model's vocabulary: the first tokens of a BPE, and the merges that make them, are
    a BPE. With all tokens of a real one, nearly all the time of a tiny model goes into logits."""
    for name in TOKENIZER:
        shutil.copyfile(smollm2 / name, directory / name)
    if vocab_size >= WHOLE_VOCABULARY:
        return
    document = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    model = document["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < vocab_size}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= model["vocab"].keys()]
    (directory / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")


def conversations(path: Path, count: int, seed: int = 5) -> Path:
    """Write conversations of different lengths, the same on every machine, as OpenAI messages."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            a, b, turns = draw.randrange(2, 99), draw.randrange(2, 99), draw.randrange(1, 3)
            messages: list[dict[str, str]] = []
            for turn in range(turns):
                messages.append({"role": "user", "content": f"What is {a + turn} times {b}?"})
                steps = ", then ".join(f"{a + turn} and {n}" for n in range(draw.randrange(1, 5)))
                messages.append({"role": "assistant", "content": f"First {steps}. It is {(a + turn) * b}."})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def texts(path: Path, count: int, seed: int = 6) -> Path:
    """Write documents for pretraining as JSONL."""
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            numbers = " ".join(str(draw.randrange(10_000)) for _ in range(draw.randrange(5, 80)))
            file.write(json.dumps({"text": f"A list of numbers: {numbers}."}) + "\n")
    return path


def settings(**fields: Any) -> TrainConfig:
    """Return a config with small steps and one thread a process; `rows.shuffle=False` is given as rows={...}."""
    crew = {"threads": 1, **fields.pop("crew", {})}
    return TrainConfig.model_validate({**FEW, "crew": crew, **fields})


def train(config: TrainConfig) -> Result:
    """Train as `ferry train` does, with workers forked from this process."""
    reporter = Reporter()
    prepared = prepare(config)
    assert config.output is not None
    runfiles.check_output(config.output, prepared.identity, overwrite=config.overwrite)
    data = prepare_data(verb._data_settings(prepared), reporter)
    job = verb._job(prepared, data)
    runfiles.begin(job.output, verb._document(prepared, job, data), overwrite=config.overwrite)
    crew = job.config.crew
    spec = CrewSpec(
        entry=verb.ENTRY, output=job.output, payload=job.to_json(), num_workers=job.mesh.num_ranks,
        restart=crew.restart, same_step_limit=crew.max_failures,
    )  # fmt: skip
    return verb._finish(_crew(spec), job, data, reporter)


def _crew(spec: CrewSpec) -> Outcome:
    """Run the supervisor in a child of this process, and wait for how it ends."""
    ours, theirs = socket.socketpair()
    folder = Path(tempfile.mkdtemp(prefix="ferry-crew-"))
    child = FORK.Process(target=_supervise, args=(spec, ours, theirs, folder))
    child.start()
    theirs.close()
    channel, outcome = Channel(ours), None
    while not channel.is_closed:
        wait_for_any([channel], LIMIT_S)
        for message in channel.receive():
            outcome = Outcome.from_json(message["outcome"]) if "outcome" in message else outcome
    child.join()
    assert outcome is not None, f"the supervisor ended without a word, exit code {child.exitcode}"
    return outcome


def _supervise(spec: CrewSpec, ours: socket.socket, theirs: socket.socket, folder: Path) -> None:
    ours.close()
    torch.set_num_threads(1)
    supervise(spec, Channel(theirs), folder)


class Command:
    """`ferry train` with small steps, running. What it says goes to a file, so that it never waits for a reader.

    It is forked from this process, or, with `program`, a Python that is started with these arguments.
    """

    def __init__(
        self, log: Path, *words: str, program: Sequence[str] = (), environ: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        environ = without_hub({**os.environ, "OMP_NUM_THREADS": "1", **(environ or {})})
        self.process: Forked | subprocess.Popen[bytes]
        if not program:
            self.process = Forked(log, ["train", *words], environ)
            return
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, *program, "train", *words],
                env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Return what the condition is, once it is true, or None if the command has ended."""
        moment = threading.Event()
        while self.runs:
            found = condition()
            if found:
                return found
            moment.wait(0.01)
        return None

    def status(self) -> int:
        return self.process.wait(timeout=LIMIT_S)

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def flags(**fields: Any) -> list[str]:
    """Return a config as words of the command line: structures are set field by field."""
    return words_of({**FEW, "crew": {"threads": 1}, **fields})


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a JSONL file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def events(output: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in lines(output / "events.jsonl") if event["event"] == name]


def losses(output: Path) -> list[float]:
    """Return the loss of every step; of a step that was done twice, the later one."""
    found = {line["step"]: line["loss"] for line in lines(output / "metrics.jsonl") if "loss" in line}
    assert found
    assert sorted(found) == list(range(1, len(found) + 1))
    return [found[step] for step in sorted(found)]


def worst(found: list[float], expected: list[float]) -> float:
    """Return the largest relative difference."""
    assert len(found) == len(expected) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def digests(output: Path) -> dict[str, str]:
    """Return the sha256 of every tensor of the last checkpoint: weights, moments, each rank's."""
    (step, *_) = training.list_steps(output / "checkpoints")
    found = {}
    for path in sorted((output / "checkpoints" / training.step_name(step)).glob("rank-*.json")):
        tensors = json.loads(path.read_text())["tensors"]
        found |= {f"{path.stem} {name}": item["sha256"] for name, item in tensors.items()}
    training.verify(output / "checkpoints" / training.step_name(step))
    return {"step": str(step), **found}


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


assert ferry.verbs.train.engine.worker.work is not None
