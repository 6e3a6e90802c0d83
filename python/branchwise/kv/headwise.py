"""Heads that see everything, and heads that see the first and the last tokens only (card rlkv)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall
from ..cache import KVStore
from .base import KVSession, check_layers, check_page_size, check_range


class HeadwiseKV:
    """The deployment of DuoAttention (Xiao et al. 2024, arXiv 2410.10819) and RLKV (Du et al. 2025, arXiv 2510.08525):
    a KV head keeps everything, or sinks and a recent window, by a table of gates that was learned before.

    The prompt is read with full attention in all heads. Then streaming heads give back the pages between sinks and
    window, and go on doing so; slots keep their true positions, and both kinds of heads run in one kernel launch, so
    weights are not permuted. Exact while a row has at most ``sinks + recent`` tokens, or without streaming heads. Holds
    ``2 D b (full heads * S + streaming heads * (sinks + recent))`` bytes per row, rounded up to whole pages per head.

    Args:
        gates: f32[layers, Hkv], larger for heads that need everything.
        sparsity: share of all heads, over all layers, that stream: those with the smallest gates.
        sinks, recent: tokens that a streaming head sees; the recent ones include the token itself.
        page_size: slots allocated together per head.
        seed: of the noise that breaks ties between equal gates.

    Raises:
        ValueError: an option outside its range; on use, gates of another shape, or a model whose layers share keys.
    """

    def __init__(
        self,
        gates: Tensor,
        sparsity: float = 0.5,
        sinks: int = 16,
        recent: int = 64,
        page_size: int = 16,
        seed: int = 0,
    ) -> None:
        check_range("sparsity", sparsity, 0, 1)
        check_range("sinks", sinks, 0)
        check_range("recent", recent, 1)
        check_page_size(page_size)
        self.gates, self.sparsity, self.sinks, self.recent = gates.float(), sparsity, sinks, recent
        self.page_size, self.seed = page_size, seed

    def full_heads(self) -> Tensor:
        """bool[layers, Hkv]: the heads that see everything."""
        noise = torch.rand(self.gates.shape, generator=torch.Generator().manual_seed(self.seed)) * 1e-6
        streaming = round(self.sparsity * self.gates.numel())
        full = torch.ones(self.gates.numel(), dtype=torch.bool)
        full[torch.argsort((self.gates + noise).flatten(), stable=True)[:streaming]] = False
        return full.view(self.gates.shape)

    def begin(self, model: PreTrainedModel, store: KVStore) -> HeadwiseSession:
        return HeadwiseSession(model, store, self)


class HeadwiseSession(KVSession):
    def __init__(self, model: PreTrainedModel, store: KVStore, options: HeadwiseKV) -> None:
        check_layers(model)
        super().__init__(model, store)
        config = model.config.get_text_config()
        shape = (config.num_hidden_layers, getattr(config, "num_key_value_heads", config.num_attention_heads))
        if tuple(options.gates.shape) != shape:
            raise ValueError(f"gates must have shape {shape} for this model, got {tuple(options.gates.shape)}")
        self.options = options
        self._full = options.full_heads()
        self._layers: set[int] = set()  # those that are paged

    def attend(self, call: LayerCall) -> Tensor:
        ends = call.plan.prompt_ends
        full = self._full[call.layer]
        if ends is not None or call.window or bool(full.all()):
            out = call.dense()[0]
            if ends is not None and call.plan.last_chunk and not call.window:
                self._make_pages(call, ends)
            return out
        sinks = torch.where(full, 0, self.options.sinks).int()
        recent = torch.where(full, ops.sparse.ALL, self.options.recent).int()
        return call.sparse(None, None, sink_sizes=sinks, recent_sizes=recent)

    def committed(self, nodes: Tensor, count: Tensor) -> None:
        for layer in self._layers:
            self._release(layer, self.store.layers[layer].lens)

    def _make_pages(self, call: LayerCall, ends: Tensor) -> None:
        lengths = (call.lens + ends)[:, None].expand(-1, len(self._full[call.layer])).contiguous()
        begin, end = self._unseen(call.layer, lengths)
        self.store.make_pages(call.layer, lengths, self.options.page_size, (begin, end))
        self._layers.add(call.layer)
        layer = self.store.layers[call.layer]
        layer.lens = layer.lens - ends[:, None]  # which the store's advance adds when the forward has ended

    def _release(self, layer: int, lens: Tensor) -> None:
        self.store.layers[layer].release(*self._unseen(layer, lens))

    def _unseen(self, layer: int, lens: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """First slots, and those behind the last, that no later token of a head sees; i32[B, Hkv] each."""
        begin = np.full(lens.shape, self.options.sinks, np.int32)
        end = np.where(self._full[layer].numpy(), 0, lens.numpy() - self.options.recent + 1)
        return begin, np.maximum(end, begin)
