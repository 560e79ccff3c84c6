"""The options of `ferry train`: a short list of flags, and structures for what few people set.

The manual's variables (MBS, GBS, RUN_TYPE ...) are accepted with the meaning they have there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ferry.core.config import Layer, VerbConfig, option

METHODS = {"full": "sft", "finetune": "sft"}
"""Other words for a method: the manual's table says `full`."""
MANUAL = {"min_lr": ("optimizer", "min_lr"), "data_type": ("rows", "handler")}
"""The manual's variables whose value belongs into a structure."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraSettings(_Part):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: Annotated[int, Field(ge=1, description="Rank of the adapters.")] = 8
    alpha: Annotated[float, Field(gt=0, description="Adapters are scaled by alpha / rank.")] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1, description="Dropout before the adapters.")] = 0.0
    targets: Annotated[
        tuple[str, ...], Field(description="Which linears: all-linear, attention, mlp, or names like q_proj.")
    ] = ("all-linear",)
    rslora: Annotated[bool, Field(description="Scale by alpha / sqrt(rank) instead.")] = False

    @property
    def scale(self) -> float:
        """Return what B @ A is multiplied with."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class OptimizerSettings(_Part):
    """AdamW (Loshchilov and Hutter 2019), its schedule and clipping."""

    min_lr: Annotated[float, Field(ge=0, description="Learning rate at the end of a decay.")] = 0.0
    schedule: Annotated[Literal["cosine", "linear", "constant"], Field(description="Decay after the warm-up.")] = (
        "cosine"
    )
    warmup_steps: Annotated[int | None, Field(ge=0, description="Steps of linear warm-up; default 3 % of all.")] = None
    beta1: Annotated[float, Field(ge=0, lt=1, description="Decay of the first moment.")] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1, description="Decay of the second moment.")] = 0.95
    epsilon: Annotated[float, Field(gt=0, description="Added to the root of the second moment.")] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, description="Decoupled decay of matrices; vectors have none.")] = 0.0
    clip: Annotated[float, Field(ge=0, description="Largest global norm of the gradient; 0 switches it off.")] = 1.0


class DataSettings(_Part):
    """How rows become tokens."""

    handler: Annotated[str, Field(description="Format of the rows; empty = look at them.")] = ""
    train_on: Annotated[
        Literal["assistant", "last", "all"], Field(description="Which turns of a conversation are supervised.")
    ] = "assistant"
    truncation: Annotated[
        Literal["refuse", "cut", "drop"], Field(description="What becomes of samples longer than seq_len.")
    ] = "cut"
    packing: Annotated[bool, Field(description="Put several samples into one row, without cross-talk.")] = True
    shuffle: Annotated[
        bool, Field(description="A new order each epoch, from the seed; off = the order of the file.")
    ] = True
    validation: Annotated[tuple[str, ...], Field(description="Files of validation rows.")] = ()
    validation_fraction: Annotated[
        float, Field(ge=0, lt=1, description="Part of the rows kept for validation where no file is given.")
    ] = 0.0
    validate_every: Annotated[int, Field(ge=0, description="Steps between validations; 0 = only at the end.")] = 0
    max_bad_fraction: Annotated[float, Field(ge=0, le=1, description="Refuse data with more bad rows.")] = 0.01
    chat_template: Annotated[Path | None, Field(description="A file to use instead of the tokenizer's template.")] = (
        None
    )
    workers: Annotated[int | None, Field(ge=1, description="Processes that tokenise; default: the cores.")] = None
    cache: Annotated[Path | None, Field(description="Where token files are kept; default: Ferry's home.")] = None


class LayoutSettings(_Part):
    """Parallel settings beyond tp, pp and dp."""

    vpp: Annotated[int, Field(ge=1, description="Virtual pipeline stages per rank (interleaved 1F1B).")] = 1
    layer_list: Annotated[tuple[int, ...], Field(description="Layers of each stage, where they are uneven.")] = ()
    shard: Annotated[
        Literal["auto", "full", "none"],
        Field(description="Over dp: shard everything (FSDP2) or keep replicas; auto = full, but none for lora."),
    ] = "auto"
    recompute: Annotated[bool, Field(description="Activation checkpointing: keep only each layer's input.")] = False


class CheckpointSettings(_Part):
    """How the state is kept."""

    keep: Annotated[int, Field(ge=1, description="Good checkpoints to keep.")] = 2
    asynchronous: Annotated[bool, Field(description="Write while the next steps run.")] = True


class CrewSettings(_Part):
    """How the processes are watched."""

    restart: Annotated[bool, Field(description="Start again from the newest good checkpoint after a failure.")] = True
    max_failures: Annotated[int, Field(ge=1, description="Stop when one step has failed so often.")] = 3
    hang_factor: Annotated[float, Field(gt=0, description="A hang is no progress in this many median steps ...")] = 3.0
    hang_extra_s: Annotated[float, Field(gt=0, description="... plus this many seconds.")] = 10.0
    startup_s: Annotated[float, Field(gt=0, description="Longest time for loading, saving and the first steps.")] = (
        1800.0
    )
    threads: Annotated[int | None, Field(ge=1, description="Threads of a process; default: cores / processes.")] = None


class TrainConfig(VerbConfig):
    """Pretrain or fine-tune a model: full, or with LoRA, on any TP x PP x DP, with exact resume.

    `ferry train --model DIR --data FILE --method lora --steps 100 --output OUT`. Run it again to go on.
    `ferry train merge --model BASE --adapter OUT/adapter --output MERGED` puts an adapter into its base.
    `--dry-run` shows devices, batches and memory without training.
    """

    action: Literal["run", "merge", "tokens"] = option(
        "run", positional=True, help="Train, merge an adapter into its base, or write the data as Megatron's .bin/.idx."
    )
    model: Path | None = option(
        None, env=("ORIGINAL_HF_WEIGHT", "USER_CONVERTED_CKPT_PATH"),
        help="Model directory or Megatron shards to start from.",
    )  # fmt: skip
    data: tuple[str, ...] = option(
        (),
        env=("ORIGINAL_TRAIN_DATA_PATH",),
        help="Files or directories of training data; FILE:WEIGHT mixes by weight.",
    )
    output: Path | None = option(None, short="-o", env=("OUTPUT_SAVE_DIR",), help="Directory of the run.")
    method: Literal["sft", "lora", "pretrain"] = option("sft", env=("RUN_TYPE",), help="What is trained, on what.")
    steps: int | None = option(None, ge=1, env=("TRAIN_ITERS",), unit="steps", help="Optimizer steps; or give epochs.")
    epochs: float | None = option(None, gt=0, env=("EPOCH",), help="Passes over the data, where steps are not given.")
    seq_len: int | None = option(
        None, ge=8, env=("SEQ_LEN",), unit="tokens", help="Longest row; default: the model's limit, at most 2048."
    )
    micro_batch: int = option(1, ge=1, env=("MBS",), unit="rows of seq_len tokens", help="What one forward pass takes.")
    global_batch: int | None = option(
        None, ge=1, env=("GBS",), unit="samples", help="Samples of one optimizer step; default 8."
    )
    lr: float | None = option(None, gt=0, env=("LR",), help="Peak learning rate; default 2e-4 for lora, else 2e-5.")
    tp: int | None = option(None, ge=1, env=("TP",), unit="ranks", help="Tensor-parallel size; default 1.")
    pp: int | None = option(None, ge=1, env=("PP",), unit="ranks", help="Pipeline-parallel size; default 1.")
    dp: int | None = option(None, ge=1, unit="ranks", help="Data-parallel size; default: what devices are left.")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", help="Type to compute in; auto asks the hardware.")
    device: str = option("auto", help="Kind of device; auto takes the best one there is.")
    seed: int = option(1234, ge=0, env=("SEED",), help="Seed of order, adapters and dropout.")
    save_every: int | None = option(
        None, ge=1, env=("SAVE_INTERVAL",), unit="steps", help="Checkpoint interval; default: a tenth, at most 100."
    )
    recipe: str = option("", help="Take layout and batches from a recipe; see `ferry recipes`.")
    adapter: Path | None = option(None, help="Adapter to go on training (lora), or to merge.")
    merge: bool = option(False, help="After lora, also write the merged model.")
    export: Literal["hf", "megatron", "both", "none"] = option("hf", help="What to write at the end.")
    overwrite: bool = option(False, help="Begin anew where the output holds another run.")
    tensorboard: bool = option(False, help="Also write TensorBoard event files.")
    lora: LoraSettings = option(LoraSettings(), help="Settings of lora: rank, alpha, dropout, targets, rslora.")
    optimizer: OptimizerSettings = option(
        OptimizerSettings(), help="min_lr, schedule, warmup_steps, beta1, beta2, epsilon, weight_decay, clip."
    )
    rows: DataSettings = option(
        DataSettings(), help="How rows become tokens: handler, train_on, truncation, packing, validation ..."
    )
    layout: LayoutSettings = option(LayoutSettings(), help="vpp, layer_list, shard, recompute.")
    checkpoint: CheckpointSettings = option(CheckpointSettings(), help="keep, asynchronous.")
    crew: CrewSettings = option(CrewSettings(), help="restart, max_failures, hang_factor, hang_extra_s, threads ...")
    convert_mg2hf: str = option("", env=("CONVERT_MG2HF",), help="The manual's variable: True adds the HF export.")
    data_type: str = option("", env=("DATA_TYPE",), help="The manual's name of the row format.")
    min_lr: float | None = option(None, ge=0, env=("MIN_LR",), help="The manual's variable: optimizer.min_lr.")

    @classmethod
    def interpret(cls, layers: list[Layer]) -> list[Layer]:
        """Take the manual's words for methods."""
        return [_words(layer) for layer in layers]

    @property
    def is_recipe_alone(self) -> bool:
        """Say whether only a recipe is asked about: it can be planned without a model and devices."""
        return self.action == "run" and bool(self.recipe) and self.model is None and not self.data

    @model_validator(mode="after")
    def _complete(self) -> TrainConfig:
        if self.is_recipe_alone:
            return self
        if self.model is None:
            raise ValueError("model is missing; give --model DIR")
        if self.output is None:
            raise ValueError("output is missing; give --output DIR")
        if self.action == "merge" and self.adapter is None:
            raise ValueError("adapter is missing; give --adapter DIR, the adapter to merge")
        if self.action != "merge" and not self.data:
            raise ValueError("data is missing; give --data FILE")
        if self.merge and self.method != "lora":
            raise ValueError(f"merge belongs to lora, the method is {self.method}")
        if self.adapter is not None and self.action == "run" and self.method != "lora":
            raise ValueError(f"adapter belongs to lora, the method is {self.method}")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


def _words(layer: Layer) -> Layer:
    """Return a layer with the manual's words and variables in their places."""
    values: dict[str, Any] = dict(layer.values)
    origins = dict(layer.origins)
    method = values.get("method")
    if isinstance(method, str) and method.lower() in METHODS:
        values["method"] = METHODS[method.lower()]
    if "steps" in values and layer.origin_of("epochs").startswith("environment"):
        values.pop("epochs", None)  # the manual sets EPOCH, and TRAIN_ITERS as what follows from it
    for name, (part, field) in MANUAL.items():
        value = values.pop(name, None)
        if value in (None, ""):
            continue
        inner = values.get(part)
        values[part] = {field: value, **(inner if isinstance(inner, dict) else {})}
        origins.setdefault(f"{part}.{field}", layer.origin_of(name))
    if str(values.pop("convert_mg2hf", "")).lower() == "true" and values.get("export") == "megatron":
        values["export"] = "both"
    return Layer(layer.origin, values, origins, layer.problems)
