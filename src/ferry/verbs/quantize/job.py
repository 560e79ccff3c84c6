"""A job of `ferry quantize`: what is to be done, with everything decided. `manual.resolve` makes it of the options."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ferry.core.quantized import Scheme
from ferry.data.windows import TextSpec

Method = Literal["smoothquant", "awq", "rtn", ""]
Action = Literal["quantize", "scales", "dequantize", "repack"]


class Limits(NamedTuple):
    """When a result counts as good."""

    max_kl: float
    min_top1: float
    max_perplexity_ratio: float


LIMITS = {8: Limits(0.05, 0.88, 1.03), 4: Limits(0.35, 0.70, 1.30)}
"""By the bits of a weight: about twice what a good recipe lost on small models, which lose more than large ones."""


@dataclass(frozen=True)
class Job:
    """What is to be done, with everything decided.

    `calibrate` is pass 1 (statistics and search, which make scales), `write` pass 2. `scheme` is None, and `method` "",
    where integers exist already. `strength` is None where it is searched for each layer.
    """

    action: Action
    model: Path
    output: Path | None
    format: str
    method: Method = ""
    scheme: Scheme | None = None
    calibrate: bool = False
    write: bool = True
    evaluate: bool = False
    strength: float | None = None
    fallback_budget: float = 0.0
    scale_input: Path | None = None
    scale_output: Path | None = None
    text: TextSpec = field(default_factory=TextSpec)
    limits: Limits = LIMITS[8]
    targets: tuple[str, ...] = ()
    tp: int = 1
    dtype: str = "auto"
    threads: int | None = None
    max_shard_size: int = 5_000_000_000
    overwrite: bool = False
    choices: tuple[str, ...] = ()

    @property
    def needs_text(self) -> bool:
        return self.calibrate or self.evaluate
