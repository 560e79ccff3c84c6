"""Which layouts can train a model with a vision tower, and what a plan says about the tower. Needs no torch."""

from __future__ import annotations

from ferry.core.dtypes import num_bytes
from ferry.core.errors import LayoutError
from ferry.core.mesh import Mesh
from ferry.core.units import size_text
from ferry.formats.checkpoint import Checkpoint
from ferry.verbs.train.config import TrainConfig


def check_layout(source: Checkpoint, config: TrainConfig, mesh: Mesh) -> None:
    """Refuse what needs pictures on several stages, or a tower in slices."""
    wrong = [f"{name}={size}" for name, size in (("tp", mesh.tp), ("pp", mesh.pp)) if size > 1]
    wrong += ["layout.shard=full"] if config.layout.shard == "full" else []
    if wrong:
        raise LayoutError(
            f"{' and '.join(wrong)}: a {source.model.family.name} model with its vision tower is trained whole on each "
            "rank",
            code="train.vision-layout",
            repair="leave it out; use --dp for more ranks",
        )


def tower_sentence(source: Checkpoint) -> str:
    """Return what becomes of the tower, in words."""
    sizes = [num_bytes(dtype, shape) for dtype, shape, _ in source.carried.values()]
    return (
        f"the vision tower ({len(sizes)} tensors, {size_text(sum(sizes))}, not counted below) is frozen: it is used, "
        "and written again as it is"
    )
