"""Any causal model of transformers over a paged cache: untouched modules, packed sequences, our attention function.

All sequences of a step are one row of tokens with positions; only attention looks across tokens, and it looks into the
blocks of its own sequence. The rows of a matrix product do not mix, but how a library adds up a row depends on how many
there are: answers of different batches agree but for the last bits of float32. Rounding activations to 8 bits makes
more of such a difference than floats do, so W8A8 answers may be others in other company.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ferry.core.errors import InputError
from ferry.engines.engine import EngineSettings
from ferry.engines.native.attention import STEP, Cache, LayerShape, Step, make_cache
from ferry.engines.native.executor import DEFAULT_BLOCK_SIZE, Batch
from ferry.engines.native.limits import compute_dtype, context_length, num_threads
from ferry.engines.native.loading import Loaded, load, stored_names
from ferry.families.registry import read_config

TRIAL_TOKENS = 2
UNSTEADY = "activations of 8 bits round last-bit differences up: an answer may change with what runs beside it"


class GenericExecutor:
    """A model of transformers as an `Executor`."""

    def __init__(self, loaded: Loaded, settings: EngineSettings, max_model_len: int, notes: tuple[str, ...]) -> None:
        self.model: Any = loaded.model
        self.max_model_len = max_model_len
        self.block_size = settings.block_size or DEFAULT_BLOCK_SIZE
        self.scheme = loaded.scheme
        self.threads = torch.get_num_threads()
        self.notes = (*notes, *loaded.notes)
        self._dtype: torch.dtype = self.model.dtype
        self.dtype = str(self._dtype).removeprefix("torch.")
        self.weights_bytes = sum(tensor.nbytes for tensor in stored_names(self.model).values())
        self._takes_rows = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._cache: Cache | None = None
        self._shapes, self.num_tokens = self._try()
        item_bytes = torch.empty(0, dtype=self._dtype).element_size()
        self.block_bytes = self.block_size * sum(
            shape.num_heads * (shape.key_dim + shape.value_dim) * item_bytes for shape in self._shapes.values()
        )

    def step_bytes(self, num_tokens: int) -> int:
        """Return an estimate: the rows of the widest part of a layer, those around it, and copies in float32."""
        config = self.model.config.get_text_config()
        hidden = int(config.hidden_size)
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
        return 4 * num_tokens * (3 * int(max(inner) if isinstance(inner, list) else inner) + 4 * hidden)

    def close(self) -> None:
        """Give the memory of the model and of its cache back."""
        self.model = self._cache = None

    def allocate(self, num_blocks: int) -> None:
        """Make the cache. Memory is used as blocks are written."""
        self._cache = make_cache(self._shapes, num_blocks, self.block_size, self._dtype)

    def forward(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Return the logits [R, num_tokens]; see `Executor`."""
        assert self._cache is not None, "allocate comes first"
        return self._run(Step(batch, self._cache)).numpy()

    @torch.inference_mode()
    def _run(self, step: Step) -> torch.Tensor:
        batch = step.batch
        rows_R = torch.from_numpy(batch.logits_rows_R.astype(np.int64))
        given: dict[str, Any] = {STEP: step}
        if self._takes_rows:
            given["logits_to_keep"] = rows_R
        logits: torch.Tensor = self.model(
            input_ids=torch.from_numpy(batch.token_ids_T.astype(np.int64))[None],
            position_ids=torch.from_numpy(batch.positions_T.astype(np.int64))[None],
            use_cache=False,
            **given,
        ).logits[0]
        return (logits if self._takes_rows else logits[rows_R]).to(torch.float32)

    def _try(self) -> tuple[dict[int, LayerShape], int]:
        """Run a few tokens without a cache: what every layer keeps, and how wide the logits are."""
        places = np.arange(TRIAL_TOKENS)
        ends = np.array([0, TRIAL_TOKENS])
        step = Step(Batch(np.zeros_like(places), places, places, ends, ends[1:], np.zeros((1, 1), np.int64), places))
        num_tokens = self._run(step).shape[-1]
        num_layers = self.model.config.get_text_config().num_hidden_layers
        if sorted(step.seen) != list(range(num_layers)):
            raise InputError(
                f"{type(self.model).__name__} has {num_layers} layers, of which {len(step.seen)} have keys and values",
                code="engine.model",
                repair="use another engine",
            )
        return step.seen, num_tokens


def open_generic(settings: EngineSettings, note: str = "") -> GenericExecutor:
    """Load a model for the CPU."""
    config = read_config(settings.model / "config.json")
    longest = context_length(config, settings.max_model_len)
    dtype = compute_dtype(settings)
    torch.set_num_threads(num_threads(settings))
    loaded = load(settings, getattr(torch, dtype.dtype))
    unsteady = UNSTEADY if loaded.scheme.endswith("A8") else ""
    notes = tuple(text for text in (note, f"{dtype.dtype}: {dtype.reason}", longest.note, unsteady) if text)
    return GenericExecutor(loaded, settings, longest.num_tokens, notes)
