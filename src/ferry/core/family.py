"""What a model family is: a frozen value that says how its config and its tensors are named.

Three vocabularies meet here. A family maps *roles* (query, gate, router ...) to Hugging Face tensor names; a checkpoint
format maps roles to its own names and splits; neither knows the other. A role may be a band of rows of a packed tensor
(`Packed`), so q, k and v mean the same everywhere. New families are files in `ferry/families/`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any, NamedTuple

from ferry.core.errors import InputError
from ferry.core.layout import Part

EMBEDDING, HEAD, FINAL_NORM, FINAL_NORM_BIAS = "embedding", "head", "final_norm", "final_norm_bias"
ATTENTION_NORM, MLP_NORM = "attention_norm", "mlp_norm"
QUERY, KEY, VALUE = "query", "key", "value"
QUERY_BIAS, KEY_BIAS, VALUE_BIAS = "query_bias", "key_bias", "value_bias"
QUERY_NORM, KEY_NORM = "query_norm", "key_norm"
ATTENTION_OUT = "attention_out"
GATE, UP, DOWN = "gate", "up", "down"
ROUTER = "router"
EXPERT_GATE, EXPERT_UP, EXPERT_DOWN = "expert_gate", "expert_up", "expert_down"

MODEL_ROLES = (EMBEDDING, FINAL_NORM, HEAD)
DENSE_ROLES = (GATE, UP, DOWN)
MOE_ROLES = (ROUTER, EXPERT_GATE, EXPERT_UP, EXPERT_DOWN)
EXPERT_ROLES = (EXPERT_GATE, EXPERT_UP, EXPERT_DOWN)


@dataclass(frozen=True)
class Dims:
    """The sizes of one model, in Megatron's sense."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_groups: int
    head_dim: int
    vocab_size: int
    tied: bool
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    dense_layers: tuple[int, ...] = ()
    """In a mixture-of-experts model, the layers that have a plain MLP."""

    def is_moe(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.dense_layers


class Packed(NamedTuple):
    """A tensor that holds several roles as consecutive bands of rows, and which of them is meant."""

    name: str
    order: tuple[str, ...]
    role: str


def packed(name: str, *order: str) -> dict[str, str | Packed]:
    """Return the roles of a packed tensor, as an item of `Family.weights`."""
    return {role: Packed(name, order, role) for role in order}


class Vision(NamedTuple):
    """How pictures enter a model: a tower makes vectors of them, and these take the places of placeholder tokens.

    Positions of such models have three axes (time, height, width); transformers' decoder takes them as [3, B, T].
    """

    tensors: str
    """What the names of the tower's tensors begin with in files. They are `carried`."""
    whole: str
    """The class of transformers that makes the whole model."""
    tower: str
    """The name of the tower in that model."""
    decoder: tuple[str, str]
    """What the names of the decoder's tensors begin with in files, and in that model: adapters have the latter."""
    tokens: Mapping[str, int]
    """Keys of the config that name placeholder tokens (`image_token_id`, `video_token_id`), and their defaults."""

    def token(self, key: str, config: Mapping[str, Any]) -> int:
        return int(config.get(key, self.tokens[key]))


class Smoothing(NamedTuple):
    """Where factors per channel can move without changing the function: SmoothQuant (arXiv 2211.10438) and AWQ.

    The weight of `source` (a norm), or its rows and bias (a linear), are divided by the factors, the columns of `into`
    multiplied. `heads`: the channels are those of key-value heads, of which several query heads read each.
    """

    name: str
    source: str
    into: tuple[str, ...]
    heads: bool = False


Config = Mapping[str, Any]


def _no_window(config: Config, layer: int) -> int:
    return 0


class LlamaLike(NamedTuple):
    """That a model is computed as Llama is, so that kernels for one run them all.

    Norms of mean squares before attention and MLP, on queries and keys where they have weights; rotary positions by
    halves; a SiLU gate; nothing else scaled, capped or shared. `window` gives the number of tokens that a token of a
    layer sees, itself included; 0 = all before it.
    """

    window: Callable[[Config, int], int] = _no_window


SIZES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers",), "hidden_size": ("hidden_size",), "ffn_hidden_size": ("intermediate_size",),
    "num_heads": ("num_attention_heads",), "num_groups": ("num_key_value_heads",), "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",), "tied": ("tie_word_embeddings",), "num_experts": ("num_local_experts",),
    "experts_per_token": ("num_experts_per_tok",), "expert_ffn_hidden_size": ("moe_intermediate_size",),
    "norm_epsilon": ("rms_norm_eps",), "max_positions": ("max_position_embeddings",), "rotary_base": ("rope_theta",),
}  # fmt: skip
"""Where a Llama-like config.json keeps each size; `a.b` is a key inside another. A family overrides what differs."""


@dataclass(frozen=True)
class Family:
    """One model family.

    `weights` maps roles to tensor names with `{layer}` and `{expert}`; `optional` adds roles that exist only where the
    config has a true value for a key. `sizes` overrides `SIZES`; `settle` may compute what keys cannot say. `carried`
    are patterns of tensors that have no place in Megatron and travel beside the shards. `megatron` are fields of
    Megatron's `args` (a callable takes the config). `matches` tells families of one model_type apart.
    """

    name: str
    models: tuple[str, ...]
    """Names the seed manual and users give to models of this family: accepted by `--model-type`."""
    model_types: tuple[str, ...]
    weights: Mapping[str, str | Packed]
    optional: Mapping[str, Mapping[str, str | Packed]] = field(default_factory=dict)
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    settle: Callable[[dict[str, Any], Config], dict[str, Any]] | None = None
    carried: tuple[str, ...] = ()
    megatron: Mapping[str, Any] = field(default_factory=dict)
    tied_default: bool = False
    """What the architecture assumes when config.json does not say whether embeddings are tied."""
    matches: Callable[[Config], bool] | None = None
    normalised_head: bool = False
    """The head's rows are divided by their length at run time (NormHead): done once on the way to Megatron."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """What transformers calls the router and the fused experts (`EXPERT_UP`: gate and up; `EXPERT_DOWN`) in memory."""
    vision: Vision | None = None
    """How pictures enter, where they can."""
    smoothing: tuple[Smoothing, ...] = ()
    """Where quantization may move scales: which norm or linear feeds which linears, with nothing but them between."""
    llama_like: LlamaLike | None = None
    """That the decoder is computed as Llama's."""

    def roles(self, config: Config) -> dict[str, str | Packed]:
        """Return the roles that exist for this config."""
        found = dict(self.weights)
        for key, roles in self.optional.items():
            if config.get(key):
                found |= roles
        return found

    def read(self, key: str, config: Config, default: Any = None) -> Any:
        """Return a size from the config by Ferry's name for it."""
        for name in self.sizes.get(key, SIZES[key]):
            outer, _, inner = name.rpartition(".")
            found = ((config.get(outer) or {}) if outer else config).get(inner)
            if found is not None:
                return found
        return default

    def dims(self, config: Config) -> Dims:
        """Return the model's sizes; raise InputError if the config lacks one."""
        values: dict[str, Any] = {key: self.read(key, config) for key in SIZES}
        if values["num_groups"] is None:
            values["num_groups"] = values["num_heads"]
        if values["head_dim"] is None and values["hidden_size"] and values["num_heads"]:
            values["head_dim"] = values["hidden_size"] // values["num_heads"]
        if values["tied"] is None:
            values["tied"] = self.tied_default
        if not any(role in self.weights for role in MOE_ROLES):
            values["num_experts"] = 0
        if self.settle is not None:
            values = self.settle(values, config)
        known = {key: value for key, value in values.items() if key in Dims.__dataclass_fields__ and value is not None}
        needed = ("num_layers", "hidden_size", "ffn_hidden_size", "num_heads", "num_groups", "head_dim", "vocab_size")
        missing = [self.sizes.get(key, SIZES[key])[0] for key in needed if key not in known]
        if missing:
            raise InputError(f"config.json of a {self.name} model has no {', '.join(missing)}", code="family.config")
        return Dims(**known)


@dataclass(frozen=True)
class Model:
    """A family with the sizes of one model: the canonical tensors and the parts that roles play in them."""

    family: Family
    dims: Dims
    config: Config

    def __post_init__(self) -> None:
        object.__setattr__(self, "_roles", self.family.roles(self.config))

    @property
    def roles(self) -> dict[str, str | Packed]:
        return self._roles  # type: ignore[attr-defined, no-any-return]

    def has(self, role: str) -> bool:
        return role in self.roles and not (role == HEAD and self.dims.tied)

    def size(self, role: str) -> tuple[int, int, int]:
        """Return (rows, columns, ndim) of a role."""
        d = self.dims
        query, key = d.num_heads * d.head_dim, d.num_groups * d.head_dim
        hidden, ffn, expert = d.hidden_size, d.ffn_hidden_size, d.expert_ffn_hidden_size
        return {
            EMBEDDING: (d.vocab_size, hidden, 2), HEAD: (d.vocab_size, hidden, 2),
            FINAL_NORM: (hidden, 1, 1), ATTENTION_NORM: (hidden, 1, 1), MLP_NORM: (hidden, 1, 1),
            QUERY: (query, hidden, 2), KEY: (key, hidden, 2), VALUE: (key, hidden, 2),
            QUERY_BIAS: (query, 1, 1), KEY_BIAS: (key, 1, 1), VALUE_BIAS: (key, 1, 1),
            QUERY_NORM: (d.head_dim, 1, 1), KEY_NORM: (d.head_dim, 1, 1), ATTENTION_OUT: (hidden, query, 2),
            GATE: (ffn, hidden, 2), UP: (ffn, hidden, 2), DOWN: (hidden, ffn, 2), ROUTER: (d.num_experts, hidden, 2),
            EXPERT_GATE: (expert, hidden, 2), EXPERT_UP: (expert, hidden, 2), EXPERT_DOWN: (hidden, expert, 2),
        }[role]  # fmt: skip

    def part(self, role: str, layer: int = 0, expert: int = 0) -> Part:
        """Return the band of a canonical tensor that plays a role."""
        where = self.roles[role]
        rows, cols, ndim = self.size(role)
        if isinstance(where, str):
            return Part(where.format(layer=layer, expert=expert), 0, rows, cols, ndim)
        before = sum(self.size(other)[0] for other in where.order[: where.order.index(role)])
        return Part(where.name.format(layer=layer, expert=expert), before, rows, cols, ndim)

    def layer_roles(self, layer: int) -> list[str]:
        absent = DENSE_ROLES if self.dims.is_moe(layer) else MOE_ROLES
        return [role for role in self.roles if role not in MODEL_ROLES and role not in absent]

    def canonical(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every canonical tensor, in the order of the model."""
        rows: dict[str, int] = {}
        parts: dict[str, Part] = {}
        for part in self._parts():
            rows[part.name] = max(rows.get(part.name, 0), part.row + part.rows)
            parts[part.name] = part
        return {name: (rows[name],) if part.ndim == 1 else (rows[name], part.cols) for name, part in parts.items()}

    def _parts(self) -> list[Part]:
        parts = [self.part(EMBEDDING)]
        for layer in range(self.dims.num_layers):
            for role in self.layer_roles(layer):
                experts = range(self.dims.num_experts) if role in EXPERT_ROLES else (0,)
                parts += [self.part(role, layer, expert) for expert in experts]
        parts.append(self.part(FINAL_NORM))
        return [*parts, self.part(HEAD)] if self.has(HEAD) else parts

    def is_carried(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.family.carried)

    def role_of(self, name: str) -> str:
        """Return the role a canonical tensor plays (its first one, if packed), for tables."""
        for role, where in self.roles.items():
            template = where if isinstance(where, str) else where.name
            pattern = re.escape(template).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+")
            if re.fullmatch(pattern, name):
                return role
        return "carried" if self.is_carried(name) else "unknown"

    def legal_tp(self) -> list[int]:
        """Return every tensor-parallel size that splits this model into equal whole parts."""
        d = self.dims
        common = gcd(d.num_heads, d.num_groups)
        if not d.num_experts or d.dense_layers:
            common = gcd(common, d.ffn_hidden_size)
        if d.num_experts:
            common = gcd(common, d.expert_ffn_hidden_size)
        return [n for n in range(1, common + 1) if common % n == 0]

    def legal_ep(self) -> list[int]:
        experts = self.dims.num_experts or 1
        return [n for n in range(1, experts + 1) if experts % n == 0]
