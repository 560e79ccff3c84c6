"""The executor of Ferry's own kernels: families that are computed as Llama is, on the CPU, without torch.

Everything is float32 but the products of 8-bit integers, whose sums are exact. A row's result does not depend on the
rows beside it, on the step it is computed in, or on the number of threads: every sum has one order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ferry.core import family as f
from ferry.core.family import LlamaLike, Model
from ferry.engines.engine import EngineSettings
from ferry.engines.native import rotary
from ferry.engines.native.executor import DEFAULT_BLOCK_SIZE, Batch
from ferry.engines.native.library import (
    MAX_HEAD_DIM,
    PANEL,
    BatchStruct,
    LayerStruct,
    Library,
    ModelStruct,
    Packed,
    address,
    load,
)
from ferry.engines.native.limits import context_length, num_threads
from ferry.engines.native.packing import Weights
from ferry.families.registry import detect, families, read_config

KNOWN_ROLES = {
    f.EMBEDDING, f.HEAD, f.FINAL_NORM, f.ATTENTION_NORM, f.MLP_NORM, f.QUERY, f.KEY, f.VALUE, f.ATTENTION_OUT,
    f.QUERY_BIAS, f.KEY_BIAS, f.VALUE_BIAS, f.QUERY_NORM, f.KEY_NORM, f.GATE, f.UP, f.DOWN,
}  # fmt: skip
ROUND_TO = "w8a8"


def open_fast(settings: EngineSettings) -> FastExecutor | None:
    """Return the model with its weights; None where `why_not` has a reason."""
    if why_not(settings):
        return None
    library, plain = load(), _family(read_config(settings.model / "config.json")).llama_like
    assert library is not None
    assert plain is not None
    with Weights(settings.model, library, rounded=settings.quantization == ROUND_TO) as weights:
        return FastExecutor(settings, library, weights, plain)


def why_not(settings: EngineSettings) -> str:
    """Return why the kernels do not run a model with these settings; "" where they do. Reads headers only."""
    library, config = load(), read_config(settings.model / "config.json")
    if library is None:
        return "the kernels were not compiled when Ferry was installed"
    reason = _not_llama_like(config)
    if reason:
        return reason
    if settings.dtype not in ("auto", "float32"):
        return f"the kernels compute in float32, and --dtype {settings.dtype} is asked for"
    if (settings.block_size or DEFAULT_BLOCK_SIZE) % PANEL:
        return f"the kernels need a block size that is a multiple of {PANEL}"
    if settings.quantization not in ("", ROUND_TO):
        return f"the kernels do not know --quantization {settings.quantization}"
    with Weights(settings.model, library, rounded=False) as weights:
        dims = weights.model.dims
        if not set(weights.model.roles) <= KNOWN_ROLES:
            return "it has weights that the kernels do not know"
        if dims.head_dim % PANEL or dims.head_dim > MAX_HEAD_DIM:
            return f"the kernels need heads of a multiple of {PANEL} channels up to {MAX_HEAD_DIM}, not {dims.head_dim}"
        if not weights.can_be_packed():
            return "the kernels know floats of 16 or 32 bits, and 8-bit weights with activations rounded by token"
    return ""


def _family(config: dict[str, Any]) -> f.Family:
    return detect(config, "config.json")


def _not_llama_like(config: dict[str, Any]) -> str:
    known = {kind for family in families().values() if family.llama_like for kind in family.model_types}
    if config.get("model_type") not in known or _family(config).llama_like is None:
        return f"the kernels run {', '.join(sorted(known))}, and this is {config.get('model_type')}"
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            return f"the kernels have no {key}"
    if config.get("hidden_act", "silu") != "silu":
        return f"the kernels have a SiLU gate, not {config['hidden_act']}"
    if config.get("rms_norm_eps") is None or not rotary.is_known(config):
        return "its config.json leaves open, or sets otherwise, what the kernels need to know of norms or positions"
    return ""


class FastExecutor:
    """A model in packed form. See `Executor` for what its methods promise."""

    def __init__(self, settings: EngineSettings, library: Library, weights: Weights, plain: LlamaLike) -> None:
        model, dims = weights.model, weights.model.dims
        self.num_tokens = dims.vocab_size
        longest = context_length(model.config, settings.max_model_len)
        self.max_model_len = longest.num_tokens
        self.block_size = settings.block_size or DEFAULT_BLOCK_SIZE
        self.dtype = "float32"
        self.threads = num_threads(settings)
        heads = dims.num_heads * dims.head_dim
        wide = max(heads + 2 * dims.num_groups * dims.head_dim, dims.hidden_size, 2 * dims.ffn_hidden_size)
        narrow = max(heads, dims.hidden_size, dims.ffn_hidden_size)
        self._row_bytes = 4 * (dims.hidden_size + wide + narrow) + 2 * narrow
        self._cache_items = self.block_size * dims.num_groups * dims.head_dim
        self.block_bytes = 2 * 4 * self._cache_items * dims.num_layers
        self._library = library
        self._tables = rotary.tables(model.config, dims.head_dim, self.max_model_len)
        self._layers = [_Layer(weights, layer) for layer in range(dims.num_layers)]
        self._windows = [plain.window(model.config, layer) for layer in range(dims.num_layers)]
        self._embedding = weights.linear([f.EMBEDDING], is_head=True)
        self._head = weights.linear([f.HEAD], is_head=True) if model.has(f.HEAD) else self._embedding
        self._final_norm = weights.floats(f.FINAL_NORM)
        self.weights_bytes = weights.num_bytes + sum(table.nbytes for table in self._tables)
        self.scheme = "W8A8" if weights.schemes or settings.quantization == ROUND_TO else ""
        stored = {0: "float32", 1: "bfloat16", 2: "float16"}[self._head.kind]
        kinds = f"8-bit integers and {stored}" if self.scheme else stored
        self.notes = (
            f"own kernels ({library.name}): weights held as {kinds}, computed in float32",
            *([longest.note] if longest.note else []),
        )
        self._caches: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = []
        self._structs: Any = None
        self._model = self._model_struct(model)
        self._logits = np.empty((0, self.num_tokens), np.float32)
        self._workspace = library.workspace(self.threads)

    def close(self) -> None:
        """End its threads, and give its memory back."""
        if not self._workspace:
            return
        self._library.close(self._workspace)
        self._workspace = 0
        self._layers, self._caches, self._structs = [], [], None
        self._logits = np.empty((0, 0), np.float32)
        del self._embedding, self._head, self._final_norm, self._tables, self._model

    def __del__(self) -> None:
        if getattr(self, "_workspace", 0):
            self.close()

    def step_bytes(self, num_tokens: int) -> int:
        """Return what the threads share: rows of three widths, of which one is rounded to 16 bits too."""
        return num_tokens * self._row_bytes

    def allocate(self, num_blocks: int) -> None:
        """Make the cache; see `Executor`."""
        # numpy's zeros are pages that the system has not touched yet.
        size = num_blocks * self._cache_items
        self._caches = [(np.zeros(size, np.float32), np.zeros(size, np.float32)) for _ in self._layers]
        structs = [
            layer.struct(keys, values, window)
            for layer, (keys, values), window in zip(self._layers, self._caches, self._windows, strict=True)
        ]
        self._structs = (LayerStruct * len(structs))(*structs)
        self._model.layers = self._structs

    def forward(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Return the logits [R, num_tokens]; they are overwritten by the next call."""
        num_logits = len(batch.logits_rows_R)
        if len(self._logits) < num_logits:
            self._logits = np.empty((num_logits, self.num_tokens), np.float32)
        arrays = (
            np.ascontiguousarray(batch.token_ids_T, np.int32),
            np.ascontiguousarray(batch.positions_T, np.int32),
            np.ascontiguousarray(batch.slots_T, np.int64),
            np.ascontiguousarray(batch.query_starts_B1, np.int32),
            np.ascontiguousarray(batch.block_tables_BM, np.int32),
            np.ascontiguousarray(batch.logits_rows_R, np.int32),
            self._logits,
        )
        sizes = (len(arrays[0]), len(arrays[3]) - 1, num_logits, arrays[4].shape[1])
        self._library.forward(self._workspace, self._model, BatchStruct(*sizes, *[address(array) for array in arrays]))
        return self._logits[:num_logits]

    def _model_struct(self, model: Model) -> ModelStruct:
        dims = model.dims
        return ModelStruct(
            dims.num_layers,
            dims.hidden_size,
            dims.ffn_hidden_size,
            dims.num_heads,
            dims.num_groups,
            dims.head_dim,
            dims.head_dim,
            self.block_size,
            float(model.config["rms_norm_eps"]),
            dims.head_dim**-0.5,
            *[address(array) for array in (*self._tables, self._final_norm)],
            self._embedding.struct(),
            self._head.struct(),
        )


class _Layer:
    """The packed weights of one layer."""

    def __init__(self, weights: Weights, layer: int) -> None:
        self.qkv = weights.linear([f.QUERY, f.KEY, f.VALUE], layer, [f.QUERY_BIAS, f.KEY_BIAS, f.VALUE_BIAS])
        self.attention_out = weights.linear([f.ATTENTION_OUT], layer)
        self.gate_up = weights.linear([f.GATE, f.UP], layer)
        self.down = weights.linear([f.DOWN], layer)
        self.norms = [weights.floats(role, layer) for role in (f.ATTENTION_NORM, f.MLP_NORM, f.QUERY_NORM, f.KEY_NORM)]

    def struct(self, keys: npt.NDArray[np.float32], values: npt.NDArray[np.float32], window: int) -> LayerStruct:
        linears: list[Packed] = [self.qkv, self.attention_out, self.gate_up, self.down]
        pointers = [address(array) for array in (*self.norms, keys, values)]
        return LayerStruct(*(linear.struct() for linear in linears), *pointers, window)
