"""The judge's process: imports torch and megatron-core once, then forks the ranks of each job.

Reads jobs as JSON lines from standard input, answers each with one JSON line on standard output. Ranks write what they
have to say to standard error. The parent computes nothing, so that a fork never inherits a running thread.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TORCHDYNAMO_DISABLE="1")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import court  # noqa: F401  (the costly import, shared by every rank)

    for line in sys.stdin:
        print(json.dumps(_judge(json.loads(line))), file=answers, flush=True)


def _judge(job: dict[str, Any]) -> dict[str, Any]:
    if job["action"] == "transformers":
        from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401  (imported once, before the fork)

        world = 1
    else:
        world = job["tp"] * job["pp"] * job["ep"]
    with tempfile.TemporaryDirectory() as scratch:
        ranks = [_fork({**job, "rank": rank, "world": world, "scratch": scratch}) for rank in range(world)]
        waiting = set(ranks)
        failed = False
        while waiting:
            pid, status = os.wait()
            waiting.discard(pid)
            if pid in ranks and status and not failed:
                failed = True
                for other in waiting:
                    os.kill(other, 9)
        answers = []
        for rank in range(world):
            path = Path(scratch, f"answer-{rank}")
            answers.append(json.loads(path.read_text()) if path.exists() else {"error": "killed"})
    errors = [answer["error"] for answer in answers if "error" in answer]
    real = [error for error in errors if error != "killed"]
    return {"ranks": answers} if not failed else {"error": (real or errors or ["a rank died"])[0]}


def _fork(job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    answer: dict[str, Any] = {}
    try:
        answer = _rank(job)
        status = 0
    except BaseException:  # noqa: BLE001  (told to the parent, which raises it in the test)
        answer = {"error": f"rank {job['rank']}: {traceback.format_exc()}"}
    finally:
        path = os.path.join(job["scratch"], f"answer-{job['rank']}")
        with open(path + ".part", "w") as file:
            json.dump(answer, file)
        os.rename(path + ".part", path)
        sys.stderr.flush()
        os._exit(status)


def _rank(job: dict[str, Any]) -> dict[str, Any]:
    import court
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if job["action"] == "transformers":
        return court.transformers_logits(job)
    dist.init_process_group(
        "gloo", init_method=f"file://{job['scratch']}/meet", rank=job["rank"], world_size=job["world"]
    )
    try:
        return court.run(job)
    finally:
        for process in multiprocessing.active_children():
            process.terminate()


if __name__ == "__main__":
    main()
