"""Options that say how shards are cut mean nothing for a Hugging Face result: they are refused, not ignored."""

from __future__ import annotations

from ferry.core.errors import LayoutError
from ferry.verbs.convert.config import ConvertConfig

LAYOUT_OPTIONS = (
    "tp", "pp", "vpp", "layers_per_virtual_stage", "ep", "layer_list", "noop_layers", "format", "names", "experts",
    "iteration", "vocab_multiple",
)  # fmt: skip


def layout_options(config: ConvertConfig) -> list[str]:
    """Return the layout options that differ from their defaults, as `tp=3`."""
    fields = ConvertConfig.model_fields
    found = {name: getattr(config, name) for name in LAYOUT_OPTIONS}
    return [f"{name}={value}" for name, value in found.items() if value != fields[name].default]


def refuse_layout(config: ConvertConfig, direction: str) -> None:
    """Refuse layout options where the result is a Hugging Face model."""
    given = layout_options(config)
    if given:
        raise LayoutError(
            f"{direction} makes a Hugging Face model, which has no layout, found {', '.join(given)}",
            code="layout.hf",
            repair="leave them out (the layout of a source is detected), or ask for hf2mg or mg2mg",
        )
