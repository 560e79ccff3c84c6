"""Serves a model: choose the engine, listen, load, answer until a signal comes, let running answers end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ferry.core.progress import Reporter
from ferry.core.units import duration_text, size_text
from ferry.core.verb import Result
from ferry.verbs.serve.config import ServeConfig
from ferry.verbs.serve.plan import Prepared, check_port, prepare, read_keys

if TYPE_CHECKING:
    from ferry.engines.engine import Engine
    from ferry.engines.text import TextModel
    from ferry.verbs.serve.http.served import HttpSettings, Served

SAID = ("defect", "broken promise", "request")
"""What an operator reads at once; all else is in the run record only."""


def run(config: ServeConfig, reporter: Reporter) -> Result:
    """Serve until a signal comes; return what happened."""
    prepared = prepare(config)
    for note in prepared.notes:
        reporter.event("chosen", choice=note)
        reporter.say(note)
    return asyncio.run(_serve(config, prepared, reporter))


async def _serve(config: ServeConfig, prepared: Prepared, reporter: Reporter) -> Result:
    engine = prepared.kind.make(prepared.settings)
    with bound_socket(config.host, config.port) as bound, _Signals() as signals:
        served = _served(config, engine, reporter)
        # The engine's process starts while this one imports what it needs to listen.
        serving = asyncio.create_task(_until_stopped(served, signals.stop))
        await asyncio.sleep(0)
        from ferry.verbs.serve.http.app import make_app
        from ferry.verbs.serve.http.listening import Listener, drain

        listener = Listener(make_app(served), bound)
        address = address_of(config.host, bound)
        num_cut = 0
        try:
            await listener.open()
            reporter.event("listening", address=address)
            reporter.say(f"listening on {address}; the model is being loaded")
            await serving
            if signals.stop.is_set():
                reporter.say(f"stopping: {served.gate.num_inside} requests may take {config.drain_timeout:g} s more")
        finally:
            num_cut = await drain(served, config.drain_timeout if signals.stop.is_set() else 0)
            await listener.close()
    return {
        "model": config.names[0],
        "address": address,
        "engine": prepared.kind.name,
        "stopped_by": signals.name,
        "seconds": round(served.measures.clock() - served.begun_s, 1),
        "cut_off": num_cut,
        **served.measures.totals(),
    }


async def _until_stopped(served: Served, stop: asyncio.Event) -> None:
    from ferry.verbs.serve.http.listening import serve_until

    await serve_until(served, stop)


def _served(config: ServeConfig, engine: Engine, reporter: Reporter) -> Served:
    from ferry.engines.text import open_text
    from ferry.verbs.serve.http.served import Served

    model = _with_template(open_text(config.path, config.trust_remote_code), config)

    def note(name: str, fields: Mapping[str, Any]) -> None:
        reporter.event(name, **fields)
        if name == "ready":
            for line in _ready_lines(served, fields["seconds"]):
                reporter.say(line)
        elif name in SAID:
            reporter.say(f"{name}: " + " ".join(f"{key}={value}" for key, value in fields.items()))

    defaults = model.default_sampling if config.generation_defaults == "auto" else {}
    served = Served(engine, model, _http_settings(config), defaults, note)  # `note` speaks of it
    return served


def _http_settings(config: ServeConfig) -> HttpSettings:
    from ferry.verbs.serve.http.served import HttpSettings

    return HttpSettings(
        names=config.names,
        shown_names=config.served_model_name or config.names[:1],
        api_keys=read_keys(config.api_key_file) if config.api_key_file else (),
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


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; connections to it wait until the server takes them."""
    check_port(host, port)
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound


def address_of(host: str, bound: socket.socket) -> str:
    """Return the address to give to a client."""
    port = bound.getsockname()[1]
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
