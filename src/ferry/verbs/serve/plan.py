"""What `ferry serve` would do: engine, memory, port. Everything that can be refused is refused here, before anything is
started, from headers alone."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from ferry.core.errors import ConfigError, FerryError, InputError
from ferry.core.plan import Plan
from ferry.core.units import size_text
from ferry.engines.choose import Choice, choose
from ferry.engines.engine import EngineKind, EngineSettings
from ferry.engines.model_facts import ModelFacts, read_facts
from ferry.engines.preflight import Memory, check_model, compute_dtype, plan_memory
from ferry.verbs.serve.config import ServeConfig, settings_of

LOCAL = ("localhost", "127.0.0.1", "::1")
OPEN_TO_OTHERS = 0o077


class Prepared(NamedTuple):
    """A decided service."""

    choice: Choice
    settings: EngineSettings
    """What the engine is told: a length that memory does not hold is lowered here."""
    facts: ModelFacts
    memory: Memory
    dtype: str
    notes: tuple[str, ...]

    @property
    def kind(self) -> EngineKind:
        return self.choice.kind


def prepare(config: ServeConfig, log_file: Path | None = None) -> Prepared:
    """Decide everything and refuse what is impossible. Starts nothing and writes nothing."""
    facts = read_facts(config.path)
    check_quantization(config, facts)
    settings = settings_of(config, log_file)
    check_model(facts, settings)
    choice = choose(config.engine, settings)
    place = choice.kind.place(settings)
    widens = choice.kind.widens(settings)
    dtype = compute_dtype(facts, settings, on_cpu=place.on_cpu, widens=widens)
    memory = plan_memory(facts, settings, place, dtype, widens=widens)
    if memory.is_lower:
        settings = replace(settings, max_model_len=memory.max_model_len)
    if memory.is_lower and place.on_cpu:
        settings = replace(settings, gpu_memory_utilization=None, kv_cache_memory_bytes=memory.cache_bytes)
    if config.chat_template is not None:
        _read(config.chat_template, "chat template", "serve.chat-template")
    notes = (*choice.sentences(), *_described(facts, memory, dtype), *_reachable(config))
    return Prepared(choice, settings, facts, memory, dtype, notes)


def plan(config: ServeConfig) -> Plan:
    """Return what `ferry serve` would do."""
    prepared = prepare(config)
    check_port(config.host, config.port)
    settings, memory = prepared.settings, prepared.memory
    port = config.port or "a free port"
    return Plan(
        verb="serve",
        summary=f"serve {config.names[0]} ({prepared.facts.described}) with {prepared.kind.name} on "
        f"{config.host}:{port}",
        inputs={"model": str(config.path.resolve())},
        memory_bytes=memory.total_bytes,
        choices=prepared.notes,
        details={
            "engine": prepared.kind.name,
            "candidates": {name: verdict._asdict() for name, verdict in prepared.choice.candidates},
            "names": list(config.names),
            "host": config.host,
            "port": config.port,
            "dtype": prepared.dtype,
            "quantization": settings.quantization,
            "max_model_len": memory.max_model_len,
            "weights_bytes": memory.weights_bytes,
            "cache_bytes": memory.cache_bytes,
            "cache_bytes_per_token": memory.bytes_per_token,
            "cache_tokens": memory.cache_tokens,
        },
    )


def check_quantization(config: ServeConfig, facts: ModelFacts) -> None:
    """Refuse a --quantization that is not what the model is, saying how to make it so."""
    wanted = config.quantization
    held = " ".join(part for part in (facts.format, facts.scheme) if part)
    if wanted == "auto" or (wanted == "none" and not facts.format):
        return
    if wanted == "none":
        raise ConfigError(
            f"-q none: {facts.path} is quantized ({held})",
            code="serve.quantization",
            repair=f"leave -q out, or `ferry quantize {facts.path} --dequantize --output OUT`",
        )
    if not facts.format:
        if wanted == "w8a8":
            return
        method = {"awq": "awq"}.get(wanted, "smoothquant")
        form = f" --format {wanted}" if wanted == "ascend" else ""
        at_once = "" if wanted == "awq" else ", or -q w8a8 rounds it while it is loaded"
        raise ConfigError(
            f"-q {wanted}: {facts.path} is a float model",
            code="serve.quantization",
            repair=f"`ferry quantize {facts.path} --method {method}{form} --output OUT` and serve OUT{at_once}",
        )
    if facts.is_called(wanted):
        return
    raise ConfigError(
        f"-q {wanted}: {facts.path} is {held}",
        code="serve.quantization",
        repair="leave -q out: the model is served as what it is",
    )


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on."""
    listening_socket(host, port).close()


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens, so that nobody else can; connections to it wait until the server takes them."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as stack:
            listening = stack.enter_context(socket.socket(family, kind, protocol))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen()
            stack.pop_all()
            return listening
    except OSError as error:
        raise _no_port(host, port, error) from None


def trusted_hosts(config: ServeConfig) -> tuple[str, ...]:
    """Return the hosts that requests may name: those of this machine where only it is listened to, without a key."""
    if config.api_key_file is not None or not _is_local(config.host):
        return ()
    return tuple(dict.fromkeys((*LOCAL, config.host.lower())))


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the keys of an --api-key-file: one a line, blank lines and lines that begin with # left out."""
    lines = [line.strip() for line in _read(path, "key file", "serve.keys").splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise InputError(f"{path} holds no key", code="serve.keys", repair="write one key a line into it")
    bad = next((number for number, key in enumerate(keys, 1) if not key.isascii() or " " in key), 0)
    if bad:
        raise InputError(
            f"{path}: key {bad} has blanks or letters outside ASCII, which no client can send",
            code="serve.keys",
            repair="make keys of letters and digits",
        )
    return keys


def _described(facts: ModelFacts, memory: Memory, dtype: str) -> tuple[str, ...]:
    """Say what was decided about the model's numbers."""
    said = [f"model: {facts.described}; computed in {dtype}"]
    if memory.bytes_per_token:
        tokens = f", {memory.cache_tokens} tokens fit" if memory.cache_tokens else ""
        said.append(
            f"memory: {size_text(memory.weights_bytes)} weights, {size_text(memory.cache_bytes)} for keys and values "
            f"({size_text(memory.bytes_per_token)} a token{tokens})"
        )
    if not any(note.startswith("max_model_len") for note in memory.notes):
        source = f" ({facts.max_positions_from})" if memory.max_model_len == facts.max_positions else ""
        said.append(f"max_model_len: {memory.max_model_len} tokens{source}")
    return (*said, *memory.notes)


def _reachable(config: ServeConfig) -> tuple[str, ...]:
    """Say who can ask, checking the keys."""
    if config.api_key_file is not None:
        keys = read_keys(config.api_key_file)
        is_open = config.api_key_file.stat().st_mode & OPEN_TO_OTHERS
        warning = (f"{config.api_key_file} can be read by other users: chmod 600 it",) if is_open else ()
        return (f"requests must bring one of {len(keys)} keys", *warning)
    if _is_local(config.host):
        return ()
    return (f"whoever reaches {config.host} can ask, without a key: --api-key-file FILE changes that",)


def _is_local(host: str) -> bool:
    try:
        return host.lower() in LOCAL or ip_address(host).is_loopback
    except ValueError:
        return False


def _read(path: Path, what: str, code: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        message, repair = (
            f"cannot read the {what} {path}: {error.strerror}",
            "is it the right path, and may you read it?",
        )
    except UnicodeDecodeError:
        message, repair = f"the {what} {path} is not UTF-8 text", "is it the right file?"
    raise InputError(message, code=code, repair=repair)


def _no_port(host: str, port: int, error: OSError) -> FerryError:
    if error.errno == errno.EADDRINUSE:
        message, repair = f"port {port} of {host} is in use", "end what listens there, or use --port 0 for any free one"
    elif error.errno == errno.EACCES:
        message, repair = f"port {port} of {host} may not be used", "use a --port of 1024 or more"
    elif error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        message, repair = f"{host} is no address of this machine", "use --host 127.0.0.1, or 0.0.0.0 for all of them"
    else:
        message, repair = f"cannot listen on {host}:{port}: {error.strerror}", "use another --host or --port"
    return ConfigError(message, code="serve.port", repair=repair)
