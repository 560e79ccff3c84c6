"""The options of `ferry quantize`. The manual's flags are here with the meaning it gives them; `manual.py` decides what
they mean together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ferry.core.config import VerbConfig, option

Method = Literal["auto", "smoothquant", "awq", "rtn"]


def _whole(value: object) -> object:
    """Return digits of a flag as a number: a choice of numbers takes no text."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


Bits = Annotated[Literal[8, 4] | None, BeforeValidator(_whole)]
Group = Annotated[Literal[32, 64, 128] | None, BeforeValidator(_whole)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextSettings(_Part):
    """How text becomes windows of tokens."""

    evaluation_samples: Annotated[
        int, Field(ge=1, description="Windows of held-out text that the proof is made of.")
    ] = 4
    handler: Annotated[str, Field(description="Format of the rows; empty = look at them.")] = ""
    chat_template: Annotated[Path | None, Field(description="A file to use instead of the tokenizer's template.")] = (
        None
    )


class SearchSettings(_Part):
    """What is searched in pass 1."""

    fallback_budget: Annotated[
        float,
        Field(ge=0, le=1, description="Share of the weights that may stay float where they lose most."),
    ] = 0.0


class LimitSettings(_Part):
    """When a result counts as good; each default goes by the scheme."""

    max_kl: Annotated[
        float | None, Field(gt=0, description="Largest KL divergence to the original: 0.05 (W8A8), 0.35 (W4A16).")
    ] = None
    min_top1: Annotated[
        float | None, Field(ge=0, le=1, description="Smallest share of equal first choices: 0.88 (W8A8), 0.7 (W4A16).")
    ] = None
    max_perplexity_ratio: Annotated[
        float | None, Field(gt=0, description="Largest perplexity over the original's: 1.03 (W8A8), 1.3 (W4A16).")
    ] = None


class QuantizeConfig(VerbConfig):
    """Make a model small and prove what it lost: SmoothQuant W8A8, AWQ W4A16, or round-to-nearest without any text.

    `ferry quantize MODEL --method smoothquant --output OUT`. A model that is quantized already is written in another
    format (`--format`), or made float again (`--dequantize`).
    """

    model: Path | None = option(None, positional=True, aliases=("--model-path",), help="Model directory to quantize.")
    method: Method = option(
        "auto",
        help="How; auto: smoothquant, or awq where 4 bits are asked for. rtn rounds to nearest and needs no text.",
    )
    output: Path | None = option(None, short="-o", aliases=("--model-output",), help="Directory to make.")
    data: tuple[str, ...] = option(
        (),
        aliases=("--dataset-path",),
        help="Calibration text, anything `ferry train --data` takes; default: Python's own documentation.",
    )
    samples: int = option(16, ge=1, unit="windows", help="Windows of calibration text.")
    seq_len: int = option(512, ge=16, unit="tokens", help="Length of a window.")
    evaluation: Path | None = option(
        None,
        help="Held-out text for the proof; default: the calibration text after what calibration sees.",
    )
    evaluate: bool = option(True, help="Compare the result with the original on held-out text.")
    format: Literal["auto", "compressed-tensors", "awq", "ascend"] = option(
        "auto", help="How the result lies on disk; auto: compressed-tensors, or another one than the source's."
    )
    bits: Bits = option(None, unit="bits", help="Bits of a weight; default: by the method, rtn 8.")
    group_size: Group = option(
        None, unit="weights", help="4 bits: weights that share a scale; default: the largest that divides every row."
    )
    symmetric: bool | None = option(None, help="4 bits: no zero points. 8 bits are always symmetric.")
    smooth_strength: float | None = option(
        None, ge=0, le=1, help="SmoothQuant: one strength for all layers; default: searched for each layer."
    )
    per_token: bool | None = option(
        None, help="8 bits: a scale for each token's activations; off = one for all. With the manual's flags off."
    )
    per_channel: bool | None = option(
        None, help="8 bits: a scale for each row of a weight; off = one for all. With the manual's flags off."
    )
    generate_scale: bool = option(False, help="The manual's flag: make scales. Only what is flagged is done.")
    quantize_model: bool = option(False, help="The manual's flag: make the model. Only what is flagged is done.")
    scale_output: Path | None = option(None, help="File to keep the scales in (safetensors).")
    scale_input: Path | None = option(None, help="File of scales to use instead of making them.")
    dequantize: bool = option(False, help="Make a quantized model float again.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", help="dequantize: type of the result; auto: what the model's config.json says."
    )
    target: tuple[str, ...] = option((), help="Engines that must be able to run the result; refused where one cannot.")
    tp: int = option(1, ge=1, unit="ranks", help="Tensor-parallel size the result will be served with.")
    max_shard_size: int = option(5_000_000_000, ge=1_000_000, unit="bytes", help="Size of the weight files.")
    threads: int | None = option(None, ge=1, help="Threads to compute with; default: the cores.")
    overwrite: bool = option(False, help="Replace the output once the new one is complete.")
    text: TextSettings = option(TextSettings(), help="How text is read: evaluation_samples, handler, chat_template.")
    search: SearchSettings = option(SearchSettings(), help="fallback_budget.")
    limits: LimitSettings = option(LimitSettings(), help="max_kl, min_top1, max_perplexity_ratio.")

    @model_validator(mode="after")
    def _complete(self) -> QuantizeConfig:
        if self.model is None:
            raise ValueError("model is missing; give MODEL or --model-path DIR")
        if self.output is None and not self.makes_scales_alone:
            raise ValueError("output is missing; give --output DIR")
        if self.makes_scales_alone and self.scale_output is None:
            raise ValueError("scale_output is missing; give --scale-output FILE, where the scales go")
        return self

    @property
    def is_manual_form(self) -> bool:
        """Say whether the manual's flags decide what is done."""
        return self.generate_scale or self.quantize_model

    @property
    def makes_scales_alone(self) -> bool:
        return self.generate_scale and not self.quantize_model
