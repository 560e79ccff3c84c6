"""What the engine's process and its parent say to each other: JSON documents, each behind its length.

Every message has one key, its kind. To the child: `settings` first, then `add` and `cancel`. From the child: `ready`
with what it is or `failed` with why not, then `step` with all outputs of a step and the counters after it; at any time
`alive`, which says nothing else. Tuples that come often are lists here, in the order of their fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ferry.core import errors
from ferry.core.errors import FerryError, UnavailableError
from ferry.engines.engine import EngineInfo, EngineSettings
from ferry.engines.request import Output, Request, Sampling, Stats, TokenLogprobs

LENGTH_BYTES = 4
ALIVE = "alive"
BEAT_S = 2.0
"""How often a child says that it is there."""


def frame(kind: str, content: Any) -> bytes:
    """Return a message as bytes."""
    body = json.dumps({kind: content}, separators=(",", ":")).encode()
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def length_of(head: bytes) -> int:
    """Return how many bytes follow the first four."""
    return int.from_bytes(head, "little")


def parse(body: bytes) -> tuple[str, Any]:
    """Return the kind of a message and what it says."""
    ((kind, content),) = json.loads(body).items()
    return kind, content


def settings_to_json(settings: EngineSettings) -> dict[str, Any]:
    """Return settings as JSON values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}


def settings_from_json(found: Mapping[str, Any]) -> EngineSettings:
    """Return settings as they were before `settings_to_json`."""
    paths = {name: Path(found[name]) for name in ("model", "environment", "log_file") if found[name] is not None}
    return EngineSettings(**{**found, **paths, "further": tuple(found["further"])})


def request_to_json(request: Request) -> dict[str, Any]:
    """Return a request as JSON values; settings of sampling that are as always are left out."""
    usual, sampling = Sampling(), request.sampling
    told = {field.name: getattr(sampling, field.name) for field in fields(Sampling)}
    told = {name: value for name, value in told.items() if value != getattr(usual, name)}
    if "logit_bias" in told:
        told["logit_bias"] = list(told["logit_bias"].items())
    return {"id": request.id, "prompt_ids": request.prompt_ids, "sampling": told, "grammar": request.grammar}


def request_from_json(found: Mapping[str, Any]) -> Request:
    """Return a request as it was before `request_to_json`."""
    told = dict(found["sampling"])
    if "logit_bias" in told:
        told["logit_bias"] = {int(token): float(bias) for token, bias in told["logit_bias"]}
    if "end_token_ids" in told:
        told["end_token_ids"] = tuple(told["end_token_ids"])
    return Request(found["id"], tuple(found["prompt_ids"]), Sampling(**told), found["grammar"])


def outputs_to_json(outputs: list[Output]) -> list[list[Any]]:
    """Return outputs as JSON values; one that has only tokens is short."""
    return [
        [output.request_id, output.token_ids]
        if output == Output(output.request_id, output.token_ids)
        else [getattr(output, field.name) for field in fields(Output)]
        for output in outputs
    ]


def outputs_from_json(found: list[list[Any]]) -> list[Output]:
    """Return outputs as they were before `outputs_to_json`."""
    return [_output(values) for values in found]


def stats_from_json(found: list[Any]) -> Stats:
    """Return counters, which travel as the tuple that they are."""
    return Stats(*found)


def info_from_json(found: list[Any]) -> EngineInfo:
    """Return what an engine is, which travels as the tuple that it is."""
    info = EngineInfo(*found)
    return info._replace(notes=tuple(info.notes))


def error_to_json(error: FerryError) -> dict[str, str]:
    """Return an error of the tree as JSON values."""
    kind = next(parent.__name__ for parent in type(error).__mro__ if hasattr(errors, parent.__name__))
    return {"kind": kind, "message": error.message, "code": error.code, "repair": error.repair}


def error_from_json(found: Mapping[str, str]) -> FerryError:
    """Return an error of the same class, code and repair."""
    kind = getattr(errors, found["kind"], UnavailableError)
    error: FerryError = kind(found["message"], code=found["code"], repair=found["repair"])
    return error


def _output(values: list[Any]) -> Output:
    request_id, token_ids, *further = values
    if not further:
        return Output(request_id, tuple(token_ids))
    logprobs, finish, end_token_id, prompt, *rest = further
    told = None if prompt is None else tuple(None if one is None else _logprobs(one) for one in prompt)
    return Output(request_id, tuple(token_ids), tuple(map(_logprobs, logprobs)), finish, end_token_id, told, *rest)


def _logprobs(values: list[Any]) -> TokenLogprobs:
    token_id, logprob, rank, top = values
    return TokenLogprobs(token_id, logprob, rank, tuple((token, value) for token, value in top))
