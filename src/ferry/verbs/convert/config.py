"""The options of `ferry convert`, and how the seed manual's variables and flags map to them.

The manual's script takes the same variables in both directions with different meanings; `interpret` gives each value
its meaning once the direction is known. The table is in docs/how-to/convert.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ferry.core.config import Layer, VerbConfig, option

Direction = Literal["auto", "hf2mg", "hf2hg", "mg2hf", "mg2mg", "gguf2hf"]
SOURCES = {
    "hf2mg": ("original_hf_weight",),
    "mg2hf": ("model_save_path", "convert_model_path"),
    "mg2mg": ("convert_model_path",),
    "gguf2hf": (),
    "auto": (),
}
TARGETS = {
    "hf2mg": ("convert_model_path",),
    "mg2hf": ("original_hf_weight",),
    "mg2mg": ("model_save_path",),
    "gguf2hf": (),
    "auto": (),
}
"""Which of the manual's variables mean the source and the target, by direction; the first that is set counts."""


class ConvertConfig(VerbConfig):
    """Move a model between layouts without losing a bit."""

    direction: Direction = option("auto", positional=True, help="What to convert; auto looks at the source.")
    source: Path | None = option(
        None, positional=True, aliases=("--load-dir",), help="Model directory, shard set or GGUF file to read."
    )
    target: Path | None = option(
        None, positional=True, aliases=("--save-dir", "--output"), short="-o", help="Directory to make."
    )
    tp: int = option(
        1, ge=1, unit="ranks", env=("TP",), help="Tensor-parallel size of the result.",
        aliases=("--tensor-model-parallel-size", "--target-tensor-parallel-size"),
    )  # fmt: skip
    pp: int = option(
        1, ge=1, unit="ranks", env=("PP",), help="Pipeline-parallel size of the result.",
        aliases=("--pipeline-model-parallel-size", "--target-pipeline-parallel-size"),
    )  # fmt: skip
    vpp: int = option(1, ge=1, unit="virtual stages per rank", help="Virtual pipeline stages of the result.")
    layers_per_virtual_stage: int | None = option(
        None, ge=1, unit="layers", aliases=("--num-layers-per-virtual-pipeline-stage",), help="Another way to say vpp."
    )
    ep: int = option(
        1, ge=1, unit="ranks", help="Expert-parallel size of the result.",
        aliases=("--expert-model-parallel-size", "--target-expert-parallel-size"),
    )  # fmt: skip
    layer_list: tuple[int, ...] = option(
        (), unit="layers per stage", aliases=("--num-layer-list",), help="Uneven pipeline stages, as 4,4,3,3."
    )
    noop_layers: tuple[int, ...] = option((), help="Positions of empty layers that fill up the pipeline, as 0,5.")
    format: Literal["torch", "torch_dist"] = option(
        "torch", aliases=("--ckpt-format",), help="Megatron format to write: one file a rank, or distributed."
    )
    names: Literal["mcore", "te", "classic"] = option(
        "mcore", help="Tensor names to write: megatron-core local, Transformer Engine, or before megatron-core."
    )
    experts: Literal["sequential", "grouped", "te_grouped"] = option(
        "sequential", help="How experts are stored: one by one, or as grouped GEMM weights."
    )
    iteration: str = option(
        "", pattern=r"^(release|\d*)$", help="Iteration to write; empty keeps the source's, or `release`."
    )
    vocab_multiple: int | None = option(
        None, ge=1, unit="rows", aliases=("--make-vocab-size-divisible-by",),
        help="The padded vocabulary is a multiple of this times tp; default: the source's, or 128.",
    )  # fmt: skip
    hf_assets: Path | None = option(
        None, aliases=("--tokenizer-model", "--hf-cfg-dir"), env=("TOKENIZER_PATH",),
        help="Model directory with config and tokenizer, for shards that bring none, or to take the tokenizer from.",
    )  # fmt: skip
    max_shard_size: int = option(
        5_000_000_000,
        ge=1_000_000,
        unit="bytes",
        help="Size of the Hugging Face weight files, where new ones are made.",
    )
    optimizer: Literal["carry", "leave"] = option(
        "carry", help="Optimizer state between Megatron layouts: carry it or refuse, or leave it behind knowingly."
    )
    hash: bool = option(True, help="Take the sha256 of every tensor: the proof. Without it, only CRCs are written.")
    threads: int = option(2, ge=1, le=64, help="Tensors carried at the same time.")
    overwrite: bool = option(False, help="Replace the target once the new one is complete.")
    model_type: str = option("", help="The manual's name of the family: only a check, the family is detected.")
    save_model_type: str = option("", help="The manual's name of the result's format: only a check.")
    loader: str = option("", help="The manual's name of the loader: only a check.")
    saver: str = option("", help="The manual's name of the saver: only a check.")
    source_tp: int | None = option(None, ge=1, unit="ranks", help="Tensor-parallel size the source must have: a check.")
    source_pp: int | None = option(None, ge=1, unit="ranks", help="Pipeline size the source must have: a check.")
    original_hf_weight: Path | None = option(
        None, env=("ORIGINAL_HF_WEIGHT",), help="The manual's variable: the Hugging Face model directory."
    )
    convert_model_path: Path | None = option(
        None, env=("CONVERT_MODEL_PATH",), help="The manual's variable: the converted shards."
    )
    model_save_path: Path | None = option(
        None, env=("MODEL_SAVE_PATH",), help="The manual's variable: the shards that training saved."
    )

    @classmethod
    def interpret(cls, layers: list[Layer]) -> list[Layer]:
        """Give the manual's variables their meaning for the direction asked for."""
        layers = [_positional_paths(layer) for layer in layers]
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= layer.values
        direction = {"hf2hg": "hf2mg"}.get(str(merged.get("direction")), str(merged.get("direction", "auto")))
        if direction not in SOURCES:
            return layers
        if direction == "mg2hf":
            layers = [_as_source_check(layer) for layer in layers]
        meant: dict[str, str] = {}
        for key, names in (("source", SOURCES[direction]), ("target", TARGETS[direction])):
            found = next((name for name in names if merged.get(name)), None)
            if found and not merged.get(key):
                meant[key] = found
        if not meant:
            return layers
        values = {key: merged[name] for key, name in meant.items()}
        origins: dict[str, str] = {key: f"environment {name.upper()}" for key, name in meant.items()}
        return [Layer("environment", values, origins), *layers]


def _positional_paths(layer: Layer) -> Layer:
    """`ferry convert SOURCE TARGET` without a direction: paths in the direction's place move one on."""
    directions = ("auto", "hf2mg", "hf2hg", "mg2hf", "mg2mg", "gguf2hf")
    values = dict(layer.values)
    word = values.get("direction")
    looks_like_path = isinstance(word, str) and word not in directions and ("/" in word or Path(word).exists())
    if not looks_like_path or "target" in values:
        return layer
    values.pop("direction")
    if "source" in values:
        values["target"] = values.pop("source")
    values["source"] = word
    moved: dict[str, str] = {key: layer.origin_of("direction") for key in ("source", "target") if key in values}
    return Layer(layer.origin, values, {**layer.origins, **moved}, layer.problems)


def _as_source_check(layer: Layer) -> Layer:
    """On the way to Hugging Face, TP and PP from the environment describe the shards that are read."""
    moved: dict[str, str] = {
        key: f"source_{key}"
        for key in ("tp", "pp")
        if key in layer.values and layer.origin_of(key).startswith("environment")
    }
    if not moved:
        return layer
    values = {moved.get(key, key): value for key, value in layer.values.items()}
    origins = {moved[key]: layer.origin_of(key) for key in moved}
    return Layer(layer.origin, values, {**layer.origins, **origins}, layer.problems)
