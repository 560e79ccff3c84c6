"""Which loss would this catch? Anything at all that a user would notice: transformers is asked before and after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ferry
from models import NATIVE, Shelf


def logits_of(directory: Path) -> torch.Tensor:
    """Return what transformers computes from a directory, in the dtype that its config names."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype="auto").eval()
    tokens = torch.arange(3, 3 + 24).reshape(2, 12)
    with torch.no_grad():
        return model(tokens).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NATIVE)
def test_transformers_computes_the_same_logits_before_and_after_the_crossing(
    models: Shelf, tmp_path: Path, name: str
) -> None:
    ferry.convert(source=models(name), target=tmp_path / "a", tp=2, pp=2)
    ferry.convert(direction="mg2mg", source=tmp_path / "a", target=tmp_path / "b", pp=4)
    ferry.convert(source=tmp_path / "b", target=tmp_path / "hf")
    before, after = logits_of(models(name)), logits_of(tmp_path / "hf")
    assert before.dtype == after.dtype
    assert torch.equal(before, after)
    assert before.float().std() > 0.01, "a model that answers the same to everything proves nothing"


def test_the_logits_of_another_model_differ(models: Shelf) -> None:
    """The comparison above can fail: one changed dialect of rotary positions is seen."""
    assert not torch.equal(logits_of(models("llama")), logits_of(models("llama-llama3-rope")))
