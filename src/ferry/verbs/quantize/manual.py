"""From options to a job: everything that is decided before a weight is read.

The manual's script works in two phases, and the presence of a flag decides: `--generate-scale` makes scales,
`--quantize-model` makes the model, and granularity is per tensor unless `--per-token` and `--per-channel` are there. In
Ferry's own form none of the first two is given: both phases run, with a scale for each token and each row. Scales that
are read carry the ranges they were made of, so `--smooth-strength` beside `--scale-input` makes factors anew. Options
that contradict each other, or mean nothing together, are refused here.
"""

from __future__ import annotations

from pathlib import Path

from ferry.core.errors import ConfigError, InputError, LayoutError, did_you_mean
from ferry.core.family import Model
from ferry.core.quantized import PER_ROW, PER_TENSOR, Activations, Bits, Scheme
from ferry.data.windows import TextSpec
from ferry.families.registry import model_of, read_config
from ferry.formats.opening import sniff
from ferry.formats.quantized import format_of, known_format
from ferry.recipes.engines import engine_names
from ferry.verbs.quantize.config import LimitSettings, QuantizeConfig
from ferry.verbs.quantize.job import LIMITS, Action, Job, Limits, Method
from ferry.verbs.quantize.linears import linears, serving_sizes

GROUPS = (128, 64, 32)
OTHER_KINDS = {
    "megatron": ("a Megatron checkpoint", "make one of it: `ferry convert mg2hf`"),
    "torch_dist": ("a Megatron checkpoint", "make one of it: `ferry convert mg2hf`"),
    "gguf": ("a GGUF file", "make one of it: `ferry convert gguf2hf`"),
    "adapter": ("a LoRA adapter", "put it into its base: `ferry train merge`"),
}
"""Sources that become a model by another verb."""
BITS: dict[str, tuple[Bits, ...]] = {"smoothquant": (8,), "awq": (4,), "rtn": (8, 4)}
"""The bits of each method; the first is its default."""
FORMATS = {8: ("compressed-tensors", "ascend"), 4: ("compressed-tensors", "awq")}
"""The formats that hold weights of so many bits; the first is the default."""
ONLY_FLOAT = (
    "method", "data", "evaluation", "evaluate", "bits", "group_size", "symmetric", "smooth_strength", "per_token",
    "per_channel", "generate_scale", "quantize_model", "scale_output", "scale_input", "samples", "seq_len", "text",
    "search", "limits",
)  # fmt: skip
"""Options that mean nothing for a model that is quantized already."""


def resolve(config: QuantizeConfig) -> Job:
    """Return what the options mean together for this model. Reads config.json only; refuses contradictions."""
    assert config.model is not None
    _check_targets(config.target)
    found = read_config(_existing(config.model) / "config.json")
    model = model_of(found, str(config.model))
    _check_tp(model, config.tp)
    if format_of(config.model):
        return _job_of_integers(config, known_format(config.model).name)
    if config.dequantize:
        raise ConfigError(
            f"{config.model} is float already, there is nothing to dequantize",
            code="quantize.float",
            repair="leave --dequantize out",
        )
    return _job_of_floats(config, model)


def _existing(directory: Path) -> Path:
    kind = sniff(directory)
    if kind in OTHER_KINDS:
        what, repair = OTHER_KINDS[kind]
        raise InputError(f"{directory} is {what}, expected a Hugging Face model", code="quantize.source", repair=repair)
    return directory


def _check_targets(targets: tuple[str, ...]) -> None:
    for target in targets:
        if target not in engine_names():
            raise ConfigError(
                f"target={target} is no engine Ferry knows{did_you_mean(target, list(engine_names()))}",
                code="quantize.target",
                repair=f"use one of {', '.join(engine_names())}",
            )


def _check_tp(model: Model, tp: int) -> None:
    sizes = serving_sizes(model)
    if tp not in sizes:
        raise LayoutError(
            f"tp={tp} does not cut this {model.family.name} model evenly ({model.dims.num_heads} heads)",
            code="layout.tp",
            repair=f"use {', '.join(map(str, sizes))}",
        )


def _job_of_integers(config: QuantizeConfig, held: str) -> Job:
    """Return the job for a model that is quantized already: float again, or another format."""
    assert config.model is not None
    fields = QuantizeConfig.model_fields
    given = [name for name in ONLY_FLOAT if getattr(config, name) != fields[name].default]
    given += ["format"] if config.dequantize and config.format != "auto" else []
    given += ["dtype"] if not config.dequantize and config.dtype != "auto" else []
    if given:
        raise ConfigError(
            f"{config.model} is quantized already ({held}), where {', '.join(given)} mean nothing",
            code="quantize.quantized",
            repair="leave them out to write it in another format, --dequantize to make it float; or give the original",
        )
    action: Action = "dequantize" if config.dequantize else "repack"
    wanted: str = "" if config.dequantize else config.format
    choices: list[str] = []
    if wanted == held:
        raise ConfigError(
            f"{config.model} is {held} already", code="quantize.format", repair="ask for another --format"
        )
    if wanted == "auto":
        wanted = _other_format(config.model, held)
        choices.append(f"repacked as {wanted}: the model is quantized already, as {held}")
    return Job(
        action=action,
        model=config.model,
        output=config.output,
        format=wanted,
        targets=config.target,
        tp=config.tp,
        dtype=config.dtype,
        threads=config.threads,
        max_shard_size=config.max_shard_size,
        overwrite=config.overwrite,
        choices=tuple(choices),
    )


def _other_format(directory: Path, held: str) -> str:
    """Return the format a quantized model is repacked in where none is named."""
    if held != "compressed-tensors":
        return "compressed-tensors"
    layout = read_config(directory / "config.json")["quantization_config"].get("format")
    return "awq" if layout == "pack-quantized" else "ascend"


def _job_of_floats(config: QuantizeConfig, model: Model) -> Job:
    """Return the job for a float model."""
    assert config.model is not None
    choices: list[str] = []
    if config.dtype != "auto":
        raise _nonsense("dtype", config.dtype, "only --dequantize has a choice of it")
    method, bits = _method_and_bits(config, choices)
    scheme = _scheme(config, method, bits, model, choices)
    calibrate, write = _phases(config, method, choices)
    evaluate = _evaluates(config, method, write, choices)
    if config.smooth_strength is not None and method != "smoothquant":
        raise _nonsense("smooth_strength", config.smooth_strength, f"{method} does not smooth by a strength")
    if config.data and not calibrate and not evaluate:
        raise _nonsense("data", ",".join(config.data), "nothing reads text here")
    given = config.smooth_strength
    if method == "smoothquant" and not calibrate and given is not None:
        choices.append(
            f"smoothing strength {given:g} for all layers: factors are made anew of the ranges in the scales"
        )
    if method == "smoothquant" and calibrate:
        choices.append(
            f"smoothing strength {given:g} for all layers, as given"
            if given is not None
            else "smoothing strength is searched for each layer"
        )
    default = LIMITS[bits]
    limits = config.limits
    if write and not evaluate and limits != LimitSettings():
        raise _nonsense(
            "limits", limits.model_dump(exclude_none=True), "nothing is measured: give --data or --evaluation"
        )
    return Job(
        action="quantize" if write else "scales",
        model=config.model,
        output=config.output if write else None,
        format=_format(config, bits),
        method=method,
        scheme=scheme,
        calibrate=calibrate,
        write=write,
        evaluate=evaluate,
        strength=config.smooth_strength,
        fallback_budget=config.search.fallback_budget,
        scale_input=config.scale_input,
        scale_output=config.scale_output,
        text=_text(config),
        limits=Limits(
            default.max_kl if limits.max_kl is None else limits.max_kl,
            default.min_top1 if limits.min_top1 is None else limits.min_top1,
            default.max_perplexity_ratio if limits.max_perplexity_ratio is None else limits.max_perplexity_ratio,
        ),
        targets=config.target,
        tp=config.tp,
        threads=config.threads,
        max_shard_size=config.max_shard_size,
        overwrite=config.overwrite,
        choices=tuple(choices),
    )


def _method_and_bits(config: QuantizeConfig, choices: list[str]) -> tuple[Method, Bits]:
    if config.method != "auto":
        method: Method = config.method
    else:
        wants_four = config.bits == 4 or config.format == "awq" or config.group_size is not None
        method = "awq" if wants_four else "smoothquant"
        choices.append(f"method {method}: " + ("4 bits are asked for" if wants_four else "8 bits lose least"))
    bits = config.bits or (4 if method == "rtn" and config.format == "awq" else BITS[method][0])
    if bits not in BITS[method]:
        raise ConfigError(
            f"bits={bits}: {method} makes {BITS[method][0]}-bit weights",
            code="quantize.bits",
            repair=f"leave --bits out, or use --method {'awq' if bits == 4 else 'smoothquant'}",
        )
    return method, bits


def _scheme(config: QuantizeConfig, method: Method, bits: Bits, model: Model, choices: list[str]) -> Scheme:
    if bits == 4:
        for name, value in (("per_token", config.per_token), ("per_channel", config.per_channel)):
            if value is not None:
                raise _nonsense(name, value, "4-bit weights have groups, and their activations stay float")
        group = config.group_size or _group(model, config.tp, choices)
        return Scheme(4, group, bool(config.symmetric), "")
    if config.group_size is not None:
        raise _nonsense("group_size", config.group_size, "8-bit weights have one scale a row or a tensor")
    if config.symmetric is False:
        raise _nonsense("symmetric", "false", "8-bit weights have no zero points")
    default = not config.is_manual_form
    per_row = default if config.per_channel is None else config.per_channel
    return Scheme(8, PER_ROW if per_row else PER_TENSOR, True, _activations(config, method, choices))


def _activations(config: QuantizeConfig, method: Method, choices: list[str]) -> Activations:
    per_token = (not config.is_manual_form) if config.per_token is None else config.per_token
    if per_token or method != "rtn":
        return "token" if per_token else "tensor"
    if config.per_token is not None:
        raise ConfigError(
            "per_token=false: one scale for all activations is measured on text, which rtn does not read",
            code="quantize.activations",
            repair="leave it out, or use --method smoothquant",
        )
    choices.append("activations have a scale a token: rtn reads no text to measure one for all")
    return "token"


def _group(model: Model, tp: int, choices: list[str]) -> int:
    """Return the largest group that divides every row, also where rows are cut for tensor parallelism."""
    widths = {linear.of_rank(tp)[1]: linear.kind for linear in linears(model)}
    for group in GROUPS:
        if all(cols % group == 0 for cols in widths):
            if group == GROUPS[0]:
                reason = "the usual one, and it divides every row"
            else:
                cols = next(cols for cols in widths if cols % (group * 2))
                reason = f"{group * 2} does not divide the {cols} weights in a row of {widths[cols]}"
            choices.append(f"group size {group}: {reason}{f' at tp={tp}' if tp > 1 else ''}")
            return group
    cols = next(cols for cols in widths if cols % GROUPS[-1])
    raise LayoutError(
        f"no group size divides the {cols} weights in a row of {widths[cols]} at tp={tp}, tried "
        f"{', '.join(map(str, GROUPS))}",
        code="quantize.group",
        repair="use 8 bits" if tp == 1 else "use a smaller --tp, or 8 bits",
    )


def _phases(config: QuantizeConfig, method: Method, choices: list[str]) -> tuple[bool, bool]:
    """Return whether scales are made, and whether the model is."""
    write = config.quantize_model or not config.is_manual_form
    calibrate = config.generate_scale if config.is_manual_form else config.scale_input is None
    if method == "rtn":
        given = [name for name in ("generate_scale", "scale_input", "scale_output") if getattr(config, name)]
        if given:
            raise ConfigError(
                f"{', '.join(given)}: rtn has no scales that text decides",
                code="quantize.scales",
                repair="leave them out",
            )
        return False, True
    if calibrate and config.scale_input is not None:
        raise ConfigError(
            f"scales are both made (--generate-scale) and read (--scale-input {config.scale_input})",
            code="quantize.scales",
            repair="keep one of the two flags",
        )
    if not calibrate and config.scale_input is None:
        raise ConfigError(
            "--quantize-model without --generate-scale reads scales, and no file of them is named",
            code="quantize.scales",
            repair="add --generate-scale, or give --scale-input FILE",
        )
    if not calibrate and config.scale_output is not None:
        raise ConfigError(
            f"scale_output={config.scale_output}: scales are read from {config.scale_input}, none are made",
            code="quantize.scales",
            repair="leave --scale-output out, or --scale-input",
        )
    if config.scale_input is not None:
        refuse_pickle(config.scale_input)
        choices.append(f"scales are read from {config.scale_input}: no calibration")
    if not write and config.output is not None:
        choices.append(f"{config.output} is not made: without --quantize-model only scales are")
    if config.scale_output is not None and config.scale_output.suffix != ".safetensors":
        choices.append(f"{config.scale_output} will hold safetensors, whatever its name says")
    return calibrate, write


def refuse_pickle(path: Path) -> None:
    """Refuse a scale file of AutoSmoothQuant (torch.save: a zip archive or a pickle), and one that is not there."""
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise InputError(
            f"cannot read the scales {path}: {error.strerror}",
            code="quantize.scale-file",
            repair="make them with --generate-scale --scale-output FILE",
        ) from None
    if start in (b"PK", b"\x80\x02"):
        raise InputError(
            f"{path} was written by torch.save (AutoSmoothQuant), expected a scales file of `ferry quantize`: it names "
            "neither its model nor its text, and a pickle can run code",
            code="quantize.scale-file",
            repair="make scales anew with --generate-scale --scale-output FILE",
        )


def _evaluates(config: QuantizeConfig, method: Method, write: bool, choices: list[str]) -> bool:
    if not write:
        if config.evaluation is not None:
            raise _nonsense("evaluation", config.evaluation, "only scales are made, there is no model to judge")
        return False
    if not config.evaluate:
        if config.evaluation is not None:
            raise _nonsense("evaluation", config.evaluation, "--no-evaluate is given too")
        choices.append("the result is not compared with the original, as asked: it has no proof")
        return False
    if method == "rtn" and not config.data and config.evaluation is None:
        choices.append("rtn reads no text, so nothing is proven: give --data or --evaluation to compare")
        return False
    return True


def _text(config: QuantizeConfig) -> TextSpec:
    return TextSpec(
        data=config.data,
        num_windows=config.samples,
        window_tokens=config.seq_len,
        evaluation=config.evaluation,
        num_held_out=config.text.evaluation_samples,
        handler=config.text.handler,
        chat_template=config.text.chat_template,
    )


def _format(config: QuantizeConfig, bits: Bits) -> str:
    allowed = FORMATS[bits]
    if config.format == "auto":
        return allowed[0]
    if config.format not in allowed:
        raise ConfigError(
            f"format={config.format} does not hold {bits}-bit weights",
            code="quantize.format",
            repair=f"use {' or '.join(allowed)}, or --bits {12 - bits}",
        )
    return config.format


def _nonsense(name: str, value: object, reason: str) -> ConfigError:
    return ConfigError(f"{name}={value}: {reason}", code="quantize.unused", repair=f"leave {name} out")
