"""How many bytes a rank needs for training, and how many operations a token costs, from a model's sizes alone.

An estimate, made before anything is loaded. The terms are those of Korthikanti et al. 2022 (arXiv 2205.05198) for
tensor parallelism without sequence parallelism, adapted to this engine: attention without a stored score matrix, RMS
norms computed in fp32, gated MLPs, grouped key-value heads, and a head that is computed in chunks. Left out: biases and
norms of heads (below 0.1 % of a model), what the allocator and the communication library keep for themselves.

    bytes of one parameter      weight  gradient  master  moments
    bf16, trained                    2         4       4        8    gradients are summed over micro batches in fp32
    fp32, trained                    4         4       -        8
    frozen (the base of LoRA)   2 or 4         -       -        -

    bytes of one token in one layer (b: bytes of the dtype, h: hidden, a: heads, g: kv heads, d: head_dim, f: ffn)
    two norms         2 h (4 + 2 b)             fp32 input, normalised value, output; on every tensor rank
    attention         b (3 a d + 2 g d) / tp    query, output, output in rows; key, value
    MLP               4 b f / tp                gate, its activation, up, their product
    experts           4 b k f / tp + 2 b k h    k experts a token: the same, and the rows sent to and from them
    checkpointed      b h                       the layer's input only; one layer at a time is computed again
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ferry.core.family import Dims
from ferry.core.mesh import Mesh, kv_heads_per_rank, padded_rows
from ferry.core.pipeline import Chunk, pipeline

Trainable = Literal["all", "lora"]
Dtype = Literal["bf16", "fp32"]
Sharding = Literal["none", "optimizer", "full"]
FP32_BYTES = 4
MOMENTS_BYTES = 8
DTYPE_BYTES: dict[str, int] = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a rank besides sizes and mesh.

    `sharding` is over dp: "optimizer" (ZeRO-1: masters and moments) or "full" (FSDP: weights and gradients as well).
    `num_micro_batches` a step bounds what is in flight in a pipeline; None means enough to fill it.
    """

    seq_len: int
    micro_batch: int = 1
    trainable: Trainable = "all"
    dtype: Dtype = "bf16"
    checkpointing: bool = False
    sharding: Sharding = "none"
    num_micro_batches: int | None = None
    lora_rank: int = 16
    head_chunk_rows: int = 256


class MemoryEstimate(NamedTuple):
    """Bytes on the fullest rank, and the pipeline stage it is in."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    stage: int

    @property
    def total_bytes(self) -> int:
        return sum(self[:5])

    def largest_part(self) -> str:
        """Return the name of the part that needs most: the one to lower first."""
        parts = dict(zip(("parameters", "gradients", "optimizer", "activations", "logits"), self[:5], strict=True))
        return max(parts, key=lambda name: parts[name])


class Linear(NamedTuple):
    """A matrix of one layer on one tensor rank, and how often a layer has it (experts)."""

    rows: int
    cols: int
    copies: int = 1


def memory_per_rank(dims: Dims, mesh: Mesh, setup: Setup, layer_list: tuple[int, ...] = ()) -> MemoryEstimate:
    """Return the memory of the fullest rank. The mesh must fit the model (`check_mesh`)."""
    chunks = pipeline(dims.num_layers, mesh.pp, mesh.vpp, layer_list)
    stages = [[chunk for chunk in chunks if chunk.stage == stage] for stage in range(mesh.pp)]
    return max((_stage_memory(dims, mesh, setup, own) for own in stages), key=lambda estimate: estimate.total_bytes)


def num_parameters(dims: Dims) -> int:
    """Return the parameters of the whole model, without biases and norms of heads."""
    layers = sum(_layer_parameters(dims, layer, 1) for layer in range(dims.num_layers))
    return layers + (1 if dims.tied else 2) * dims.vocab_size * dims.hidden_size + dims.hidden_size


def num_lora_parameters(dims: Dims, rank: int) -> int:
    """Return the parameters of adapters on every linear layer."""
    return sum(_adapter_parameters(dims, layer, 1, rank) for layer in range(dims.num_layers))


def flops_per_token(dims: Dims, seq_len: int, trainable: Trainable = "all", lora_rank: int = 16) -> float:
    """Return the floating-point operations of one token, forward and backward: the numerator of MFU.

    6 a weight that a token meets (2 forward, 2 for the gradient of its input, 2 for its own), 4 if the weight is
    frozen. The head counts, looking up an embedding does not; of experts only the chosen ones count. Attention adds
    6 * seq_len * heads * head_dim a layer: causal, so a token sees half the sequence on average. With packed texts
    `seq_len` is their mean length. What checkpointing computes again does not count.
    """
    weights = dims.vocab_size * dims.hidden_size
    for layer in range(dims.num_layers):
        weights += _router_parameters(dims, layer)
        for matrix in _matrices(dims, layer, 1, active_only=True):
            weights += matrix.rows * matrix.cols * matrix.copies
    attention = 6.0 * seq_len * dims.num_layers * dims.num_heads * dims.head_dim
    if trainable == "lora":
        return 4.0 * weights + 6.0 * num_lora_parameters(dims, lora_rank) + attention
    return 6.0 * weights + attention


def _stage_memory(dims: Dims, mesh: Mesh, setup: Setup, chunks: list[Chunk]) -> MemoryEstimate:
    layers = [layer for chunk in chunks for layer in chunk.layers if layer is not None]
    is_first, is_last = any(chunk.first for chunk in chunks), any(chunk.last for chunk in chunks)
    table = padded_rows(dims.vocab_size, mesh.tp) * dims.hidden_size
    tables = int(is_first) + int(is_last and not (dims.tied and is_first))
    per_layer = [_layer_parameters(dims, layer, mesh.tp) for layer in layers]
    weights = sum(per_layer) + tables * table + (dims.hidden_size if is_last else 0)
    adapters = 0
    if setup.trainable == "lora":
        adapters = sum(_adapter_parameters(dims, layer, mesh.tp, setup.lora_rank) for layer in layers)
    trained = adapters if setup.trainable == "lora" else weights
    item = DTYPE_BYTES[setup.dtype]
    state_bytes = MOMENTS_BYTES + (FP32_BYTES if setup.dtype == "bf16" else 0)
    parameters, gradients, optimizer = item * (weights + adapters), FP32_BYTES * trained, state_bytes * trained
    if setup.sharding != "none":
        optimizer = -(-optimizer // mesh.dp)
    if setup.sharding == "full":
        largest = max([*per_layer, table if tables else 0])
        # Two gathered pieces live at a time: the one in use and the one on its way.
        parameters = -(-parameters // mesh.dp) + (2 * item * largest if mesh.dp > 1 else 0)
        in_use = FP32_BYTES * largest if mesh.dp > 1 and setup.trainable == "all" else 0
        gradients = -(-gradients // mesh.dp) + in_use
    activations = _activations_bytes(dims, mesh, setup, chunks)
    logits = _logits_bytes(dims, mesh, setup) if is_last else 0
    return MemoryEstimate(parameters, gradients, optimizer, activations, logits, chunks[0].stage)


def _activations_bytes(dims: Dims, mesh: Mesh, setup: Setup, chunks: list[Chunk]) -> int:
    """Return what a rank keeps for the backward pass when its pipeline is fullest."""
    tokens = setup.seq_len * setup.micro_batch
    hidden_bytes = DTYPE_BYTES[setup.dtype] * dims.hidden_size
    full = [
        [_layer_token_bytes(dims, layer, mesh.tp, setup.dtype) for layer in chunk.layers if layer is not None]
        for chunk in chunks
    ]
    kept = [len(layers) * hidden_bytes if setup.checkpointing else sum(layers) for layers in full]
    recomputed = max((cost for layers in full for cost in layers), default=0) if setup.checkpointing else 0
    boundary = 2 * hidden_bytes if mesh.pp > 1 else hidden_bytes  # input and output of the stage
    in_flight = _chunks_in_flight(mesh, setup.num_micro_batches, chunks[0].stage)
    return tokens * (-(-in_flight * sum(kept) // len(kept)) + in_flight * boundary + recomputed)


def _chunks_in_flight(mesh: Mesh, num_micro_batches: int | None, stage: int) -> int:
    """Return how many (micro batch, virtual stage) pairs wait for their backward pass at the fullest moment."""
    if mesh.pp == 1:
        return 1
    # Interleaved 1F1B has Megatron's number of warm-up steps; both count the one being computed.
    interleaved = 2 * (mesh.pp - stage - 1) + (mesh.vpp - 1) * mesh.pp + 1
    warm = mesh.pp - stage if mesh.vpp == 1 else interleaved
    return warm if num_micro_batches is None else min(warm, num_micro_batches * mesh.vpp)


def _logits_bytes(dims: Dims, mesh: Mesh, setup: Setup) -> int:
    """Return the head's buffers: one chunk of logits, its fp32 copy and its gradient; the final norm's values."""
    item = DTYPE_BYTES[setup.dtype]
    tokens = setup.seq_len * setup.micro_batch
    rows = min(setup.head_chunk_rows, tokens)
    chunk = rows * padded_rows(dims.vocab_size, mesh.tp) * (item + 2 * FP32_BYTES)
    return chunk + tokens * dims.hidden_size * (FP32_BYTES + 3 * item)


def _layer_token_bytes(dims: Dims, layer: int, tp: int, dtype: Dtype) -> int:
    """Return what one token leaves in one layer without checkpointing."""
    item, hidden = DTYPE_BYTES[dtype], dims.hidden_size
    norms = 2 * hidden * (FP32_BYTES + 2 * item)
    heads, kv_heads = dims.num_heads // tp, kv_heads_per_rank(dims, tp)
    attention = item * dims.head_dim * (3 * heads + 2 * kv_heads)
    if not dims.is_moe(layer):
        return norms + attention + 4 * item * (dims.ffn_hidden_size // tp)
    chosen = dims.experts_per_token
    return norms + attention + item * chosen * (4 * (dims.expert_ffn_hidden_size // tp) + 2 * hidden)


def _layer_parameters(dims: Dims, layer: int, tp: int) -> int:
    """Return the parameters of one layer on one tensor rank. Router and norms are on every rank."""
    weights = sum(matrix.rows * matrix.cols * matrix.copies for matrix in _matrices(dims, layer, tp))
    return weights + _router_parameters(dims, layer) + 2 * dims.hidden_size


def _router_parameters(dims: Dims, layer: int) -> int:
    return dims.num_experts * dims.hidden_size if dims.is_moe(layer) else 0


def _matrices(dims: Dims, layer: int, tp: int, *, active_only: bool = False) -> list[Linear]:
    """Return the matrices of one layer on one tensor rank: attention, then the experts or the MLP."""
    hidden, query = dims.hidden_size, dims.num_heads // tp * dims.head_dim
    key = kv_heads_per_rank(dims, tp) * dims.head_dim
    attention = [Linear(query, hidden), Linear(key, hidden, 2), Linear(hidden, query)]
    if not dims.is_moe(layer):
        ffn = dims.ffn_hidden_size // tp
        return [*attention, Linear(ffn, hidden, 2), Linear(hidden, ffn)]
    ffn, experts = dims.expert_ffn_hidden_size // tp, dims.experts_per_token if active_only else dims.num_experts
    return [*attention, Linear(ffn, hidden, 2 * experts), Linear(hidden, ffn, experts)]


def _adapter_parameters(dims: Dims, layer: int, tp: int, rank: int) -> int:
    """Return the parameters of adapters of one layer: `rank` rows and columns beside each matrix."""
    return sum(rank * (matrix.rows + matrix.cols) * matrix.copies for matrix in _matrices(dims, layer, tp))
