"""What `ferry inspect` tells of a manifest, whatever the artifact is."""

from __future__ import annotations

from typing import Any

from ferry.core.manifest import Manifest


def summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "id": manifest.id,
        "kind": manifest.kind,
        "model_sha256": manifest.model_sha256,
        "made_by": f"ferry {manifest.verb} {manifest.version}",
        "summary": manifest.summary,
        "changes": list(manifest.changes),
    }
