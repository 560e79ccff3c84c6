"""Megatron's rules written a second time, the plain way: whole tensors in memory, `torch.cat`, slices, loops.

Nothing here is shared with Ferry, so that a wrong rule in one of the two is seen. Sources: Megatron-LM's
`checkpointing.py` and model code; the remote code of each family for its packed tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Shards = dict[tuple[int, int, int], dict[str, Any]]
"""(tp, pp, ep) -> {"model": ...} or {"model0": ..., "model1": ...}."""


@dataclass(frozen=True)
class Cut:
    """The layout asked for. `blocks` are the layers of each block in model order, None for a layer without tensors.

    Block b is chunk b // pp of stage b % pp.
    """

    tp: int
    pp: int
    vpp: int
    ep: int
    blocks: list[list[int | None]]
    names: str = "mcore"
    experts: str = "sequential"
    vocab_multiple: int = 128


@dataclass
class Plain:
    """A model with every role on its own, whatever its family packs together."""

    heads: int
    groups: int
    embedding: torch.Tensor
    final_norm: torch.Tensor
    head: torch.Tensor | None
    layers: list[dict[str, Any]] = field(default_factory=list)


def unpack(name: str, tensors: Tensors, config: dict[str, Any]) -> Plain:
    """Return the roles of a model made by `models.py`."""
    if name.startswith(("chatglm", "glm4")):
        return _unpack_chatglm(tensors, config)
    if name == "qwen":
        return _unpack_qwen(tensors, config)
    heads = config["num_attention_heads"]
    plain = Plain(
        heads,
        config.get("num_key_value_heads", heads),
        tensors["model.embed_tokens.weight"],
        tensors["model.norm.weight"],
        None if config["tie_word_embeddings"] else tensors["lm_head.weight"],
    )
    if name.startswith("baichuan2"):
        head = plain.head.float()  # type: ignore[union-attr]
        plain.head = torch.nn.functional.normalize(head).to(tensors["lm_head.weight"].dtype)
    for layer in range(config["num_hidden_layers"]):
        plain.layers.append(_layer(tensors, f"model.layers.{layer}."))
    return plain


def _layer(tensors: Tensors, prefix: str) -> dict[str, Any]:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    layer: dict[str, Any] = {
        "norm1": own["input_layernorm.weight"], "norm2": own["post_attention_layernorm.weight"],
        "o": own["self_attn.o_proj.weight"],
    }  # fmt: skip
    if "self_attn.W_pack.weight" in own:
        layer["q"], layer["k"], layer["v"] = own["self_attn.W_pack.weight"].chunk(3)
    else:
        layer["q"], layer["k"], layer["v"] = (own[f"self_attn.{x}_proj.weight"] for x in "qkv")
    if "self_attn.q_proj.bias" in own:
        layer["qb"], layer["kb"], layer["vb"] = (own[f"self_attn.{x}_proj.bias"] for x in "qkv")
    if "self_attn.q_norm.weight" in own:
        layer["q_norm"], layer["k_norm"] = own["self_attn.q_norm.weight"], own["self_attn.k_norm.weight"]
    if "mlp.gate_up_proj.weight" in own:
        layer["gate"], layer["up"] = own["mlp.gate_up_proj.weight"].chunk(2)
        layer["down"] = own["mlp.down_proj.weight"]
    elif "mlp.gate_proj.weight" in own:
        layer["gate"], layer["up"], layer["down"] = (own[f"mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
    elif "block_sparse_moe.gate.weight" in own:
        layer["router"] = own["block_sparse_moe.gate.weight"]
        layer["experts"] = [
            tuple(own[f"block_sparse_moe.experts.{e}.{w}.weight"] for w in ("w1", "w3", "w2"))
            for e in range(len(layer["router"]))
        ]
    else:
        layer["router"] = own["mlp.gate.weight"]
        layer["experts"] = [
            tuple(own[f"mlp.experts.{e}.{w}_proj.weight"] for w in ("gate", "up", "down"))
            for e in range(len(layer["router"]))
        ]
    return layer


def _unpack_qwen(tensors: Tensors, config: dict[str, Any]) -> Plain:
    heads = config["num_attention_heads"]
    plain = Plain(
        heads, heads, tensors["transformer.wte.weight"], tensors["transformer.ln_f.weight"], tensors["lm_head.weight"]
    )
    for number in range(config["num_hidden_layers"]):
        prefix = f"transformer.h.{number}."
        q, k, v = tensors[prefix + "attn.c_attn.weight"].chunk(3)
        qb, kb, vb = tensors[prefix + "attn.c_attn.bias"].chunk(3)
        plain.layers.append(
            {
                "norm1": tensors[prefix + "ln_1.weight"],
                "norm2": tensors[prefix + "ln_2.weight"],
                "q": q,
                "k": k,
                "v": v,
                "qb": qb,
                "kb": kb,
                "vb": vb,
                "o": tensors[prefix + "attn.c_proj.weight"],
                # intermediate = w1(x) * silu(w2(x)): w2 is the gate.
                "gate": tensors[prefix + "mlp.w2.weight"],
                "up": tensors[prefix + "mlp.w1.weight"],
                "down": tensors[prefix + "mlp.c_proj.weight"],
            }
        )
    return plain


def _unpack_chatglm(tensors: Tensors, config: dict[str, Any]) -> Plain:
    heads, groups, size = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    encoder = "transformer.encoder."
    plain = Plain(
        heads, groups, tensors["transformer.embedding.word_embeddings.weight"],
        tensors[encoder + "final_layernorm.weight"], tensors["transformer.output_layer.weight"],
    )  # fmt: skip
    bands = [heads * size, groups * size, groups * size]
    for number in range(config["num_layers"]):
        prefix = f"{encoder}layers.{number}."
        q, k, v = tensors[prefix + "self_attention.query_key_value.weight"].split(bands)
        qb, kb, vb = tensors[prefix + "self_attention.query_key_value.bias"].split(bands)
        gate, up = tensors[prefix + "mlp.dense_h_to_4h.weight"].chunk(2)
        plain.layers.append(
            {
                "norm1": tensors[prefix + "input_layernorm.weight"],
                "norm2": tensors[prefix + "post_attention_layernorm.weight"],
                "q": q,
                "k": k,
                "v": v,
                "qb": qb,
                "kb": kb,
                "vb": vb,
                "o": tensors[prefix + "self_attention.dense.weight"],
                "gate": gate,
                "up": up,
                "down": tensors[prefix + "mlp.dense_4h_to_h.weight"],
            }
        )
    return plain


def shards(plain: Plain, cut: Cut) -> Shards:
    """Return what every rank must hold."""
    return {
        (tp, stage, ep): {
            ("model" if cut.vpp == 1 else f"model{chunk}"): _nested(_chunk(plain, cut, chunk * cut.pp + stage, tp, ep))
            for chunk in range(cut.vpp)
        }
        for tp in range(cut.tp)
        for stage in range(cut.pp)
        for ep in range(cut.ep)
    }


def _chunk(plain: Plain, cut: Cut, block: int, tp: int, ep: int) -> Tensors:
    found: Tensors = {}
    classic = cut.names == "classic"
    if block == 0:
        name = "language_model/embedding/word_embeddings/weight" if classic else "embedding.word_embeddings.weight"
        found[name] = _vocabulary(plain.embedding, cut, tp)
    for local, number in enumerate(cut.blocks[block]):
        if number is not None:
            prefix = f"language_model/encoder/layers.{local}." if classic else f"decoder.layers.{local}."
            found |= {prefix + name: t for name, t in _layer_shard(plain, cut, plain.layers[number], tp, ep).items()}
    if block == cut.pp * cut.vpp - 1:
        found["language_model/encoder/final_norm.weight" if classic else "decoder.final_layernorm.weight"] = (
            plain.final_norm
        )
        if plain.head is not None:
            name = "language_model/output_layer/weight" if classic else "output_layer.weight"
            found[name] = _vocabulary(plain.head, cut, tp)
        elif cut.pp > 1:
            name = "word_embeddings_for_head/weight" if classic else "output_layer.weight"
            found[name] = _vocabulary(plain.embedding, cut, tp)
    return found


def _layer_shard(plain: Plain, cut: Cut, layer: dict[str, Any], tp: int, ep: int) -> Tensors:
    names = {
        "mcore": ("input_layernorm.weight", "self_attention.linear_qkv", "self_attention.linear_proj.weight",
                  "pre_mlp_layernorm.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
        "te": ("self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv",
               "self_attention.linear_proj.weight",
               "pre_mlp_layernorm.weight" if "router" in layer else "mlp.linear_fc1.layer_norm_weight",
               "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
        "classic": ("input_norm.weight", "self_attention.query_key_value", "self_attention.dense.weight",
                    "post_attention_norm.weight", "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight"),
    }[cut.names]  # fmt: skip
    norm1, qkv, proj, norm2, fc1, fc2 = names
    found = {
        norm1: layer["norm1"],
        f"{qkv}.weight": _by_group(plain, [layer["q"], layer["k"], layer["v"]], cut.tp, tp),
        proj: layer["o"].chunk(cut.tp, dim=1)[tp],
        norm2: layer["norm2"],
    }
    if "qb" in layer:
        found[f"{qkv}.bias"] = _by_group(plain, [layer["qb"], layer["kb"], layer["vb"]], cut.tp, tp)
    if "q_norm" in layer:
        found["self_attention.q_layernorm.weight"] = layer["q_norm"]
        found["self_attention.k_layernorm.weight"] = layer["k_norm"]
    if "router" not in layer:
        return found | {
            fc1: _gate_and_up(layer["gate"], layer["up"], cut.tp, tp), fc2: layer["down"].chunk(cut.tp, dim=1)[tp]
        }  # fmt: skip
    return found | {"mlp.router.weight": layer["router"]} | _experts(layer["experts"], cut, tp, ep)


def _experts(experts: list[tuple[torch.Tensor, ...]], cut: Cut, tp: int, ep: int) -> Tensors:
    own = len(experts) // cut.ep
    mine = experts[ep * own : (ep + 1) * own]
    fc1 = [_gate_and_up(gate, up, cut.tp, tp) for gate, up, _ in mine]
    fc2 = [down.chunk(cut.tp, dim=1)[tp] for _, _, down in mine]
    if cut.experts == "grouped":
        # GroupedMLP.forward: w1 = weight1.view(num_local_experts, hidden, -1); w2 = weight2.view(num_local_experts, -1,
        # hidden); the matrices are used as x @ w.
        hidden = fc1[0].shape[1]
        return {
            "mlp.experts.weight1": torch.stack([weight.t() for weight in fc1]).reshape(hidden, -1),
            "mlp.experts.weight2": torch.stack([weight.t() for weight in fc2]).reshape(-1, hidden),
        }
    if cut.experts == "te_grouped":
        pattern = "mlp.experts.linear_fc{n}.weight{j}"
    else:
        pattern = "mlp.experts.local_experts.{j}.linear_fc{n}.weight"
    return {pattern.format(n=n, j=j): weight for n, weights in ((1, fc1), (2, fc2)) for j, weight in enumerate(weights)}


def _gate_and_up(gate: torch.Tensor, up: torch.Tensor, size: int, tp: int) -> torch.Tensor:
    return torch.cat([gate.chunk(size)[tp], up.chunk(size)[tp]])


def _by_group(plain: Plain, qkv: list[torch.Tensor], size: int, tp: int) -> torch.Tensor:
    rows = []
    per_rank = plain.groups // size
    queries, keys, values = (part.chunk(plain.groups) for part in qkv)
    for group in range(tp * per_rank, (tp + 1) * per_rank):
        rows += [queries[group], keys[group], values[group]]
    return torch.cat(rows)


def _vocabulary(table: torch.Tensor, cut: Cut, tp: int) -> torch.Tensor:
    multiple = cut.vocab_multiple * cut.tp
    padding = -len(table) % multiple
    return torch.cat([table, table.new_zeros(padding, table.shape[1])]).chunk(cut.tp)[tp]


def _nested(flat: Tensors) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, tensor in flat.items():
        *folders, last = name.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = tensor
    return nested
