"""Megatron's tensors: what each is called in three dialects, how it is split, and which roles it is made of.

Dialects: `mcore` (megatron-core with its local layers), `te` (megatron-core with Transformer Engine layers, which keep
a norm inside the linear that follows it) and `classic` (Megatron before megatron-core: nested dictionaries, "/" here).
`rank_tensors` lists every tensor of one rank; reading compares with it and writing follows it: neither can forget one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ferry.core import family as f
from ferry.core import layout as cut
from ferry.core.errors import LayoutError
from ferry.core.family import Model
from ferry.core.layout import Local
from ferry.core.pipeline import Chunk

DIALECTS = ("mcore", "te", "classic")
EXPERT_STYLES = ("sequential", "grouped", "te_grouped")


@dataclass(frozen=True)
class MegatronLayout:
    """How a Megatron checkpoint is cut and named."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    layer_list: tuple[int, ...] = ()
    noop_layers: tuple[int, ...] = ()
    names: str = "mcore"
    experts: str = "sequential"
    padded_vocab: int = 0


class _Tensor(NamedTuple):
    """One tensor of Megatron: its name in each dialect ("" = none), its split, and its roles."""

    mcore: str
    te: str
    classic: str
    split: str
    roles: tuple[str, ...]


_LAYER = "decoder.layers.{layer}."
_CLASSIC = "language_model/encoder/layers.{layer}."
_ATTENTION = _LAYER + "self_attention."
_QKV = (f.QUERY, f.KEY, f.VALUE)
_QKV_BIAS = (f.QUERY_BIAS, f.KEY_BIAS, f.VALUE_BIAS)

FIRST = (
    _Tensor(
        "embedding.word_embeddings.weight", "embedding.word_embeddings.weight",
        "language_model/embedding/word_embeddings/weight", "vocabulary", (f.EMBEDDING,),
    ),
)  # fmt: skip
LAYER = (
    _Tensor(
        _LAYER + "input_layernorm.weight", _ATTENTION + "linear_qkv.layer_norm_weight", _CLASSIC + "input_norm.weight",
        "whole", (f.ATTENTION_NORM,),
    ),
    _Tensor(
        _ATTENTION + "linear_qkv.weight", _ATTENTION + "linear_qkv.weight",
        _CLASSIC + "self_attention.query_key_value.weight", "grouped", _QKV,
    ),
    _Tensor(
        _ATTENTION + "linear_qkv.bias", _ATTENTION + "linear_qkv.bias",
        _CLASSIC + "self_attention.query_key_value.bias", "grouped", _QKV_BIAS,
    ),
    _Tensor(_ATTENTION + "q_layernorm.weight", _ATTENTION + "q_layernorm.weight", "", "whole", (f.QUERY_NORM,)),
    _Tensor(_ATTENTION + "k_layernorm.weight", _ATTENTION + "k_layernorm.weight", "", "whole", (f.KEY_NORM,)),
    _Tensor(
        _ATTENTION + "linear_proj.weight", _ATTENTION + "linear_proj.weight", _CLASSIC + "self_attention.dense.weight",
        "columns", (f.ATTENTION_OUT,),
    ),
)  # fmt: skip
DENSE = (
    _Tensor(
        _LAYER + "pre_mlp_layernorm.weight", _LAYER + "mlp.linear_fc1.layer_norm_weight",
        _CLASSIC + "post_attention_norm.weight", "whole", (f.MLP_NORM,),
    ),
    _Tensor(
        _LAYER + "mlp.linear_fc1.weight", _LAYER + "mlp.linear_fc1.weight", _CLASSIC + "mlp.dense_h_to_4h.weight",
        "stacked", (f.GATE, f.UP),
    ),
    _Tensor(
        _LAYER + "mlp.linear_fc2.weight", _LAYER + "mlp.linear_fc2.weight", _CLASSIC + "mlp.dense_4h_to_h.weight",
        "columns", (f.DOWN,),
    ),
)  # fmt: skip
MOE = (
    _Tensor(_LAYER + "pre_mlp_layernorm.weight", _LAYER + "pre_mlp_layernorm.weight", "", "whole", (f.MLP_NORM,)),
    _Tensor(_LAYER + "mlp.router.weight", _LAYER + "mlp.router.weight", "", "whole", (f.ROUTER,)),
)
_FINAL = _Tensor(
    "decoder.final_layernorm.weight", "decoder.final_layernorm.weight", "language_model/encoder/final_norm.weight",
    "whole", (f.FINAL_NORM,),
)  # fmt: skip
_OUTPUT = _Tensor(
    "output_layer.weight", "output_layer.weight", "language_model/output_layer/weight", "vocabulary", (f.HEAD,)
)
_TIED_COPY = _Tensor(
    "output_layer.weight", "output_layer.weight", "word_embeddings_for_head/weight", "vocabulary", (f.EMBEDDING,)
)
CLASSIC_SYNONYMS = {
    "language_model/transformer/": "language_model/encoder/", ".input_layernorm.": ".input_norm.",
    ".post_attention_layernorm.": ".post_attention_norm.", "final_layernorm.": "final_norm.",
    ".attention.": ".self_attention.",
}  # fmt: skip
"""Other spellings of the classic dialect, met when reading."""


def rank_tensors(model: Model, layout: MegatronLayout, chunk: Chunk, tp: int, ep: int) -> dict[str, Local]:
    """Return every tensor that tensor rank `tp` and expert rank `ep` of a chunk holds, by its name."""
    _check_dialect(model, layout)
    found: dict[str, Local] = {}
    for tensor, layer, local_layer in _tensors(model, layout, chunk):
        parts = [model.part(role, layer) for role in tensor.roles]
        name = getattr(tensor, layout.names).format(layer=local_layer)
        found[name] = _split(tensor.split, parts, model, layout, tp)
    for local_layer, layer in _real_layers(chunk):
        if model.dims.is_moe(layer):
            found |= _experts(model, layout, layer, local_layer, tp, ep)
    return found


def _real_layers(chunk: Chunk) -> Iterator[tuple[int, int]]:
    return ((local, layer) for local, layer in enumerate(chunk.layers) if layer is not None)


def _tensors(model: Model, layout: MegatronLayout, chunk: Chunk) -> Iterator[tuple[_Tensor, int, int]]:
    if chunk.first:
        yield from ((tensor, 0, 0) for tensor in FIRST)
    for local_layer, layer in _real_layers(chunk):
        table = LAYER + (MOE if model.dims.is_moe(layer) else DENSE)
        yield from ((tensor, layer, local_layer) for tensor in table if all(map(model.has, tensor.roles)))
    if chunk.last:
        yield _FINAL, 0, 0
        if not model.dims.tied:
            yield _OUTPUT, 0, 0
        elif not chunk.first or layout.pp > 1:
            yield _TIED_COPY, 0, 0


def _split(split: str, parts: list[cut.Part], model: Model, layout: MegatronLayout, rank: int) -> Local:
    tp = layout.tp
    splits: dict[str, Callable[[], Local]] = {
        "whole": lambda: cut.whole(parts[0]),
        "columns": lambda: cut.columns(parts[0], tp, rank),
        "stacked": lambda: cut.stacked(parts, tp, rank),
        "grouped": lambda: cut.grouped(parts[0], parts[1], parts[2], model.dims.num_groups, tp, rank),
        "vocabulary": lambda: cut.vocabulary(parts[0], layout.padded_vocab, tp, rank),
    }
    return splits[split]()


def _experts(model: Model, layout: MegatronLayout, layer: int, local_layer: int, tp: int, ep: int) -> dict[str, Local]:
    """Return the expert tensors of one layer on expert rank `ep`, in the layout's style."""
    own = model.dims.num_experts // layout.ep
    experts = range(ep * own, (ep + 1) * own)
    fc1 = [
        cut.stacked([model.part(role, layer, expert) for role in (f.EXPERT_GATE, f.EXPERT_UP)], layout.tp, tp)
        for expert in experts
    ]
    fc2 = [cut.columns(model.part(f.EXPERT_DOWN, layer, expert), layout.tp, tp) for expert in experts]
    prefix = _LAYER.format(layer=local_layer) + "mlp.experts."
    if layout.experts == "grouped":
        # Megatron declares weight1 as [hidden, experts * 2F] and then views it as [experts, hidden, 2F].
        weight1 = cut.below_each_other([cut.transposed(local) for local in fc1])
        return {
            prefix + "weight1": cut.declared(weight1, (model.dims.hidden_size, own * weight1.cols)),
            prefix + "weight2": cut.below_each_other([cut.transposed(local) for local in fc2]),
        }
    pattern = "local_experts.{j}.{linear}.weight" if layout.experts == "sequential" else "{linear}.weight{j}"
    return {
        prefix + pattern.format(j=j, linear=linear): local
        for linear, locals_ in (("linear_fc1", fc1), ("linear_fc2", fc2))
        for j, local in enumerate(locals_)
    }


def _check_dialect(model: Model, layout: MegatronLayout) -> None:
    assert layout.names in DIALECTS
    assert layout.experts in EXPERT_STYLES
    if layout.names == "classic" and (model.dims.num_experts or model.has(f.QUERY_NORM)):
        raise LayoutError(
            f"the classic names have no place for {'experts' if model.dims.num_experts else 'query and key norms'} "
            f"({model.family.name})",
            code="layout.classic",
            repair="use --names mcore or --names te",
        )
