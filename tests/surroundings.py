"""Where tests run, for all of them to import: `conftest` is the name of several files."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
SMOLLM2_SHA256 = "28d23e373e32314d378456e8752b5b62f45d33341cadc248e1b3569354dd27e6"


def without_hub(environ: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """Return an environment in which no hub can be reached and no cache of one is seen."""
    return {**environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
