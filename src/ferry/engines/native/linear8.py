"""A linear layer of 8-bit weights and activations in plain torch: the arithmetic of the checkpoint, exactly.

Each token has a scale, max|x| / 127 (or the one static scale of the layer); its values are rounded half to even. The
sums of products are whole numbers without rounding; then times the scale of the row, then of the token, in float32.
Whoever is faster must give the same numbers. No integer product of torch is fast on a CPU without 8-bit instructions,
so the sums are made of float32 products, few enough at a time that each is exact.
"""

from __future__ import annotations

import torch
from torch import nn

from ferry.core.quantized import Integers

EXACT_PRODUCTS = 1024
"""Products of 8-bit numbers whose sum stays below 2**24, where float32 holds every whole number."""
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Linear8(nn.Module):
    """Takes the place of a `nn.Linear` [N, K]."""

    def __init__(self, integers: Integers, bias_N: torch.Tensor | None) -> None:
        super().__init__()
        assert integers.scheme.bits == 8
        assert integers.zeros is None
        rows, self.in_features = integers.shape
        self.out_features = rows
        self.input_scale = integers.input_scale
        self.values_NK = nn.Buffer(torch.from_numpy(integers.values))
        self.scales_N = nn.Buffer(torch.from_numpy(integers.scales.reshape(-1)).expand(rows).contiguous())
        self.bias = None if bias_N is None else nn.Parameter(bias_N.to(torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., N] for [..., K], in the type of the input."""
        x_TK = x.reshape(-1, self.in_features).to(torch.float32)
        if self.input_scale is None:
            scales_T1 = x_TK.abs().amax(dim=1, keepdim=True).div_(127.0).clamp_(min=SMALLEST_SCALE)
        else:
            scales_T1 = torch.tensor(self.input_scale)
        whole_TK = (x_TK / scales_T1).round_().clamp_(-128, 127)
        found = self._sums(whole_TK).mul_(self.scales_N).mul_(scales_T1)
        if self.bias is not None:
            found += self.bias
        return found.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _sums(self, whole_TK: torch.Tensor) -> torch.Tensor:
        """Return the sums of products as float32, rounded once."""
        if self.in_features <= EXACT_PRODUCTS:
            return whole_TK @ self.values_NK.to(torch.float32).T
        total = torch.zeros(len(whole_TK), self.out_features, dtype=torch.int32)
        for start in range(0, self.in_features, EXACT_PRODUCTS):
            part = slice(start, start + EXACT_PRODUCTS)
            total += (whole_TK[:, part] @ self.values_NK[:, part].to(torch.float32).T).to(torch.int32)
        return total.to(torch.float32)
