"""One pipeline chunk of a Hugging Face model: its own decoder class with fewer layers, slices for weights, our loss.

The model is made on the meta device, layers of other stages are dropped, every linear becomes a `Linear` that holds
this rank's slice, and weights are read straight from the checkpoint: a rank never holds more than its part. No model
code is subclassed, copied or patched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ferry.core import family as f
from ferry.core.errors import InputError
from ferry.core.family import Model
from ferry.core.gather import Sources
from ferry.core.pipeline import Chunk
from ferry.core.smoothing import layer_prefix
from ferry.data.vision.pictures import Picture
from ferry.engines.modules import empty_decoder, rebuild_buffers, to_torch
from ferry.verbs.train.engine import attention
from ferry.verbs.train.engine.context import MicroContext
from ferry.verbs.train.engine.groups import Groups, copy_to, sum_over
from ferry.verbs.train.engine.linear import Adapter, Embedding, Linear, initial_adapter
from ferry.verbs.train.engine.loss import Vocabulary, loss_sum
from ferry.verbs.train.engine.parameters import Held
from ferry.verbs.train.engine.placement import Place, Rank, adapter_places, places


@dataclass(frozen=True)
class Recipe:
    """What of a model is trained, and how it is computed."""

    dtype: torch.dtype
    device: torch.device
    recompute: bool = False
    adapters: Collection[str] = ()
    """Modules that get an adapter; if there are any, everything else is frozen."""
    rank: int = 0
    scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0

    @property
    def is_lora(self) -> bool:
        return bool(self.rank)


class Stage(nn.Module):
    """One chunk: token ids or hidden states in, hidden states or the sum of losses out. Batch 1, T tokens, H hidden."""

    def __init__(self, decoder: nn.Module, chunk: Chunk, context: MicroContext) -> None:
        super().__init__()
        self.decoder = decoder
        self.chunk = chunk
        self.context = context
        self.step = 0
        self.loss_scale = 1.0
        """What the sum of losses is multiplied with: 1 / supervised tokens of the whole global batch."""
        self.embedding: Embedding | None = None
        self.head: Embedding | None = None
        self.vocabulary: Vocabulary | None = None
        self.sight: nn.Module | None = None
        """Puts pictures into the embedded tokens, where the model can see."""

    def forward(
        self, x: torch.Tensor, positions_BT: torch.Tensor, labels_BT: torch.Tensor, token_ids_BT: torch.Tensor,
        pictures: Sequence[Picture] = (),
    ) -> torch.Tensor:  # fmt: skip
        """Return hidden states [1, T, H], or on the last stage the scaled sum of losses [1]."""
        self.context.enter(self.step, token_ids_BT[0])
        h_BTH = self.embedding(x) if self.embedding is not None else x
        segments = attention.segment_lengths(positions_BT[0])
        if self.sight is not None:
            h_BTH, positions_BT = self.sight(h_BTH, x, positions_BT, pictures)
        found = self.decoder(
            inputs_embeds=h_BTH, position_ids=positions_BT, use_cache=False, segments=segments, return_dict=True
        )
        h_BTH = found.last_hidden_state
        if not self.chunk.last:
            return h_BTH  # type: ignore[no-any-return]
        return self.loss(h_BTH[0], labels_BT[0]).reshape(1)

    def loss(self, h_TH: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        """Return loss_scale * the sum of the losses at the positions that have a label (others are negative)."""
        head = self.head if self.head is not None else self.embedding
        assert head is not None
        assert self.vocabulary is not None
        supervised = (labels_T >= 0).nonzero().flatten()
        return self.loss_scale * loss_sum(h_TH[supervised], head.weight, labels_T[supervised], self.vocabulary)


@dataclass
class Built:
    """A stage with the parameters it trains."""

    stage: Stage
    held: list[Held] = field(default_factory=list)


def build_stage(
    directory: Path, model: Model, chunk: Chunk, groups: Groups, recipe: Recipe, context: MicroContext,
    sources: Sources, adapter_sources: Sources | None = None,
) -> Built:  # fmt: skip
    """Return a chunk with its weights loaded. `directory` holds config.json; `sources` the weights."""
    decoder = _empty_decoder(directory, chunk)
    stage = Stage(decoder, chunk, context)
    builder = _Builder(model, groups, recipe, context, sources, adapter_sources)
    wanted = places(model, Rank(groups.mesh.tp, groups.tp_rank), chunk)
    _fill_ends(stage, wanted, builder)
    for index, layer in enumerate(chunk.layers):
        if layer is not None:
            builder.fill_layer(decoder.layers[index], layer, wanted)
    _fill_final_norm(decoder, chunk, wanted, builder)
    assert not wanted, f"no module takes {sorted(wanted)[:3]}"
    rebuild_buffers(decoder, recipe.device)
    _check_filled(decoder)
    if recipe.recompute:
        _recompute(decoder, context)
    stage.train()
    return Built(stage, builder.held)


def load_config(directory: Path) -> Any:
    """Return transformers' config of a model, set to packed attention."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    config._attn_implementation = attention.register()
    config.use_cache = False
    return config


def _empty_decoder(directory: Path, chunk: Chunk) -> Any:
    decoder = empty_decoder(
        load_config(directory).get_text_config(),
        directory,
        code="train.model-code",
        repair="models whose code travels with the checkpoint cannot be trained yet",
    )
    layers = decoder.layers
    decoder.layers = nn.ModuleList([layers[layer] for layer in chunk.layers if layer is not None])
    decoder.embed_tokens = None
    return decoder


class _Builder:
    """Puts loaded slices into modules, and remembers what is trained."""

    def __init__(
        self, model: Model, groups: Groups, recipe: Recipe, context: MicroContext, sources: Sources,
        adapter_sources: Sources | None,
    ) -> None:  # fmt: skip
        self.model, self.groups, self.recipe, self.context = model, groups, recipe, context
        self.sources, self.adapter_sources = sources, adapter_sources
        self.held: list[Held] = []

    def load(self, place: Place) -> tuple[nn.Parameter, torch.Tensor | None]:
        """Return the parameter of a place, and its values in float32 where those are more precise and needed."""
        items, dtype = self.sources.gather(place.local)
        stored = to_torch(items, dtype, place.local.shape)
        trainable = not self.recipe.is_lora
        value = stored.to(self.recipe.dtype).to(self.recipe.device)
        source = stored.float() if trainable and self.recipe.dtype != torch.float32 else None
        return nn.Parameter(value, requires_grad=trainable), source

    def put(self, module: nn.Module, attribute: str, place: Place) -> nn.Parameter:
        """Load a parameter into a module and note it if it is trained."""
        parameter, source = self.load(place)
        setattr(module, attribute, parameter)
        if parameter.requires_grad:
            self.held.append(Held(place, module, attribute, decays=len(place.local.shape) > 1, source=source))
        return parameter

    def fill_layer(self, layer_module: nn.Module, layer: int, wanted: dict[str, Place]) -> None:
        prefix = layer_prefix(self.model, layer)
        for path, module in list(layer_module.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, leaf = path.rpartition(".")
                setattr(layer_module.get_submodule(parent), leaf, self.linear(f"{prefix}{path}", module, wanted))
            elif any(True for _ in module.parameters(recurse=False)):
                for attribute, _ in list(module.named_parameters(recurse=False)):
                    name = f"{prefix}{path}.{attribute}" if path else f"{prefix}{attribute}"
                    place = wanted.pop(name)
                    self.put(module, attribute, place)
                    if place.split == "columns" and self.groups.tp is not None:
                        module.register_forward_hook(_sum_output(self.groups.tp))
        self._copy_inputs(layer_module, prefix, layer)

    def linear(self, name: str, module: nn.Linear, wanted: dict[str, Place]) -> Linear:
        place = wanted.pop(f"{name}.weight")
        made = Linear(nn.Parameter(torch.empty(0, 0)), None, place.split, self.groups.tp)  # type: ignore[arg-type]
        self.put(made, "weight", place)
        if module.bias is not None:
            self.put(made, "bias", wanted.pop(f"{name}.bias"))
        if name in self.recipe.adapters:
            made.adapter = self.adapter(name, place, module.in_features)
        return made

    def adapter(self, name: str, base: Place, num_inputs: int) -> Adapter:
        rank = self.recipe.rank
        a_place, b_place = adapter_places(base, name, Rank(self.groups.mesh.tp, self.groups.tp_rank), rank, num_inputs)
        columns = range(num_inputs)
        if base.split == "columns":
            piece = base.local.pieces[0]
            columns = range(piece.col, piece.col + piece.cols)
        if self.adapter_sources is not None:
            a = to_torch(*self.adapter_sources.gather(a_place.local), a_place.local.shape).float()
            b = to_torch(*self.adapter_sources.gather(b_place.local), b_place.local.shape).float()
        else:
            whole = initial_adapter(name, self.recipe.seed, rank, num_inputs)
            a, b = whole[:, columns.start : columns.stop].clone(), torch.zeros(b_place.local.shape)
        device = self.recipe.device
        key = int.from_bytes(name.encode()[-8:], "little") ^ hash_of(name)
        made = Adapter(a.to(device), b.to(device), self.recipe.scale, self.recipe.dropout, key, columns, self.context)
        self.held.append(Held(a_place, made, "a_RI", decays=True))
        self.held.append(Held(b_place, made, "b_OR", decays=True))
        return made

    def _copy_inputs(self, layer_module: nn.Module, prefix: str, layer: int) -> None:
        """Sum, in the backward pass, what the ranks' slices say about their common input: the output of each norm."""
        if self.groups.tp is None:
            return
        for role in (f.ATTENTION_NORM, f.MLP_NORM):
            path = self.model.part(role, layer).name.removeprefix(prefix).removesuffix(".weight")
            layer_module.get_submodule(path).register_forward_hook(_copy_output(self.groups.tp))


def hash_of(name: str) -> int:
    """Return a small number that depends on a name alone (unlike Python's hash)."""
    import zlib

    return zlib.crc32(name.encode())


def _copy_output(group: Any) -> Callable[..., torch.Tensor]:
    return lambda module, inputs, output: copy_to(output, group)


def _sum_output(group: Any) -> Callable[..., torch.Tensor]:
    return lambda module, inputs, output: sum_over(output, group)


def _fill_ends(stage: Stage, wanted: dict[str, Place], builder: _Builder) -> None:
    """Load the embedding and the head, where this chunk has them."""
    model, groups = builder.model, builder.groups
    chunk, embedding = stage.chunk, model.part(f.EMBEDDING).name
    if chunk.first:
        stage.embedding = _vocabulary_module(builder, wanted.pop(embedding))
    if not chunk.last:
        return
    if model.has(f.HEAD):
        stage.head = _vocabulary_module(builder, wanted.pop(model.part(f.HEAD).name))
    elif not chunk.first:
        stage.head = _vocabulary_module(builder, wanted.pop(embedding))
    head = stage.head if stage.head is not None else stage.embedding
    assert head is not None
    rows = head.weight.shape[0]
    real = max(0, min(rows, model.dims.vocab_size - groups.tp_rank * rows))
    stage.vocabulary = Vocabulary(groups.tp_rank * rows, real, groups.tp)


def _vocabulary_module(builder: _Builder, place: Place) -> Embedding:
    module = Embedding(nn.Parameter(torch.empty(0)), 0, builder.groups.tp)
    weight = builder.put(module, "weight", place)
    if builder.held and builder.held[-1].module is module:
        is_embedding = place.name == builder.model.part(f.EMBEDDING).name
        builder.held[-1].at_both_ends = is_embedding and builder.model.dims.tied and builder.groups.ends is not None
    module.first = builder.groups.tp_rank * weight.shape[0]
    return module


def _fill_final_norm(decoder: nn.Module, chunk: Chunk, wanted: dict[str, Place], builder: _Builder) -> None:
    name = builder.model.part(f.FINAL_NORM).name
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    if chunk.last:
        builder.put(decoder.get_submodule(leaf), "weight", wanted.pop(name))
    else:
        setattr(decoder, leaf, nn.Identity())


def _check_filled(decoder: nn.Module) -> None:
    left = [name for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers()) if tensor.is_meta]
    if left:
        raise InputError(f"nothing is known about {', '.join(left[:3])} of this model", code="train.model-tensors")


def _recompute(decoder: nn.Module, context: MicroContext) -> None:
    enable = decoder.gradient_checkpointing_enable
    enable(gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": context.for_checkpoint})  # type: ignore[operator]
