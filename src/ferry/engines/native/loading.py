"""A causal model of transformers with its weights: float, quantized by Ferry, or rounded to 8 bits while loading.

Modules are transformers' own. Only linears whose weights are integers are replaced, by `Linear8`; 4-bit weights become
floats. Weights are converted as they are read, so that one copy of the model is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ferry.core.errors import ConfigError, InputError
from ferry.core.family import EXPERT_DOWN, EXPERT_GATE, EXPERT_UP, ROUTER
from ferry.core.quantized import PER_ROW, Scheme, dequantize, quantize
from ferry.engines.blocks import Experts
from ferry.engines.engine import EngineSettings
from ferry.engines.modules import rebuild_buffers, to_torch
from ferry.engines.native.attention import NAME, register
from ferry.engines.native.linear8 import Linear8
from ferry.formats.quantized import WEIGHT, QuantizedCheckpoint, format_of, open_quantized

W8A8 = Scheme(8, PER_ROW, True, "token")
ROUND_TO = "w8a8"
SHOWN = 5


class Loaded(NamedTuple):
    """A model ready to run. `scheme` is W8A8 and the like, "" for floats."""

    model: Any
    scheme: str
    notes: tuple[str, ...]


def load(settings: EngineSettings, dtype: torch.dtype) -> Loaded:
    """Return the model of a directory, its floats in `dtype`."""
    register()
    if settings.quantization not in ("", ROUND_TO):
        raise ConfigError(
            f"--quantization {settings.quantization} is nothing the native engine does while loading",
            code="engine.quantization",
            repair=f"use {ROUND_TO}, or quantize the model with `ferry quantize` and serve the result",
        )
    config = _config(settings)
    if format_of(settings.model):
        checkpoint = open_quantized(settings.model)
        del config.quantization_config
        scheme = next(iter(checkpoint.schemes.values()))
        if scheme.bits == 8 and scheme.activations:
            return Loaded(_of_integers(config, checkpoint, dtype), scheme.name, ())
        note = f"{scheme.name} weights are computed as floats: they take the memory of a float model"
        return Loaded(_of_transformers(settings, config, dtype, _floats(checkpoint, dtype)), scheme.name, (note,))
    if settings.quantization == ROUND_TO:
        model = _of_transformers(settings, config, "auto")
        return Loaded(model, W8A8.name, _round(model, dtype))
    return Loaded(_of_transformers(settings, config, dtype), "", ())


def _config(settings: EngineSettings) -> Any:
    from transformers import AutoConfig

    with _refusing(settings.model):
        config = AutoConfig.from_pretrained(
            settings.model, trust_remote_code=settings.trust_remote_code, local_files_only=True
        )
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(settings.model, f"{config.model_type} is an encoder with a decoder")
    return config


def _of_transformers(
    settings: EngineSettings, config: Any, dtype: torch.dtype | str, weights: dict[str, torch.Tensor] | None = None
) -> Any:
    """Return the model as transformers loads it, from its directory or from given weights."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    given: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": NAME}
    with _refusing(settings.model), _quiet():
        if weights is None:
            make: Any = AutoModelForCausalLM
            given |= {"trust_remote_code": settings.trust_remote_code, "local_files_only": True}
        else:
            make = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            given["state_dict"] = weights
        where = settings.model if weights is None else None
        model, report = make.from_pretrained(where, output_loading_info=True, **given)
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{settings.model} lacks {len(missing)} weights of a {config.model_type} model: "
            f"{', '.join(missing[:SHOWN])}{' ...' if len(missing) > SHOWN else ''}",
            code="engine.weights",
            repair="the download is incomplete, or config.json belongs to another model",
        )
    _refuse_model(settings.model, model)
    return model


def _refuse_model(directory: Path, model: Any) -> None:
    kind = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise _unsupported(directory, f"{kind} keeps a state that is not made of keys and values")
    if not getattr(model, "_supports_attention_backend", False):
        raise _unsupported(directory, f"{kind} does not let its attention be chosen")


def _unsupported(directory: Path, reason: str) -> InputError:
    return InputError(
        f"the native engine cannot run {directory}: {reason}", code="engine.model", repair="use another engine"
    )


def _floats(checkpoint: QuantizedCheckpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return every weight of a quantized checkpoint as floats."""
    found = {name: value.to(dtype) for name, value in _unquantized(checkpoint)}
    for module in checkpoint.schemes:
        found[module + WEIGHT] = torch.from_numpy(dequantize(checkpoint.integers(module))).to(dtype)
    return found


def _unquantized(checkpoint: QuantizedCheckpoint) -> Iterator[tuple[str, torch.Tensor]]:
    integers = {name for module in checkpoint.schemes for name in checkpoint.tensors_of(module)}
    for name in checkpoint.found:
        if name not in integers and not checkpoint.model.is_carried(name):
            stored = checkpoint.read(name)
            yield name, to_torch(stored.data, stored.dtype, stored.shape)


def _of_integers(config: Any, checkpoint: QuantizedCheckpoint, dtype: torch.dtype) -> Any:
    """Return a model whose quantized linears compute with integers."""
    from transformers import AutoModelForCausalLM

    with _refusing(checkpoint.directory), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=NAME
        )
    _refuse_model(checkpoint.directory, model)
    floats = dict(_unquantized(checkpoint))
    family, dims = checkpoint.model.family, checkpoint.model.dims
    moved: dict[str, str] = {}
    for layer in (layer for layer in range(dims.num_layers) if dims.is_moe(layer)):
        router = checkpoint.model.part(ROUTER, layer).name
        moved[router] = family.modules[ROUTER].format(layer=layer)
        _put_experts(model, checkpoint, layer, family.modules[EXPERT_UP].format(layer=layer).rpartition(".")[0])
    for module in checkpoint.schemes:
        if not _is_expert(checkpoint, module):
            bias = floats.pop(f"{module}.bias", None)
            _replace(model, module, Linear8(checkpoint.integers(module), bias))
    for name, value in floats.items():
        owner, _, leaf = moved.get(name, name).rpartition(".")
        parameter = nn.Parameter(value.to(dtype), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, parameter)
    model.tie_weights()
    rebuild_buffers(model, torch.device("cpu"))
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise _unsupported(checkpoint.directory, f"nothing is known about {', '.join(left[:SHOWN])}")
    return model.eval()


def _is_expert(checkpoint: QuantizedCheckpoint, module: str) -> bool:
    return checkpoint.model.role_of(module + WEIGHT) in (EXPERT_GATE, EXPERT_UP, EXPERT_DOWN)


def _put_experts(model: Any, checkpoint: QuantizedCheckpoint, layer: int, path: str) -> None:
    """Put single linears in the place of transformers' fused experts of a layer."""
    made: dict[str, list[Any]] = {}
    for role in (EXPERT_GATE, EXPERT_UP, EXPERT_DOWN):
        names = [checkpoint.model.part(role, layer, expert).name for expert in range(checkpoint.model.dims.num_experts)]
        modules = [name.removesuffix(WEIGHT) for name in names]
        floating = [module for module in modules if module not in checkpoint.schemes]
        if floating:
            raise _unsupported(checkpoint.directory, f"some of its experts are float, as {floating[0]}")
        made[role] = [Linear8(checkpoint.integers(module), None) for module in modules]
    fused = model.get_submodule(path)
    _replace(model, path, Experts(made[EXPERT_GATE], made[EXPERT_UP], made[EXPERT_DOWN], fused.act_fn))


def _round(model: Any, dtype: torch.dtype) -> tuple[str, ...]:
    """Round the linears of all layers to 8 bits, one by one, from what is stored; the rest is in `dtype` then."""
    rounded: dict[str, Linear8] = {}
    kept = []
    inside = _layer_modules(model)
    for path, module in list(model.named_modules()):
        if not path.startswith(inside):
            continue
        if type(module) is nn.Linear:
            weight = module.weight.detach().to(torch.float32).numpy()
            rounded[path] = Linear8(quantize(weight, W8A8, "F32"), module.bias)
            _replace(model, path, nn.Identity())
        elif any(parameter.ndim > 1 for parameter in module.parameters(recurse=False)):
            kept.append(path)
    for parameter in model.parameters():
        # Not `model.to`: rotary frequencies are buffers, and stay float32 as scales do.
        parameter.data = parameter.data.to(dtype)
    for path, linear in rounded.items():
        _replace(model, path, linear)
    if not kept:
        return ()
    return (f"{len(kept)} modules of the layers are no linears and stay float, as {kept[0]}",)


def _layer_modules(model: Any) -> str:
    """Return the path of the list of layers."""
    lists = [(len(module), path) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    count = model.config.get_text_config().num_hidden_layers
    return f"{next(path for length, path in lists if length == count)}."


def _replace(model: Any, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@contextmanager
def _refusing(directory: Path) -> Iterator[None]:
    """Turn transformers' errors about a model into ours."""
    try:
        yield
    except (ValueError, KeyError, OSError, ImportError, AttributeError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(
            f"transformers cannot make the model in {directory}: {text}",
            code="engine.model",
            repair="models whose code travels with the checkpoint need --trust-remote-code",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Draw no progress bars meanwhile."""
    from transformers.utils import logging

    bars: Any = logging
    were_on = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            bars.enable_progress_bar()


def stored_names(model: Any) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a model, each once however often it is tied."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.setdefault(tensor.data_ptr() or id(tensor), (name, tensor))
    return dict(found.values())
