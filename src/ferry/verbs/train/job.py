"""Everything a worker needs to know, decided: plain values that travel to it as JSON. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ferry.core.mesh import Mesh
from ferry.verbs.train.config import TrainConfig


@dataclass(frozen=True)
class DataPlace:
    """Where the tokenised data lies, and how it is to be read: token directories, weights, and the split."""

    train: tuple[str, ...]
    weights: tuple[float, ...] | None
    validation: tuple[str, ...]
    validation_fraction: float
    seed: int
    sha256: str
    num_samples: int


@dataclass(frozen=True)
class Job:
    """One training run, with every decision made.

    `flops_per_token` over the device's peak rate is the model flops utilisation (MFU).
    """

    config: TrainConfig
    mesh: Mesh
    assets: Path
    """The directory with config.json and the tokenizer."""
    steps: int
    save_every: int
    seq_len: int
    global_batch: int
    lr: float
    warmup_steps: int
    dtype: str
    device: str
    sharded: bool
    modules: tuple[str, ...]
    """Linears that get an adapter."""
    threads: int
    flops_per_token: float
    data: DataPlace
    identity: str

    @property
    def output(self) -> Path:
        assert self.config.output is not None
        return self.config.output

    @property
    def checkpoints(self) -> Path:
        return self.output / "checkpoints"

    @property
    def lora_scale(self) -> float:
        return self.config.lora.scale

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        document |= {"config": self.config.model_dump(mode="json"), "assets": str(self.assets)}
        document["mesh"] = self.mesh._asdict()
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Job:
        data = document["data"]
        typed = {
            "config": TrainConfig.model_validate(document["config"]),
            "mesh": Mesh(**document["mesh"]),
            "assets": Path(document["assets"]),
            "modules": tuple(document["modules"]),
            "data": DataPlace(
                **{
                    **data,
                    "train": tuple(data["train"]),
                    "validation": tuple(data["validation"]),
                    "weights": tuple(data["weights"]) if data["weights"] is not None else None,
                }
            ),
        }
        return cls(**{**document, **typed})
