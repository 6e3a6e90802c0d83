"""Reading a prompt with some of a model's layers only, and what its last token then asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall
from ..cache import KVStore
from ..forward import StoredModel
from ..layers import LayerSwitch, pass_through
from .base import KVSession, check_layers


class LayerwiseSession(KVSession):
    """A prompt runs through the layers in stages, and only chosen tokens go on from one to the next."""

    def __init__(self, model: PreTrainedModel, store: KVStore) -> None:
        check_layers(model)
        super().__init__(model, store)
        self._watched = -1  # layer whose last queries are wanted
        self._last: list[Tensor | None] = []  # per row, [Hq, D]

    def attend(self, call: LayerCall) -> Tensor:
        ends = call.plan.prompt_ends
        if call.layer == self._watched and ends is not None:
            for row, end in enumerate(ends.tolist()):
                if end > 0:
                    self._last[row] = call.query[row, :, end - 1]
        return call.dense()[0]

    def last_products(self, layer: int, lengths: Tensor) -> Tensor:
        """f32[B, S]: products of each row's last query with the layer's keys, summed over query heads, unscaled."""
        query = torch.stack([row for row in self._last if row is not None])[:, :, None]  # [B, Hq, 1, D]
        held = self.store.layers[layer]
        keys = held.keys if held.page_table is None else held.contiguous_keys()
        return ops.score_pages(query, keys, lengths, reduce="sum")[:, 0].sum(1)

    def read(self, target: StoredModel, prompts: Sequence[Tensor], layer: int) -> list[Tensor]:
        """Runs layers up to and with ``layer`` over whole prompts: hidden states [n_b, H] after it, per row."""
        self._watched, self._last = layer, [None] * len(prompts)
        states: list[list[Tensor]] = [[] for _ in prompts]
        switch = LayerSwitch(self.model, watch=frozenset({layer}))
        switch.replace = dict.fromkeys(range(layer + 1, len(switch.layers)), pass_through)

        def collect(ends: Tensor) -> None:
            for row, end in enumerate(ends.tolist()):
                states[row].append(switch.outputs[layer][row, :end])

        try:
            target.extend(prompts, after_chunk=collect)
        finally:
            switch.remove()
        return [torch.cat(row) for row in states]


def best_positions(scores: Tensor, lengths: Tensor, count: Tensor, kernel: int) -> list[Tensor]:
    """Ascending positions of the ``count[b]`` best of the first ``lengths[b]`` of f32[B, S] scores, smoothed first."""
    chosen = []
    for row, length, k in zip(scores, lengths.tolist(), count.tolist(), strict=True):
        smooth = row[None, None, :length]
        if kernel > 1:
            smooth = torch.nn.functional.avg_pool1d(smooth, kernel, stride=1, padding=kernel // 2)
        order = torch.sort(smooth[0, 0], descending=True, stable=True).indices
        chosen.append(order[: min(k, length)].sort().values)
    return chosen
