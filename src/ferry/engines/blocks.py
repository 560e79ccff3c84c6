"""A Hugging Face decoder of which one layer is in memory at a time, in float32 and without gradients.

The decoder is made on the meta device; a layer's own module is filled straight from the checkpoint and run through the
decoder itself, so that positions, masks and layer kinds are the model's own. Every linear of a loaded layer can be
watched and changed by its canonical name, the experts that transformers keeps fused included.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ferry.core import family as f
from ferry.core.errors import InputError
from ferry.core.family import Model
from ferry.core.gather import Sources
from ferry.core.layout import Local, Part, Piece, whole
from ferry.core.smoothing import SUFFIX, layer_prefix, layer_tensors
from ferry.engines.modules import empty_decoder, rebuild_buffers, to_torch

Watch = Callable[[torch.Tensor], None]


class Experts(nn.Module):
    """The experts of a layer as single linears: what transformers computes, each with a name.

    Called like transformers' fused module: hidden states [T, H], chosen experts [T, k], their weights [T, k].
    """

    def __init__(self, gates: list[nn.Linear], ups: list[nn.Linear], downs: list[nn.Linear], act: nn.Module) -> None:
        super().__init__()
        self.gates, self.ups, self.downs = nn.ModuleList(gates), nn.ModuleList(ups), nn.ModuleList(downs)
        self.act = act

    def forward(self, h_TH: torch.Tensor, chosen_Tk: torch.Tensor, weights_Tk: torch.Tensor) -> torch.Tensor:
        total_TH = torch.zeros_like(h_TH)
        for expert, (gate, up, down) in enumerate(zip(self.gates, self.ups, self.downs, strict=True)):
            tokens, places = torch.where(chosen_Tk == expert)
            if len(tokens):
                x = h_TH[tokens]
                y = down(self.act(gate(x)) * up(x)) * weights_Tk[tokens, places, None]
                total_TH.index_add_(0, tokens, y.to(total_TH.dtype))
        return total_TH


@dataclass
class Layer:
    """A loaded layer: its module, its linears by canonical name, and its other weights by canonical tensor name."""

    index: int
    module: nn.Module
    linears: dict[str, nn.Linear]
    others: dict[str, nn.Parameter]
    experts: frozenset[str] = frozenset()
    """Those of the linears that belong to one expert of several."""

    def is_expert(self, name: str) -> bool:
        return name in self.experts

    def parameter(self, name: str) -> torch.Tensor:
        """Return a canonical tensor of the layer, to be changed in place."""
        if name in self.others:
            return self.others[name].data
        module, _, leaf = name.rpartition(".")
        return getattr(self.linears[module], leaf).data  # type: ignore[no-any-return]

    @contextmanager
    def watched(self, watches: dict[str, Watch]) -> Iterator[None]:
        """Call each watch with the input of its linear, [..., K], whenever the layer runs."""
        hooks = [
            self.linears[name].register_forward_pre_hook(lambda module, args, watch=watch: watch(args[0]))
            for name, watch in watches.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Blocks:
    """The decoder of a checkpoint, layer by layer. `digests` has the sha256 of every tensor of the layers loaded."""

    def __init__(self, directory: Path, model: Model, sources: Sources, device: torch.device) -> None:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(directory).get_text_config()
        except (ValueError, KeyError, OSError) as error:
            raise InputError(
                f"transformers cannot read {directory / 'config.json'}: {' '.join(str(error).split())[:300]}",
                code="blocks.config",
                repair="models whose code travels with the checkpoint cannot be calibrated; --method rtn needs no code",
            ) from None
        config.use_cache = False
        config._attn_implementation = "sdpa"
        self.model, self.sources, self.device = model, sources, device
        self.digests: dict[str, str] = {}
        self.decoder: Any = empty_decoder(
            config,
            directory,
            code="blocks.model-code",
            repair="models whose code travels with the checkpoint cannot be calibrated; --method rtn needs no code",
        )
        self._layers = list(self.decoder.layers)
        self._kinds = list(getattr(config, "layer_types", None) or [])
        self._norm_name = model.part(f.FINAL_NORM).name.removesuffix(SUFFIX).rpartition(".")[2]
        self.final_norm: nn.Module = self.decoder.get_submodule(self._norm_name)
        setattr(self.decoder, self._norm_name, nn.Identity())
        self.decoder.embed_tokens = None
        self.decoder.layers = nn.ModuleList()
        rebuild_buffers(self.decoder, device)
        self.decoder.eval()

    def tensor(self, part: Part) -> torch.Tensor:
        """Return a part of a canonical tensor in float32."""
        local = _rows(part)
        return to_torch(*self.sources.gather(local), local.shape).to(torch.float32).to(self.device)

    def _whole(self, part: Part) -> nn.Parameter:
        """Return a whole canonical tensor in float32, and note its digest."""
        items, dtype = self.sources.gather(whole(part))
        self.digests[part.name] = hashlib.sha256(np.ascontiguousarray(items).data).hexdigest()
        value = to_torch(items, dtype, whole(part).shape).to(torch.float32).to(self.device)
        return nn.Parameter(value, requires_grad=False)

    def embed(self, ids_BT: npt.NDArray[np.int32]) -> torch.Tensor:
        """Return [B, T, H] for token ids, reading only the rows of the embedding that occur."""
        ids, places = np.unique(ids_BT, return_inverse=True)
        whole_part = self.model.part(f.EMBEDDING)
        table = torch.empty(len(ids), whole_part.cols, device=self.device)
        # Neighbouring rows are read together.
        starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            rows = whole_part._replace(row=int(ids[start]), rows=int(end - start))
            table[start:end] = self.tensor(rows)
        return table[torch.from_numpy(places.reshape(ids_BT.shape)).to(self.device)]

    def load(self, index: int) -> Layer:
        """Return a layer with its weights. The layer that ran last is let go."""
        self.let_go()
        module = copy.deepcopy(self._layers[index])
        prefix = layer_prefix(self.model, index)
        tensors = layer_tensors(self.model, index)
        linears: dict[str, nn.Linear] = {}
        if self.model.dims.is_moe(index):
            self._split_experts(module, index, prefix, tensors, linears)
        experts = frozenset(linears)
        others: dict[str, nn.Parameter] = {}
        router = self.model.part(f.ROUTER, index).name if self.model.dims.is_moe(index) else ""
        for name in [name for name in tensors if name.rpartition(".")[0] not in linears]:
            path = name.removeprefix(prefix)
            if name == router:
                path = self.model.family.modules[f.ROUTER].format(layer=index).removeprefix(prefix)
            owner, _, leaf = path.rpartition(".")
            parent = module.get_submodule(owner)
            value = self._whole(tensors[name])
            setattr(parent, leaf, value)
            if isinstance(parent, nn.Linear) and name != router:
                linears[f"{prefix}{owner}"] = parent
            else:
                others[name] = value
        left = [name for name, tensor in module.named_parameters() if tensor.is_meta]
        if left:
            raise InputError(f"nothing is known about {', '.join(left[:3])} of this model", code="blocks.tensors")
        module.eval()
        return Layer(index, module, linears, others, experts)

    def let_go(self) -> None:
        """Hold the layer that ran last no longer."""
        self.decoder.layers = nn.ModuleList()

    def _split_experts(
        self, module: nn.Module, index: int, prefix: str, tensors: dict[str, Part], linears: dict[str, nn.Linear]
    ) -> None:
        """Put single linears in the place of transformers' fused experts."""
        made: dict[str, list[nn.Linear]] = {}
        for role in f.EXPERT_ROLES:
            made[role] = []
            for expert in range(self.model.dims.num_experts):
                name = self.model.part(role, index, expert).name
                linear = nn.Linear(0, 0, bias=False, device="meta")
                linear.weight = self._whole(tensors[name])
                made[role].append(linear)
                linears[name.removesuffix(SUFFIX)] = linear
        path = self.model.family.modules[f.EXPERT_UP].format(layer=index).removeprefix(prefix).rpartition(".")[0]
        parent, _, leaf = path.rpartition(".")
        fused: Any = module.get_submodule(path)
        experts = Experts(made[f.EXPERT_GATE], made[f.EXPERT_UP], made[f.EXPERT_DOWN], fused.act_fn)
        setattr(module.get_submodule(parent), leaf, experts)

    @torch.inference_mode()
    def run(self, layer: Layer, h_BTH: torch.Tensor, products: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the output of a layer for hidden states [B, T, H], each row a text of its own.

        `products` is the type that matrices are multiplied in; norms and sums stay float32.
        """
        self.decoder.layers = nn.ModuleList([layer.module])
        if self._kinds:
            self.decoder.config.layer_types = [self._kinds[layer.index]]
        with torch.autocast(self.device.type, products, enabled=products != torch.float32):
            found = self.decoder(inputs_embeds=h_BTH, use_cache=False, return_dict=True)
        return found.last_hidden_state  # type: ignore[no-any-return]

    def norm(self, h_TH: torch.Tensor) -> torch.Tensor:
        """Return hidden states [..., H] behind the final norm. The layer that ran last is let go."""
        self.let_go()
        self.final_norm.weight = nn.Parameter(self.tensor(self.model.part(f.FINAL_NORM)), requires_grad=False)
        with torch.inference_mode():
            return self.final_norm(h_TH)  # type: ignore[no-any-return]

    def head(self, num_rows: int) -> Iterator[torch.Tensor]:
        """Yield the rows of the head [V, H], so many at a time: the whole of it is often larger than a layer."""
        part = self.model.part(f.HEAD if self.model.has(f.HEAD) else f.EMBEDDING)
        for row in range(0, part.rows, num_rows):
            rows_VH = self.tensor(part._replace(row=row, rows=min(num_rows, part.rows - row)))
            if self.model.family.normalised_head:
                rows_VH /= rows_VH.norm(dim=1, keepdim=True)
            yield rows_VH


def _rows(part: Part) -> Local:
    """Return a band of rows of a canonical tensor, stored by itself."""
    if part.row:
        return Local(part.rows, part.cols, part.ndim, (Piece(part.name, part.row, 0, part.rows, part.cols, 0),))
    return whole(part)
