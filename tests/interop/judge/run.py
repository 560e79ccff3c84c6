"""Ask megatron-core, running on the CPU in processes of its own, what a checkpoint computes.

    logits = megatron_logits(checkpoint, hf_dir, tp=2, pp=2)
    assert np.abs(logits - transformers_logits(hf_dir)).max() < 1e-3

One server process is started at the first question and serves the whole test session (its imports take longer than a
tiny model's judgement). Needs megatron-core, einops, packaging, psutil, torch, transformers.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = [
    [1, 17, 5, 42, 99, 3, 250, 7, 64, 128, 31, 2, 77, 200, 12, 8],
    [9, 4, 180, 66, 23, 150, 11, 90, 45, 6, 240, 33, 21, 14, 101, 55],
]
"""Two fixed texts of 16 token ids, all below 251 so that every tiny vocabulary has them."""


class JudgeError(AssertionError):
    """megatron-core refused the checkpoint."""


def megatron_logits(
    checkpoint_dir: Path,
    hf_dir: Path,
    tp: int,
    pp: int,
    ep: int = 1,
    vpp: int | None = None,
    fmt: str = "torch",
    dtype: str = "fp32",
    *,
    fields: str = "hf",
    layer_list: list[int] | None = None,
    grouped_gemm: bool = False,
    divisible_by: int = 1,
    metadata: dict[str, Any] | None = None,
    strict: str = "return_all",
    tokens: list[list[int]] | None = None,
) -> np.ndarray:
    """Return megatron-core's logits [batch, length, vocab_size] for `checkpoint_dir` loaded at this layout.

    Missing or unexpected tensors and other shapes raise JudgeError. With `fields="args"` the model is built from the
    `args` in the checkpoint, as `--use-checkpoint-args` does, not from the Hugging Face config. `divisible_by` must be
    the value the checkpoint was padded with (unless `fields="args"`). `strict` is how megatron-core treats keys of a
    torch_dist checkpoint that do not match; its own default is "assume_ok_unexpected".
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.npy"
        ask(
            action="logits", checkpoint=str(checkpoint_dir), hf=str(hf_dir), tp=tp, pp=pp, ep=ep,
            vpp=vpp if vpp and vpp > 1 else None, format=fmt, dtype=_torch_name(dtype), fields=fields,
            layer_list=layer_list, grouped_gemm=grouped_gemm, divisible_by=divisible_by, metadata=metadata,
            strict=strict, tokens=tokens or TOKENS, out=str(out),
        )  # fmt: skip
        return np.load(out)


def megatron_write(
    hf_dir: Path,
    out_dir: Path,
    tp: int,
    pp: int,
    fmt: str = "torch",
    ep: int = 1,
    vpp: int | None = None,
    *,
    layer_list: list[int] | None = None,
    grouped_gemm: bool = False,
    divisible_by: int = 1,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Let megatron-core save a Hugging Face model at this layout; the weights come from `reference.py`."""
    out_dir.mkdir(parents=True, exist_ok=True)
    ask(
        action="write", hf=str(hf_dir), out=str(out_dir), tp=tp, pp=pp, ep=ep, vpp=vpp if vpp and vpp > 1 else None,
        format=fmt, layer_list=layer_list, grouped_gemm=grouped_gemm, divisible_by=divisible_by, metadata=metadata,
    )  # fmt: skip


def transformers_logits(
    hf_dir: Path, dtype: str = "fp32", *, tokens: list[list[int]] | None = None, **extra: Any
) -> np.ndarray:
    """Return transformers' logits for the same tokens; `extra` goes to from_pretrained.

    They are computed once for each directory, whose files must not change.
    """
    return _transformers_logits(hf_dir, json.dumps([_torch_name(dtype), tokens or TOKENS, extra]))


@lru_cache(maxsize=64)
def _transformers_logits(hf_dir: Path, options: str) -> np.ndarray:
    dtype, tokens, extra = json.loads(options)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.npy"
        ask(action="transformers", hf=str(hf_dir), out=str(out), dtype=dtype, extra=extra, tokens=tokens)
        found: np.ndarray = np.load(out)
        found.flags.writeable = False
        return found


def agreement(logits: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Return the largest absolute difference, and the share of positions with the same most likely token."""
    assert logits.shape == expected.shape, f"{logits.shape}, expected {expected.shape}"
    return float(np.abs(logits - expected).max()), float((logits.argmax(-1) == expected.argmax(-1)).mean())


def _torch_name(dtype: str) -> str:
    return {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}[dtype]


def ask(**job: Any) -> dict[str, Any]:
    """Give the server a job and return its answer; raise JudgeError with the rank's own words if it failed."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    line = server.stdout.readline()
    if not line:
        raise JudgeError(f"the judge's process ended with status {server.wait()}")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise JudgeError(answer["error"])
    return answer


@lru_cache(maxsize=1)
def _server() -> subprocess.Popen[str]:
    log = tempfile.NamedTemporaryFile("w", prefix="judge-", suffix=".log")  # noqa: SIM115  (lives with the server)
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("server.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
    )  # fmt: skip
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen[str]) -> None:
    if server.stdin is not None:
        server.stdin.close()
    server.wait(timeout=30)
