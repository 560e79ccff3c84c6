"""What rank 0 writes while it trains: metrics.jsonl, a log like Megatron's, TensorBoard files if they are wanted."""

from __future__ import annotations

from contextlib import ExitStack

from ferry.core.metrics import METRICS_FILE, MetricsWriter, StepMetrics, ValidationPoint, lm_loss_line
from ferry.pages.tensorboard import TensorBoardWriter
from ferry.verbs.train.job import Job

LOG_FILE = "train.log"
TENSORBOARD = "tensorboard"


class Recording:
    """The open files of a run; nothing on other ranks than 0. Use as a context manager."""

    def __init__(self, job: Job, rank: int, first_step: int) -> None:
        self._job, self._rank, self._first_step = job, rank, first_step
        self._stack = ExitStack()
        self._writers: list[MetricsWriter | TensorBoardWriter] = []

    def __enter__(self) -> Recording:
        if self._rank == 0:
            output = self._job.output
            self._log = self._stack.enter_context(open(output / LOG_FILE, "a", encoding="utf-8", buffering=1))
            self._writers.append(self._stack.enter_context(MetricsWriter(output / METRICS_FILE)))
            if self._job.config.tensorboard:
                board = TensorBoardWriter(output / TENSORBOARD, self._first_step + 1)
                self._writers.append(self._stack.enter_context(board))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def record(self, line: StepMetrics | ValidationPoint) -> None:
        """Write one line. Only rank 0 has anything to write."""
        for writer in self._writers:
            writer.append(line)
        if isinstance(line, StepMetrics):
            job = self._job
            tflops = line.tokens_per_s * job.flops_per_token / job.mesh.num_ranks / 1e12
            self._log.write(lm_loss_line(line, job.steps, job.global_batch, tflops) + "\n")
