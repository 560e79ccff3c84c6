"""The child process of the llamacpp engine: llama.cpp's own server, from the package xllamacpp, on one port.

    python -m ferry.engines.llamacpp_server '{"model": "FILE.gguf", "port": 1234, ...}'

The key is in a variable, because others can read a command line. It runs until it is ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from typing import Any

KEY_VARIABLE = "FERRY_LLAMACPP_KEY"
QUIET = 2
"""Warnings and errors."""
KEPT_PROMPTS_MIB = 256
"""Caches of prompts that are kept outside the slots; its default is 8 GiB."""


def main(text: str) -> None:
    """Serve what the JSON text says until a signal ends the process."""
    xllamacpp: Any = import_module("xllamacpp")  # it has no types
    said: dict[str, Any] = json.loads(text)
    params = xllamacpp.CommonParams()
    params.model.path = said["model"]
    params.hostnames = ["127.0.0.1"]
    params.port = said["port"]
    params.api_keys = [os.environ.pop(KEY_VARIABLE)]
    params.n_ctx = said["num_cache_tokens"]
    params.n_parallel = said["num_slots"]
    params.kv_unified = True  # the slots share the cache: a long text takes what short ones leave
    params.n_batch = params.n_ubatch = said["num_batched_tokens"]
    params.cache_prompt = said["prefix_caching"]
    params.cache_ram_mib = KEPT_PROMPTS_MIB if said["prefix_caching"] else 0
    params.fit_params = params.ctx_shift = params.ui = False
    params.endpoint_metrics = True
    params.verbosity = QUIET
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = said["threads"]
        cpu.poll = 0  # threads without work sleep: others want the cores
    server = xllamacpp.Server(params)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del server


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(sys.argv[1])
