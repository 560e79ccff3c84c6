"""A plain conversion of Hugging Face weights to Megatron's shards, in RAM, with torch, written to be obvious.

Shares nothing with Ferry: where the two agree bit for bit, neither has the other's mistake.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def load_hf(hf_dir: Path) -> Tensors:
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for path in sorted(hf_dir.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def rank_state(hf: Tensors, fields: dict[str, Any], chunk: dict[str, Any]) -> Tensors:
    """Return the state dict of one (virtual) stage of one rank.

    `chunk`: tp, tp_rank, ep, ep_rank, layers (global numbers), pre, post.
    """
    tp, rank = chunk["tp"], chunk["tp_rank"]
    state: Tensors = {}

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(tp, dim=0)[rank].clone()

    def columns(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(tp, dim=1)[rank].clone()

    def vocabulary(tensor: torch.Tensor) -> torch.Tensor:
        padding = tensor.new_zeros(fields["padded_vocab_size"] - tensor.shape[0], tensor.shape[1])
        return rows(torch.cat([tensor, padding]))

    embedding = hf["model.embed_tokens.weight"]
    if chunk["pre"]:
        state["embedding.word_embeddings.weight"] = vocabulary(embedding)
    for local, number in enumerate(chunk["layers"]):
        source, target = f"model.layers.{number}.", f"decoder.layers.{local}."
        state[target + "input_layernorm.weight"] = hf[source + "input_layernorm.weight"]
        state[target + "pre_mlp_layernorm.weight"] = hf[source + "post_attention_layernorm.weight"]
        attention = source + "self_attn."
        for kind in ("weight", "bias") if fields["add_qkv_bias"] else ("weight",):
            state[target + f"self_attention.linear_qkv.{kind}"] = rows(
                _qkv(*(hf[attention + f"{part}_proj.{kind}"] for part in "qkv"), fields)
            )
        state[target + "self_attention.linear_proj.weight"] = columns(hf[attention + "o_proj.weight"])
        if fields["qk_layernorm"]:
            state[target + "self_attention.q_layernorm.weight"] = hf[attention + "q_norm.weight"]
            state[target + "self_attention.k_layernorm.weight"] = hf[attention + "k_norm.weight"]
        mlp = target + "mlp."
        if not fields["num_experts"]:
            gate, up, down = _dense(hf, source + "mlp.")
            state[mlp + "linear_fc1.weight"] = torch.cat([rows(gate), rows(up)])
            state[mlp + "linear_fc2.weight"] = columns(down)
            continue
        router = "block_sparse_moe.gate" if source + "block_sparse_moe.gate.weight" in hf else "mlp.gate"
        state[mlp + "router.weight"] = hf[f"{source}{router}.weight"]
        own = fields["num_experts"] // chunk["ep"]
        cuts = []
        for expert in range(chunk["ep_rank"] * own, (chunk["ep_rank"] + 1) * own):
            gate, up, down = _expert(hf, source, expert)
            cuts.append((torch.cat([rows(gate), rows(up)]), columns(down)))
        if fields["moe_grouped_gemm"]:
            # Megatron views weight1 as [experts, hidden, 2*ffn]; its declared shape [hidden, experts*2*ffn] misleads.
            weight1_EHF = torch.stack([fc1.t() for fc1, _ in cuts])
            state[mlp + "experts.weight1"] = weight1_EHF.reshape(fields["hidden_size"], -1)
            state[mlp + "experts.weight2"] = torch.cat([fc2.t() for _, fc2 in cuts])
        for j, (fc1, fc2) in enumerate(cuts if not fields["moe_grouped_gemm"] else []):
            state[mlp + f"experts.local_experts.{j}.linear_fc1.weight"] = fc1
            state[mlp + f"experts.local_experts.{j}.linear_fc2.weight"] = fc2
    if chunk["post"]:
        state["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        untied = fields["untie_embeddings_and_output_weights"]
        if untied or not chunk["pre"]:
            state["output_layer.weight"] = vocabulary(hf["lm_head.weight"] if untied else embedding)
    return state


def _qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fields: dict[str, Any]) -> torch.Tensor:
    groups, rest = fields["num_query_groups"], query.shape[1:]
    blocks = [part.reshape(groups, -1, *rest) for part in (query, key, value)]
    return torch.cat(blocks, dim=1).reshape(-1, *rest)


def _dense(hf: Tensors, prefix: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if prefix + "gate_up_proj.weight" in hf:
        gate, up = hf[prefix + "gate_up_proj.weight"].chunk(2)
    else:
        gate, up = hf[prefix + "gate_proj.weight"], hf[prefix + "up_proj.weight"]
    return gate, up, hf[prefix + "down_proj.weight"]


def _expert(hf: Tensors, layer: str, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    old = f"{layer}block_sparse_moe.experts.{expert}."
    if old + "w1.weight" in hf:
        return hf[old + "w1.weight"], hf[old + "w3.weight"], hf[old + "w2.weight"]
    new = f"{layer}mlp.experts.{expert}."
    return hf[new + "gate_proj.weight"], hf[new + "up_proj.weight"], hf[new + "down_proj.weight"]
