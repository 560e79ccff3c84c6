"""What `ferry recipes` can be asked."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ferry.core.config import VerbConfig, option


class RecipesConfig(VerbConfig):
    """List and show recommended layouts for training, or propose one.

    `ferry recipes`, `ferry recipes show llama2-13b-lora-4096`,
    `ferry recipes propose --model DIR --devices 8 --memory-gb 64 --method lora --seq-len 4096`.
    """

    action: Literal["list", "show", "propose"] = option("list", help="What to do.", positional=True)
    id: str = option("", help="The recipe to show.", positional=True, metavar="ID")
    model: str = option("", help="List only recipes of this model; propose for this model, by name or directory.")
    method: Literal["", "full", "sft", "pretrain", "lora"] = option(
        "", help="List only recipes of this method; propose for it (full, if not given).", metavar="METHOD"
    )
    seq_len: int | None = option(
        None, ge=1, help="List only recipes of this length; propose for it (4096, if not given).", unit="tokens"
    )
    devices: int = option(8, ge=1, help="Devices to propose for.", unit="devices")
    memory_gb: float = option(64.0, gt=0, help="Memory of one device.", unit="GB")
    dtype: Literal["bf16", "fp32"] = option("bf16", help="Data type of weights and activations.")
    sharding: Literal["none", "optimizer", "full"] = option("none", help="What data-parallel ranks share out.")

    @model_validator(mode="after")
    def _words_fit_the_action(self) -> RecipesConfig:
        if self.action == "show" and not self.id:
            raise ValueError("ferry recipes show takes the id of a recipe, like llama2-13b-lora-4096")
        if self.action != "show" and self.id:
            raise ValueError(f"ferry recipes {self.action} takes no id, found {self.id!r}")
        if self.action == "propose" and not self.model:
            raise ValueError("ferry recipes propose needs --model, a name or a directory")
        return self
