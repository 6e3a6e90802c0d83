"""What evicting policies share: windows of queries over a prompt's chunks, and eviction at fixed positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall
from ..cache import KVStore
from .base import KVSession, check_layers, check_page_size

Keep = tuple[Tensor, Tensor]  # slots i32[B, Hs, K] and counts i32[B, Hs], as evict_kv takes them


class EvictingSession(KVSession):
    """Evicts when a prompt has been read, layer by layer, right after the layer's attention over its last tokens.

    Layers with a window of their own (sliding attention) are left alone. Subclasses say what to keep.

    Args:
        window: queries of the prompt's last tokens that :meth:`keep_of_prompt` wants; 0: none.
        page_size: slots allocated together, per head.
    """

    def __init__(self, model: PreTrainedModel, store: KVStore, window: int, page_size: int) -> None:
        check_layers(model)
        check_page_size(page_size)
        super().__init__(model, store)
        self.window, self.page_size = window, page_size
        self._queries: dict[int, list[Tensor]] = {}  # of a prompt so far, the last of each row, [Hq, <= window, D]

    def keep_of_prompt(self, call: LayerCall, lengths: Tensor, queries: Tensor | None) -> Keep | None:
        """What a layer keeps of prompts of i32[B] ``lengths``; None: everything.

        ``queries``: [B, Hq, W, D] of each row's last W tokens; rows shorter than W have garbage in front.
        """
        return None

    def prompt_chunk(self, call: LayerCall, lse: Tensor, ends: Tensor) -> None:
        """A layer has attended to a chunk of which ``ends[b]`` tokens are row b's own."""

    def attend(self, call: LayerCall) -> Tensor:
        out, lse = call.dense()
        ends = call.plan.prompt_ends
        if call.window or (ends is not None and call.page_table is not None):
            return out  # not a layer to evict from, or evicted from already
        if ends is None:
            self.verified(call, lse)
            return out
        if self.window:
            self._collect(call, ends)
        self.prompt_chunk(call, lse, ends)
        if call.plan.last_chunk:
            lengths = call.lens + ends
            kept = self.keep_of_prompt(call, lengths, self._window_of(call))
            if kept is not None and bool((kept[1] < lengths[:, None]).any()):
                self.store.evict(call.layer, *kept, page_size=self.page_size)
                self.evicted(call.layer, *kept)
                layer = self.store.layers[call.layer]
                layer.lens = layer.lens - ends[:, None]  # which the store's advance adds when the forward has ended
        return out

    def verified(self, call: LayerCall, lse: Tensor) -> None:
        """A layer has attended to the tokens of a round."""

    def evicted(self, layer: int, keep: Tensor, counts: Tensor) -> None:
        """A layer has just dropped all but these slots."""

    def _collect(self, call: LayerCall, ends: Tensor) -> None:
        new = [query[:, : int(end)] for query, end in zip(call.query, ends, strict=True)]
        old = self._queries.get(call.layer)
        both = new if old is None else [torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)]
        self._queries[call.layer] = [query[:, -self.window :] for query in both]

    def _window_of(self, call: LayerCall) -> Tensor | None:
        if not self.window:
            return None
        rows = self._queries.pop(call.layer)
        W = max(row.shape[1] for row in rows)
        return torch.stack([torch.nn.functional.pad(row, (0, 0, W - row.shape[1], 0)) for row in rows])


class RollingSession(EvictingSession):
    """Evicts again while decoding, whenever a row's position passes a multiple of ``interval``.

    The published methods evict after every token, interval 1. Evicting at fixed positions instead costs ``interval``
    more slots per head, moves slots once per interval, and lets trees grow up to the next multiple.
    """

    def __init__(self, model: PreTrainedModel, store: KVStore, window: int, page_size: int, interval: int) -> None:
        super().__init__(model, store, window, page_size)
        self.interval = interval
        self._layers: set[int] = set()  # those that may evict

    def keep_of_rows(self, layer: int, due: Tensor) -> Keep:
        """What a layer keeps of the rows that are bool[B] ``due``; others keep everything."""
        raise NotImplementedError

    def verified(self, call: LayerCall, lse: Tensor) -> None:
        self._layers.add(call.layer)

    def max_depth(self) -> Sequence[int]:
        left = self.interval - self.store.seq_lens % self.interval
        return (left - 1).tolist()

    def committed(self, nodes: Tensor, count: Tensor) -> None:
        due = (count > 0) & (self.store.seq_lens % self.interval == 0)
        if not bool(due.any()):
            return
        for layer in sorted(self._layers):
            keep, counts = self.keep_of_rows(layer, due)
            if bool((counts < lens_of(self.store, layer)).any()):
                self.store.evict(layer, keep, counts, self.page_size)
                self.evicted(layer, keep, counts)


def lens_of(store: KVStore, layer: int) -> Tensor:
    """i32[B, 1 or Hkv], committed slots of a layer."""
    lens = store.layers[layer].lens
    return lens[:, None] if lens.dim() == 1 else lens


def window_mass(
    call: LayerCall, lengths: Tensor, queries: Tensor, reduce: str = "sum", weights: Tensor | None = None
) -> Tensor:
    """:func:`branchwise.ops.attention_mass` of each row's last W queries, f32[B, Hkv, S].

    Rows shorter than W leave the queries they do not have out. ``weights``: f32[B, W] factors of the queries.
    """
    W = queries.shape[2]
    before = lengths - W
    own = (torch.arange(W) >= -before[:, None]).float()
    weights = (own if weights is None else own * weights).contiguous()
    mass = ops.attention_mass(
        queries,
        call.keys,
        before.clamp(min=0),
        weights=weights,
        page_table=call.page_table,
        reduce=reduce,
        scale=call.scale,
        softcap=call.softcap,
    )
    return mass[:, 0]
