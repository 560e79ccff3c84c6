"""Hugging Face modules without weights, and how stored bytes become their tensors. Nothing is patched."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ferry.core.errors import InputError
from ferry.core.gather import Items2D

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
}  # fmt: skip


def to_torch(items: Items2D, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return gathered items as a tensor of their stored dtype."""
    flat = torch.from_numpy(np.ascontiguousarray(items).view(np.uint8).reshape(-1))
    return flat.view(TORCH_DTYPES[dtype]).reshape(shape)


def empty_decoder(config: Any, where: object, *, code: str, repair: str) -> Any:
    """Return the decoder of a transformers config without weights; raise InputError where transformers has none."""
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            return AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise InputError(
            f"transformers cannot make the model in {where}: {' '.join(str(error).split())[:300]}",
            code=code,
            repair=repair,
        ) from None


def rebuild_buffers(decoder: nn.Module, device: torch.device) -> None:
    """Compute what the meta device left out: buffers that follow from the config, as rotary frequencies."""
    for path, module in list(decoder.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        parent, _, leaf = path.rpartition(".")
        remade: nn.Module = type(module)(config=decoder.config).to(device)
        setattr(decoder.get_submodule(parent), leaf, remade)
