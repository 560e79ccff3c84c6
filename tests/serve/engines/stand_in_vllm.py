"""A program that speaks as vLLM's server does, for what a real one is too slow to be asked: deaths, restarts, cancels.

Its answers have the form of those that vLLM 0.32 gave. The "model" counts: token n is followed by n + 1. A prompt that
begins with one of the tokens below makes it behave in another way.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DIES, REFUSES, FAILS, LISTS = 900, 901, 902, 903
"""Tokens that begin a prompt: kill the process, answer 400, an error in the stream, send the words of the command."""
STATE = {"running": 0, "served": 0}
LOCK = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: Any) -> None:
        return

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, "")
        elif self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}" and self.path != "/metrics":
            self.answer(401, '{"error": "Unauthorized"}')
        elif self.path == "/v1/models":
            self.answer(200, json.dumps({"data": [{"id": "ferry", "max_model_len": 512}]}))
        else:
            self.answer(
                200,
                f'vllm:num_requests_running{{engine="0"}} {STATE["running"]}.0\n'
                f'vllm:generation_tokens_total{{engine="0"}} {STATE["served"]}.0\n'
                'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
                'vllm:cache_config_info{block_size="16",num_gpu_blocks="100",engine="0"} 1.0\n',
            )

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first = body["prompt"][0]
        if first == DIES:
            sys.stderr.write("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n")
            sys.stderr.flush()
            os._exit(3)
        if first == REFUSES:
            self.answer(400, json.dumps({"error": {"message": "Grammar error: no", "code": 400}}))
            return
        if not body.get("stream"):
            self.answer(200, json.dumps(whole(body)))
            return
        with LOCK:
            STATE["running"] += 1
        try:
            self.stream(body, first)
        except BrokenPipeError:
            return
        finally:
            with LOCK:
                STATE["running"] -= 1

    def stream(self, body: dict[str, Any], first: int) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        if first == FAILS:
            self.event({"error": {"message": "EngineCore encountered an issue", "code": 500}})
            return
        token = body["prompt"][-1]
        for number in range(body["max_tokens"]):
            token += 1
            is_end = token in body["stop_token_ids"]
            is_last = is_end or number + 1 == body["max_tokens"]
            choice: dict[str, Any] = {"index": 0, "text": "", "token_ids": [token], "logprobs": None}
            choice |= {"finish_reason": None, "stop_reason": None}
            if body.get("logprobs") is not None:
                choice["logprobs"] = listed(token, body["logprobs"])
            if is_last:
                choice |= {"finish_reason": "stop" if is_end else "length", "stop_reason": token if is_end else None}
            self.event({"choices": [choice]})
            with LOCK:
                STATE["served"] += 1
            if is_last:
                break
            time.sleep(0.005)
        self.event({"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 5}}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, said: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(said)}\n\n".encode())
        self.wfile.flush()

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


def listed(token: int, number: int) -> dict[str, Any]:
    top = {f"token_id:{token + place}": -0.5 - place for place in range(number)}
    return {"tokens": [f"token_id:{token}"], "token_logprobs": [-0.5], "top_logprobs": [top]}


def whole(body: dict[str, Any]) -> dict[str, Any]:
    prompt = body["prompt"]
    if prompt[0] == LISTS:
        return {"choices": [{"token_ids": [ord(letter) for letter in " ".join(sys.argv)], "finish_reason": "length"}]}
    places = [{str(token): {"logprob": -1.0, "rank": 7}, "4": {"logprob": -0.1, "rank": 1}} for token in prompt[1:]]
    choice = {"token_ids": [prompt[-1] + 1], "finish_reason": "length", "prompt_logprobs": [None, *places]}
    return {"choices": [choice], "usage": {}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--dtype")
    arguments, _ = parser.parse_known_args()
    sys.stderr.write("INFO 11-29 11:00:00 [default_loader.py:1] Loading safetensors checkpoint shards: 50% Completed\n")
    if arguments.dtype == "bfloat16":
        sys.stderr.write("ValueError: To serve at least one request, the estimated maximum model length is 640.\n")
        sys.exit(1)
    ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler).serve_forever()
