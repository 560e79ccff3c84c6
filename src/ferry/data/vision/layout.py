"""Which layouts can train a model with a vision tower, and what a plan says about the tower. Needs no torch.

Every tensor-parallel and data-parallel rank computes the tower for its own rows, and tokens are whole there: the split
of the decoder does not touch pictures. A pipeline would need their places and positions on every stage.
"""

from __future__ import annotations

from ferry.core.dtypes import num_bytes
from ferry.core.errors import LayoutError
from ferry.core.mesh import Mesh
from ferry.core.units import size_text
from ferry.formats.checkpoint import Checkpoint


def check_layout(source: Checkpoint, mesh: Mesh) -> None:
    """Refuse pipelines."""
    if mesh.pp > 1:
        raise LayoutError(
            f"pp={mesh.pp}: a {source.model.family.name} model with its vision tower cannot be cut into stages",
            code="train.vision-layout",
            repair="use --pp 1 with --tp or --dp",
        )


def tower_sentence(source: Checkpoint) -> str:
    """Return what becomes of the tower, in words."""
    sizes = [num_bytes(dtype, shape) for dtype, shape, _ in source.carried.values()]
    return (
        f"the vision tower ({len(sizes)} tensors, {size_text(sum(sizes))}, not counted below) is frozen: it is used, "
        "and written again as it is"
    )
