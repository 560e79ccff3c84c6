"""One rank of the judge: megatron-core's own GPTModel on CPU, loading, saving and computing logits.

Runs only in processes forked by `server.py`; the patches that let megatron-core live without a GPU stay there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
from pathlib import Path
from typing import Any

import numpy as np
import reference
import torch
import torch.distributed as dist
from fields import from_args, from_hf
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import grouped_gemm_util, moe_utils
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

Job = dict[str, Any]


def live_without_gpu() -> None:
    """Patch this process: megatron-core asks for the current GPU even where everything is on the CPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment, method-assign]
    CudaRNGStatesTracker.fork = lambda self, *_: contextlib.nullcontext()  # type: ignore[method-assign]
    moe_utils.te_general_gemm = None  # megatron-core 0.16 forgets to define it where Transformer Engine is absent
    grouped_gemm_util.grouped_gemm_is_available = lambda: True
    grouped_gemm_util.ops = argparse.Namespace(gmm=_grouped_gemm)
    filesystem_async._results_queue = queue.Queue()  # its default starts another Python process for every rank


def _grouped_gemm(
    rows: torch.Tensor, weights_EIO: torch.Tensor, rows_per_expert: torch.Tensor, trans_b: bool
) -> torch.Tensor:
    assert not trans_b
    parts = rows.split(rows_per_expert.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weights_EIO, strict=True)])


def run(job: Job) -> dict[str, Any]:
    """Do one job as rank `job["rank"]` of the running process group."""
    live_without_gpu()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=job["tp"],
        pipeline_model_parallel_size=job["pp"],
        virtual_pipeline_model_parallel_size=job["vpp"],
        expert_model_parallel_size=job["ep"],
    )
    if job["action"] == "write":
        return _write(job)
    directory = _iteration(Path(job["checkpoint"]))
    torch_dist = (directory / "metadata.json").exists()
    assert torch_dist == (job["format"] == "torch_dist"), f"{directory} is not in format {job['format']}"
    shard = {} if torch_dist else torch.load(_shard(directory, job), map_location="cpu", weights_only=False, mmap=True)
    if job["fields"] == "args":
        said = dist_checkpointing.load_common_state_dict(str(directory)) if torch_dist else shard
        fields = from_args(said["args"])
    else:
        fields = from_hf(Path(job["hf"]), job["tp"], job["divisible_by"])
    fields["moe_grouped_gemm"] = job["grouped_gemm"]
    models = _build(fields, job, dtype=getattr(torch, job["dtype"]))
    if torch_dist:
        _load_torch_dist(models, directory, job)
    else:
        _load_torch(models, shard)
    vocab_size = from_hf(Path(job["hf"]), job["tp"], job["divisible_by"])["vocab_size"]
    logits = _logits(models, torch.tensor(job["tokens"]))
    if logits is not None and parallel_state.get_tensor_model_parallel_rank() == 0 and _first_replica():
        np.save(job["out"], logits[..., :vocab_size].float().numpy())
    return {"num_tensors": sum(len(_tensors(model.state_dict())) for model in models)}


def _first_replica() -> bool:
    return parallel_state.get_data_parallel_rank() == 0


def _iteration(checkpoint: Path) -> Path:
    said = (checkpoint / "latest_checkpointed_iteration.txt").read_text().strip()
    return checkpoint / ("release" if said == "release" else f"iter_{int(said):07d}")


def _shard(directory: Path, job: Job) -> Path:
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if job["pp"] > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if job["ep"] > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return directory / name / "model_optim_rng.pt"


def _build(fields: dict[str, Any], job: Job, dtype: torch.dtype) -> list[GPTModel]:
    config = TransformerConfig(
        num_layers=fields["num_layers"],
        hidden_size=fields["hidden_size"],
        ffn_hidden_size=fields["ffn_hidden_size"],
        num_attention_heads=fields["num_attention_heads"],
        num_query_groups=fields["num_query_groups"],
        kv_channels=fields["kv_channels"],
        layernorm_epsilon=fields["norm_epsilon"],
        normalization=fields["normalization"],
        add_bias_linear=fields["add_bias_linear"],
        add_qkv_bias=fields["add_qkv_bias"],
        qk_layernorm=fields["qk_layernorm"],
        gated_linear_unit=fields["swiglu"],
        activation_func=torch.nn.functional.silu,
        rotary_interleaved=fields["rotary_interleaved"],
        num_moe_experts=fields["num_experts"],
        moe_ffn_hidden_size=fields["moe_ffn_hidden_size"],
        moe_router_topk=fields["moe_router_topk"],
        moe_router_pre_softmax=fields["moe_router_pre_softmax"],
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        moe_grouped_gemm=fields["moe_grouped_gemm"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=job["tp"],
        pipeline_model_parallel_size=job["pp"],
        virtual_pipeline_model_parallel_size=job["vpp"],
        expert_model_parallel_size=job["ep"],
        pipeline_model_parallel_layout=_uneven(job["layer_list"]),
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=fields["num_experts"],
        moe_grouped_gemm=fields["moe_grouped_gemm"],
        qk_layernorm=fields["qk_layernorm"],
        normalization=fields["normalization"],
        moe_use_legacy_grouped_gemm=fields["moe_grouped_gemm"],
    )
    models = []
    for stage in range(job["vpp"] or 1):
        virtual = stage if job["vpp"] else None
        model = GPTModel(
            config,
            spec,
            vocab_size=fields["padded_vocab_size"],
            max_sequence_length=fields["max_position_embeddings"],
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual),
            parallel_output=True,
            share_embeddings_and_output_weights=not fields["untie_embeddings_and_output_weights"],
            position_embedding_type=fields["position_embedding_type"],
            rotary_percent=fields["rotary_percent"],
            rotary_base=fields["rotary_base"],
            rope_scaling=fields["use_rope_scaling"],
            rope_scaling_factor=fields["rope_scaling_factor"],
            vp_stage=virtual,
        )
        models.append(model.to(dtype).eval())
    config.bf16 |= fields["moe_grouped_gemm"]  # the grouped experts insist on it, and compute in any type all the same
    return models


def _uneven(layer_list: list[int] | None) -> list[list[str]] | None:
    if not layer_list:
        return None
    stages = [["decoder"] * size for size in layer_list]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def _fill(model: GPTModel, given: dict[str, Any]) -> None:
    """Copy tensors into a model after checking that names and shapes are exactly the model's."""
    wanted, given = _tensors(model.state_dict()), _tensors(given)
    missing, unexpected = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    assert not missing, f"missing {len(missing)}: {missing[:5]}"
    assert not unexpected, f"unexpected {len(unexpected)}: {unexpected[:5]}"
    for name, value in wanted.items():
        assert value.shape == given[name].shape, f"{name}: {tuple(given[name].shape)}, not {tuple(value.shape)}"
        with torch.no_grad():
            value.copy_(given[name])


def _load_torch(models: list[GPTModel], shard: dict[str, Any]) -> None:
    assert shard["checkpoint_version"] == 3.0
    names = ["model"] if len(models) == 1 else [f"model{stage}" for stage in range(len(models))]
    found = sorted(name for name in shard if name.startswith("model"))
    assert found == names, f"the shard has {found}, expected {names}"
    for name, model in zip(names, models, strict=True):
        _fill(model, shard[name])


def _load_torch_dist(models: list[GPTModel], directory: Path, job: Job) -> None:
    """Load all virtual stages at once: megatron-core checks that every chunk is asked for exactly once."""
    handling = StrictHandling(job["strict"])
    answer = dist_checkpointing.load(_sharded(models, job), str(directory), strict=handling)
    answer, missing, unexpected = answer if handling is StrictHandling.RETURN_ALL else (answer, (), ())
    missing = sorted(key for key in missing if "_extra_state" not in key)
    unexpected = sorted(key for key in unexpected if "_extra_state" not in key)
    assert not missing, f"missing {len(missing)}: {missing[:5]}"
    assert not unexpected, f"unexpected {len(unexpected)}: {unexpected[:5]}"
    for stage, model in enumerate(models):
        _fill(model, answer["model" if len(models) == 1 else f"model{stage}"])


def _sharded(models: list[GPTModel], job: Job) -> dict[str, Any]:
    metadata = job["metadata"] or {}
    if len(models) == 1:
        return {"model": models[0].sharded_state_dict(metadata=dict(metadata))}
    return {f"model{stage}": model.sharded_state_dict(metadata=dict(metadata)) for stage, model in enumerate(models)}


def _write(job: Job) -> dict[str, Any]:
    hf_dir, out = Path(job["hf"]), Path(job["out"])
    fields = from_hf(hf_dir, job["tp"], job["divisible_by"])
    fields["moe_grouped_gemm"] = job["grouped_gemm"]
    hf = reference.load_hf(hf_dir)
    dtype = hf["model.embed_tokens.weight"].dtype
    models = _build(fields, job, dtype)
    for stage, model in enumerate(models):
        virtual = stage if job["vpp"] else None
        first = get_transformer_layer_offset(model.config, virtual, parallel_state.get_pipeline_model_parallel_rank())
        count = get_num_layers_to_build(model.config, virtual, parallel_state.get_pipeline_model_parallel_rank())
        chunk = {
            "tp": job["tp"], "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
            "ep": job["ep"], "ep_rank": parallel_state.get_expert_model_parallel_rank(),
            "layers": range(first, first + count), "pre": model.pre_process, "post": model.post_process,
        }  # fmt: skip
        _fill(model, reference.rank_state(hf, fields, chunk))
    common = {
        "args": argparse.Namespace(
            **fields,
            tensor_model_parallel_size=job["tp"],
            pipeline_model_parallel_size=job["pp"],
            virtual_pipeline_model_parallel_size=job["vpp"],
            expert_model_parallel_size=job["ep"],
            params_dtype=dtype,
            ckpt_format=job["format"],
        ),
        "checkpoint_version": 3.0,
        "iteration": 1,
    }
    directory = out / "iter_0000001"
    if job["format"] == "torch":
        names = ["model"] if len(models) == 1 else [f"model{stage}" for stage in range(len(models))]
        states = {name: model.state_dict_for_save_checkpoint() for name, model in zip(names, models, strict=True)}
        path = _shard(directory, job)
        if _first_replica() or job["ep"] > 1:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(common | states, path)
    else:
        if job["rank"] == 0:
            directory.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(
            common | _sharded(models, job), str(directory), content_metadata=job["metadata"] or None
        )
    dist.barrier()
    if job["rank"] == 0:
        (out / "latest_checkpointed_iteration.txt").write_text("1")
    return {"num_tensors": sum(len(_tensors(model.state_dict())) for model in models)}


def _logits(models: list[GPTModel], tokens_BT: torch.Tensor) -> torch.Tensor | None:
    """Return the full logits on the last stage, None elsewhere. Stages hand over with plain send and receive."""
    pp, stage = parallel_state.get_pipeline_model_parallel_world_size(), _stage()
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    batch, length = tokens_BT.shape
    position_BT = torch.arange(length).expand(batch, length)
    mask_11TT = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    config = models[0].config
    output = None
    with torch.no_grad():
        for model in models:
            if not model.pre_process:
                hidden_TBH = torch.empty(length, batch, config.hidden_size, dtype=config.params_dtype)
                dist.recv(hidden_TBH, ranks[(stage - 1) % pp]) if pp > 1 else hidden_TBH.copy_(output)
                model.set_input_tensor(hidden_TBH)
            output = model(tokens_BT, position_BT, mask_11TT)
            if not model.post_process and pp > 1:
                dist.send(output, ranks[(stage + 1) % pp])
    if not models[-1].post_process:
        return None
    world = parallel_state.get_tensor_model_parallel_world_size()
    parts = [torch.empty_like(output) for _ in range(world)]
    dist.all_gather(parts, output.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim=-1)


def _stage() -> int:
    return int(parallel_state.get_pipeline_model_parallel_rank())


def transformers_logits(job: Job) -> dict[str, Any]:
    """Save the logits of transformers' own model in the same precision, with eager attention."""
    from transformers import AutoModelForCausalLM

    os.environ["HF_HUB_OFFLINE"] = "1"
    model = AutoModelForCausalLM.from_pretrained(
        job["hf"], dtype=getattr(torch, job["dtype"]), attn_implementation="eager", **job["extra"]
    ).eval()
    with torch.no_grad():
        logits = model(torch.tensor(job["tokens"])).logits
    np.save(job["out"], logits.float().numpy())
    return {}
