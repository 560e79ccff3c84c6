"""llama.cpp's own server (xllamacpp), one thread, so many slots. Prints its address; runs until it is ended."""

from __future__ import annotations

import argparse
import signal
import sys

import xllamacpp


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("gguf")
    words.add_argument("--slots", type=int, default=8)
    words.add_argument("--port", type=int, default=8091)
    given = words.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = given.gguf
    params.n_parallel = given.slots
    params.n_ctx = 512 * given.slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.hostnames, params.port = ["127.0.0.1"], given.port
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
