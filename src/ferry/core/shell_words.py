"""An option that holds words for another command, written as a shell takes them."""

from __future__ import annotations

import shlex
from typing import Annotated

from pydantic import AfterValidator


def _splits(value: str) -> str:
    try:
        shlex.split(value)
    except ValueError as error:
        raise ValueError(f"expected words as a shell takes them ({error})") from None
    return value


ShellWords = Annotated[str, AfterValidator(_splits)]
"""A text that `shlex.split` takes."""
