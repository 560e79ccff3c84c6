"""What calibration text shows of the inputs of a layer's linears: ranges, means, some rows, and how many tokens came.

Linears that read the same tensor share one `Seen`. Memory does not grow with the text: rows are kept up to a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ferry.core.errors import InputError
from ferry.core.smoothing import Group
from ferry.engines.blocks import Layer


@dataclass
class Seen:
    """The inputs [.., K] of some linears: the largest magnitudes, their sums where `sums` asks, and some rows.

    Rows are every `stride`-th token while `keeps` is on, up to `most_rows`; ranges count while `counts` is on.
    """

    name: str
    stride: int
    most_rows: int
    sums: bool
    tokens: int = 0
    absmax: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    total_abs: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    kept: list[torch.Tensor] = field(default_factory=list)
    keeps: bool = False
    counts: bool = True
    _num_kept: int = 0

    def see(self, x: torch.Tensor) -> None:
        """Take in the input of one run; raise InputError where it is not finite."""
        rows_TK = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        if not len(rows_TK):
            return
        magnitude = rows_TK.abs()
        largest = magnitude.amax(dim=0)
        if not bool(torch.isfinite(largest).all()):
            raise InputError(
                f"the input of {self.name} is not finite: it has NaN or infinite values on this text",
                code="quantize.not-finite",
                repair="is the model whole? `ferry verify` tells; is its dtype wide enough? `ferry inspect` tells",
            )
        if self.counts:
            self.absmax = torch.maximum(self.absmax, largest) if self.tokens else largest
            self.tokens += len(rows_TK)
            if self.sums:
                total = magnitude.sum(dim=0).double()
                self.total_abs = self.total_abs + total if len(self.total_abs) else total
        if self.keeps and self._num_kept < self.most_rows:
            rows = rows_TK[:: self.stride][: self.most_rows - self._num_kept].clone()
            self.kept.append(rows)
            self._num_kept += len(rows)

    @property
    def rows(self) -> torch.Tensor:
        """Return the rows that were kept [R, K]."""
        if len(self.kept) > 1:
            self.kept = [torch.cat(self.kept)]
        return self.kept[0] if self.kept else torch.zeros(0, len(self.absmax))


def shared_inputs(layer: Layer, groups: list[Group]) -> dict[str, str]:
    """Return, for every linear, the one whose input stands for its input: the first that reads the same tensor."""
    found = {name: name for name in layer.linears}
    for group in groups:
        names = [part.name.removesuffix(".weight") for part in group.into]
        readers = [name for name in names if name in layer.linears]
        firsts: dict[str, str] = {}
        for name in readers:
            # The experts of a layer read different tokens: gate and up of one expert read the same.
            owner = name.rpartition(".")[0] if group.feeds_router else ""
            found[name] = firsts.setdefault(owner, name)
    return found


def watch(layer: Layer, shared: dict[str, str], stride: int, most_rows: int, *, sums: bool) -> dict[str, Seen]:
    """Return a `Seen` for each tensor that linears read. `stride` 1 where few tokens come (experts)."""
    return {
        name: Seen(name, 1 if layer.is_expert(name) else stride, most_rows, sums)
        for name in sorted(set(shared.values()))
    }
