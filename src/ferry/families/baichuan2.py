"""Baichuan 2: packed W_pack and a head that is normalised at run time (NormHead). Source: its remote code.

The 13B model has ALiBi instead of rotary positions: its config has no `max_position_embeddings`. The first Baichuan has
the same model_type and another vocabulary (64,000 instead of 125,696), and no NormHead: it is not this family.
"""

from ferry.core import family as f
from ferry.families.llama import SMOOTHING, WEIGHTS

OTHERS: dict[str, str | f.Packed] = {
    role: name for role, name in WEIGHTS.items() if role not in (f.QUERY, f.KEY, f.VALUE)
}


def _has_alibi(config: f.Config) -> bool:
    return "max_position_embeddings" not in config


FAMILY = f.Family(
    name="baichuan2",
    models=("baichuan2", "baichuan"),
    model_types=("baichuan",),
    smoothing=SMOOTHING,
    weights=OTHERS | f.packed("model.layers.{layer}.self_attn.W_pack.weight", f.QUERY, f.KEY, f.VALUE),
    sizes={"max_positions": ("max_position_embeddings", "model_max_length")},
    carried=("model.layers.*.self_attn.rotary_emb.inv_freq", "model.future_mask"),
    matches=lambda config: config.get("vocab_size") != 64000,
    normalised_head=True,
    megatron={
        "position_embedding_type": lambda config: "alibi" if _has_alibi(config) else "rope",
        "use_rotary_position_embeddings": lambda config: not _has_alibi(config),
        "norm_head": True,
    },
)
