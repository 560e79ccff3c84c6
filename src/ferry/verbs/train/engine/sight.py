"""The vision tower in training: frozen, it turns pictures into vectors that take the places of placeholder tokens.

The tower is transformers' own module with the tensors the checkpoint carries. B batch (1), T tokens, H hidden size, N
patches, P tokens of pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ferry.core.errors import InputError, UnavailableError
from ferry.core.family import Model, Vision
from ferry.data.vision.pictures import Picture, VisionSpec, patches
from ferry.data.vision.places import Grid, axes
from ferry.engines.modules import rebuild_buffers, to_torch

Carried = Mapping[str, tuple[str, tuple[int, ...], bytes]]


class Sight(nn.Module):
    """Puts what the tower sees into embedded tokens. Has no parameter that is trained."""

    def __init__(self, tower: nn.Module, spec: VisionSpec) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False).eval()
        self.spec = spec

    def forward(
        self, h_BTH: torch.Tensor, ids_BT: torch.Tensor, positions_BT: torch.Tensor, pictures: Sequence[Picture]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embedded tokens with pictures in their places, and positions: [3, B, T] where there are any."""
        if not pictures:
            return h_BTH, positions_BT
        seen_PH = self.seen(pictures).to(h_BTH.dtype)
        places_P = (ids_BT[0] == self.spec.image_token).nonzero().flatten()
        assert len(places_P) == len(seen_PH), f"{len(places_P)} placeholders, {len(seen_PH)} vectors of pictures"
        h_TH = h_BTH[0].index_copy(0, places_P, seen_PH)
        grids = [Grid(picture.rows, picture.columns) for picture in pictures]
        axes_3T = axes(ids_BT[0].cpu().numpy(), positions_BT[0].cpu().numpy(), grids, self.spec.image_token)
        return h_TH[None], torch.from_numpy(axes_3T)[:, None].to(ids_BT.device)

    @torch.no_grad()
    def seen(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Return the vectors of all pictures behind each other [P, H]."""
        made = [patches(picture, self.spec) for picture in pictures]
        weight = next(self.tower.parameters())
        pixels_NC = torch.from_numpy(np.concatenate([one.pixels_NC for one in made])).to(weight)
        grid = torch.tensor([[1, one.high, one.wide] for one in made], device=weight.device)
        found: torch.Tensor = self.tower(pixels_NC, grid_thw=grid).pooler_output
        return found


def build_sight(
    directory: Path, model: Model, carried: Carried, spec: VisionSpec, dtype: torch.dtype, device: torch.device
) -> Sight:
    """Return the tower of a model with its weights. `directory` holds config.json."""
    vision = model.family.vision
    assert vision is not None
    tower = _empty_tower(directory, vision)
    tensors = {
        name.removeprefix(vision.tensors): _tensor(*item).to(dtype).to(device)
        for name, item in carried.items()
        if name.startswith(vision.tensors)
    }
    result = tower.load_state_dict(tensors, strict=False, assign=True)
    if result.missing_keys or result.unexpected_keys:
        names = [f"no {name}" for name in result.missing_keys] + [f"unknown {name}" for name in result.unexpected_keys]
        raise InputError(
            f"the vision tower in {directory} is not complete: {', '.join(names[:4])}",
            code="train.model-tensors",
            repair="fetch the model again",
        )
    rebuild_buffers(tower, device)
    return Sight(tower, spec)


def _empty_tower(directory: Path, vision: Vision) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    maker: Any = getattr(transformers, vision.whole)
    with torch.device("meta"):
        whole = maker.from_config(config, attn_implementation="sdpa")
    try:
        return whole.get_submodule(vision.tower)
    except AttributeError:
        raise UnavailableError(
            f"transformers {transformers.__version__} has no {vision.tower} in this model",
            code="train.vision-package",
            repair="pip install 'llmferry[vision]'",
        ) from None


def _tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    return to_torch(np.frombuffer(data, np.uint8).copy(), dtype, shape)
