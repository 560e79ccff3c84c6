"""Serves a model: choose the engine, listen, load, answer until a signal comes, let running answers end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ferry.core.progress import Reporter
from ferry.core.units import duration_text, size_text
from ferry.core.verb import Result
from ferry.engines.vocabulary import check_tokenizer
from ferry.verbs.serve.config import ServeConfig
from ferry.verbs.serve.plan import Prepared, listening_socket, prepare, read_keys, trusted_hosts
from ferry.verbs.serve.report import counted

if TYPE_CHECKING:
    from ferry.engines.engine import Engine
    from ferry.engines.text import TextModel
    from ferry.verbs.serve.http.served import HttpSettings, Served

SAID = ("defect", "broken promise", "request")
"""Events that are lines of their own."""


def run(config: ServeConfig, reporter: Reporter) -> Result:
    """Serve until a signal comes; return what happened."""
    begun_s = time.monotonic()
    prepared = prepare(config)
    if config.path.is_dir():
        check_tokenizer(config.path)
    for note in prepared.notes:
        reporter.event("chosen", choice=note)
        reporter.say(note)
    return asyncio.run(_serve(config, prepared, reporter, begun_s))


async def _serve(config: ServeConfig, prepared: Prepared, reporter: Reporter, begun_s: float) -> Result:
    engine = prepared.kind.make(prepared.settings)
    with listening_socket(config.host, config.port) as bound, _Signals() as signals:
        address = address_of(bound)  # the server closes the socket
        # The engine starts in its process while a thread of this one imports what listening needs.
        starting = asyncio.create_task(engine.start())
        try:
            served = await asyncio.to_thread(_served, config, engine, reporter)
            served.begun_s = begun_s
            num_cut = await _answer(served, bound, starting, signals, config.drain_timeout)
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await engine.close()
    return {
        "model": config.names[0],
        "address": address,
        "engine": prepared.kind.name,
        "stopped_by": signals.name,
        "seconds": round(served.measures.clock() - served.begun_s, 1),
        "cut_off": num_cut,
        **served.measures.totals(),
    }


async def _answer(
    served: Served, bound: socket.socket, starting: asyncio.Task[None], signals: _Signals, drain_timeout_s: float
) -> int:
    """Listen until a signal comes; return how many requests were cut off."""
    from ferry.verbs.serve.http.app import make_app
    from ferry.verbs.serve.http.deaths import tell_deaths
    from ferry.verbs.serve.http.listening import Listener, drain, serve_until

    listener = Listener(make_app(served), bound)
    telling = asyncio.create_task(tell_deaths(served))
    try:
        await listener.open()
        served.note("listening", {"address": address_of(bound)})
        served.warm_up(served.model.vocab_size)
        await serve_until(served, starting, signals.stop)
        served.note("stopping", {"requests": served.gate.num_inside, "drain_timeout_s": drain_timeout_s})
    finally:
        num_cut = await drain(served, drain_timeout_s if signals.stop.is_set() else 0)
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        await listener.close()
    return num_cut


def _served(config: ServeConfig, engine: Engine, reporter: Reporter) -> Served:
    """Return what answers; the modules that listening needs are imported on the way."""
    import ferry.verbs.serve.http.app
    import ferry.verbs.serve.http.listening  # noqa: F401
    from ferry.engines.text import open_text
    from ferry.verbs.serve.http.served import Served

    model = _with_template(open_text(config.path, config.trust_remote_code), config)

    def note(name: str, fields: Mapping[str, Any]) -> None:
        reporter.event(name, **fields)
        for line in _lines(served, name, fields):
            reporter.say(line)

    defaults = model.default_sampling if config.generation_defaults == "auto" else {}
    served = Served(engine, model, _http_settings(config), defaults, note)  # `note` speaks of it
    return served


def _http_settings(config: ServeConfig) -> HttpSettings:
    from ferry.verbs.serve.http.served import HttpSettings

    return HttpSettings(
        names=config.names,
        shown_names=config.served_model_name or config.names[:1],
        api_keys=read_keys(config.api_key_file) if config.api_key_file else (),
        trusted_hosts=trusted_hosts(config),
        max_queue=config.max_queue,
        max_num_seqs=config.max_num_seqs,
        max_body_bytes=config.limits.max_body_bytes,
        guided_time_limit_s=config.limits.guided_time_limit,
        request_timeout_s=config.limits.request_timeout,
        log_requests=config.log_requests,
    )


def _with_template(model: TextModel, config: ServeConfig) -> TextModel:
    """Return the model with the template that was given instead of its own."""
    if config.chat_template is None:
        return model
    from ferry.engines.chat_template import ChatTemplate

    tokens = model.template.tokens if model.template else {}
    return replace(model, template=ChatTemplate(config.chat_template.read_text(encoding="utf-8"), tokens))


def _lines(served: Served, name: str, fields: Mapping[str, Any]) -> list[str]:
    """Return what a person reads of an event at once; all else is in the run record only."""
    if name == "listening":
        return [f"listening on {fields['address']}; the model is being loaded"]
    if name == "ready":
        return _ready_lines(served, fields["seconds"])
    if name == "stopping":
        return [f"stopping: {counted(fields['requests'], 'request')} may take {fields['drain_timeout_s']:g} s more"]
    if name == "engine died":
        return [f"the engine died: {fields['reason']}; restart {fields['restart']} begins"]
    if name == "engine ready again":
        return [f"the engine is ready again after {duration_text(fields['seconds'])} (restart {fields['restart']})"]
    if name in SAID:
        return [f"{name}: " + " ".join(f"{key}={_visible(key, value)}" for key, value in fields.items())]
    return []


def _visible(key: str, value: Any) -> str:
    """Return a value as part of a line: what a client sent can neither begin a line nor steer a terminal."""
    kept = "\n" if key == "traceback" else ""
    return "".join(
        letter if letter.isprintable() or letter in kept else letter.encode("unicode_escape").decode("ascii")
        for letter in str(value)
    )


def _ready_lines(served: Served, seconds: float) -> list[str]:
    info = served.engine.info
    name = served.settings.shown_names[0]
    scheme = f" {info.scheme}" if info.scheme else ""
    weights = f", {size_text(info.weights_bytes)} of weights" if info.weights_bytes else ""
    cache = f", {info.kv_cache_tokens:,} tokens of cache" if info.kv_cache_tokens else ""
    return [
        *info.notes,
        f"ready after {duration_text(seconds)}: {name} on {info.name}, {info.dtype}{scheme}{weights}{cache}, "
        f"up to {info.max_model_len:,} tokens a request",
    ]


def address_of(bound: socket.socket) -> str:
    """Return the address to give to a client."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Signals:
    """Turns the first signal into a wish to stop; the second ends the process at once."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            loop = asyncio.get_running_loop()
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup and background jobs stay protected
                    self._before[signum] = signal.getsignal(signum)
                    loop.add_signal_handler(signum, self._stop, signum)
        return self

    def _stop(self, signum: int) -> None:
        self.name = signal.Signals(signum).name
        for each in self._before:
            asyncio.get_running_loop().remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)
        self.stop.set()

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            asyncio.get_running_loop().remove_signal_handler(signum)
            signal.signal(signum, handler)
