"""Which loss would this catch? A search that judges other numbers than those that are stored."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ferry.core.quantized import PER_ROW, PER_TENSOR, Scheme, dequantize, quantize
from ferry.verbs.quantize.numerics import quantized_input, quantized_weight
from ferry.verbs.quantize.scales import clip_of_steps, clip_to_steps

SCHEMES = [
    Scheme(8, PER_ROW, True, "token"), Scheme(8, PER_TENSOR, True, "tensor"), Scheme(4, 16, True, ""),
    Scheme(4, 16, False, ""), Scheme(4, 32, False, ""), Scheme(4, PER_ROW, True, ""),
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
    odd=st.sampled_from(["", "zero row", "one value", "ties"]),
    clipped=st.booleans(),
)
def test_the_search_sees_the_weights_that_are_stored(
    scheme: Scheme, dtype: str, seed: int, size: float, odd: str, clipped: bool
) -> None:
    draw = np.random.default_rng(seed)
    weight = (draw.standard_normal((6, 64)) * size).astype(np.float32)
    if odd == "zero row":
        weight[2] = 0
    elif odd == "one value":
        weight[1] = weight[1, 0]
    elif odd == "ties":
        weight = np.round(weight / size * 2).astype(np.float32) / 2
    clip = None
    if clipped:
        shares = 1 - draw.integers(0, 10, scheme.scales_shape(6, 64)) / 20
        clip = clip_of_steps(clip_to_steps(shares.astype(np.float32)))
    stored = dequantize(quantize(weight, scheme, dtype, clip))
    given_clip = None if clip is None else torch.from_numpy(clip)
    seen = quantized_weight(torch.from_numpy(weight), scheme, dtype, given_clip).numpy()
    # -0 and 0 are the same number.
    assert np.array_equal(seen, stored)


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
def test_an_activation_is_at_most_half_a_step_away(seed: int, size: float) -> None:
    x = torch.randn((5, 32), generator=torch.Generator().manual_seed(seed % 2**63)) * size
    steps = x.abs().amax(dim=1, keepdim=True) / 127
    found = quantized_input(x, Scheme(8, PER_ROW, True, "token"))
    assert bool(((found - x).abs() <= steps * 0.50001).all())
    scale = float(steps.max())
    found = quantized_input(x, Scheme(8, PER_TENSOR, True, "tensor"), scale)
    assert bool(((found - x).abs() <= scale * 0.50001).all())
    assert torch.equal(quantized_input(x, Scheme(4, 32, True, "")), x), "activations stay as they are"


def test_a_row_of_zeros_stays_zeros() -> None:
    assert not quantized_input(torch.zeros(3, 8), Scheme(8, PER_ROW, True, "token")).any()


def test_clip_steps_come_back() -> None:
    for step in range(10, 21):
        kept = clip_of_steps(clip_to_steps(np.array([[1 - (20 - step) / 20]], np.float32)))
        assert kept.tolist() == np.array([[np.float32(step) / np.float32(20)]]).tolist()
