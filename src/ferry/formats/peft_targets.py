"""Which modules of a model carry LoRA: from words of users and of the manual to names, and from names to a short list.

Only the linear layers of attention and of plain MLPs take part. Embedding, head, norms, routers and experts do not:
transformers keeps the experts of a layer in one tensor, to which no adapter of a module can be attached.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ferry.core import family as f
from ferry.core.errors import ConfigError, did_you_mean
from ferry.core.family import Model
from ferry.formats.megatron_names import DENSE, LAYER
from ferry.formats.peft_config import ALL_LINEAR

ATTENTION_ROLES = (f.QUERY, f.KEY, f.VALUE, f.ATTENTION_OUT)
LINEAR_ROLES = (*ATTENTION_ROLES, *f.DENSE_ROLES)
MEGATRON_ROLES = {
    tensor.mcore.split(".")[-2]: tensor.roles for tensor in (*LAYER, *DENSE) if set(tensor.roles) <= set(LINEAR_ROLES)
}
"""Megatron's linear layers: `linear_qkv`, `linear_proj`, `linear_fc1`, `linear_fc2`."""
GROUPS = {ALL_LINEAR: LINEAR_ROLES, "attention": ATTENTION_ROLES, "mlp": f.DENSE_ROLES, **MEGATRON_ROLES}


def target_modules(model: Model, words: Iterable[str]) -> list[str]:
    """Return the names of the modules that the words mean, in the order of the model.

    A word is a group (`all-linear`, `attention`, `mlp`), a linear layer of Megatron, or a module name or its end.
    """
    wanted: set[str] = set()
    for word in words:
        found = _of_roles(model, GROUPS[word]) if word in GROUPS else _ending(linear_modules(model), word)
        if not found:
            raise _refusal(model, word)
        wanted |= set(found)
    return [module for module in linear_modules(model) if module in wanted]


def linear_modules(model: Model) -> list[str]:
    """Return every module that can carry LoRA, in the order of the model."""
    return _of_roles(model, LINEAR_ROLES)


def short_targets(model: Model, modules: Sequence[str]) -> tuple[str, ...]:
    """Return the shortest ends of names that mean exactly these modules: what PEFT should read."""
    everything = [name.removesuffix(".weight") for name, shape in model.canonical().items() if len(shape) == 2]
    missing, targets = set(modules), []
    for module in modules:
        if module not in missing:
            continue
        words = module.split(".")
        ends = (".".join(words[-count:]) for count in range(1, len(words) + 1))
        end = next(end for end in ends if set(_ending(everything, end)) <= set(modules))
        targets.append(end)
        missing -= set(_ending(everything, end))
    return tuple(targets)


def _of_roles(model: Model, roles: Iterable[str]) -> list[str]:
    found: dict[str, None] = {}
    for layer in range(model.dims.num_layers):
        own = [role for role in model.layer_roles(layer) if role in roles]
        found |= dict.fromkeys(model.part(role, layer).name.removesuffix(".weight") for role in own)
    return list(found)


def _ending(modules: Iterable[str], word: str) -> list[str]:
    return [module for module in modules if module == word or module.endswith(f".{word}")]


def _refusal(model: Model, word: str) -> ConfigError:
    ends = sorted({module.rsplit(".", 1)[-1] for module in linear_modules(model)})
    groups = [group for group, roles in GROUPS.items() if _of_roles(model, roles)]
    return ConfigError(
        f"LoRA target {word!r} means no linear layer of this {model.family.name} model that can carry LoRA"
        f"{did_you_mean(word, [*groups, *ends])}",
        code="lora.target",
        repair=f"use {', '.join(groups)}, or names: {', '.join(ends)}",
    )
