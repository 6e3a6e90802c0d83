"""StreamingLLM: the first tokens and the last ones (card kv-eviction-baselines)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall
from ..cache import KVStore
from .base import check_range
from .evicting import Keep, RollingSession, lens_of


class StreamingLLM:
    """Keeps the first ``sinks`` tokens and the last ``recent`` ones (Xiao et al. 2023, arXiv 2309.17453).

    As published, tokens count their positions within the cache. Only differences of positions matter to RoPE, so here
    the sinks are moved up to the recent tokens instead, from an unmoved copy of their keys: the same attention, and
    ``sinks`` keys to turn instead of all of them. Exact until the first eviction. Holds up to ``2 D b Hkv (sinks +
    recent + interval)`` bytes per layer and row.

    Args:
        sinks, recent: tokens.
        renumber: False leaves the sinks at their true positions.
        interval: positions between evictions while decoding; 1 as published, see
            :class:`branchwise.kv.evicting.RollingSession`.
        page_size: slots allocated together per head.

    Raises:
        ValueError: an option outside its range; on use, a model whose layers share keys or, with ``renumber``, whose
            rotary embedding changes with the length.
    """

    def __init__(
        self, sinks: int = 4, recent: int = 1020, renumber: bool = True, interval: int = 16, page_size: int = 16
    ) -> None:
        check_range("sinks", sinks, 0)
        check_range("recent", recent, 1)
        check_range("interval", interval, 1)
        self.sinks, self.recent, self.renumber = sinks, recent, renumber
        self.interval, self.page_size = interval, page_size

    def begin(self, model: PreTrainedModel, store: KVStore) -> StreamingLLMSession:
        return StreamingLLMSession(model, store, self)


class StreamingLLMSession(RollingSession):
    def __init__(self, model: PreTrainedModel, store: KVStore, options: StreamingLLM) -> None:
        super().__init__(model, store, 0, options.page_size, options.interval)
        self.options = options
        self._unmoved: dict[int, Tensor] = {}  # the sinks' keys [B, Hkv, sinks, D]
        self._positions = store.seq_lens  # i32[B], tokens so far, evicted ones included
        self._frequencies = inverse_frequencies(model) if options.renumber and options.sinks else None

    def keep_of_prompt(self, call: LayerCall, lengths: Tensor, queries: Tensor | None) -> Keep:
        self._remember(call.layer)
        self._positions = lengths
        return self._ends(lengths, torch.ones(len(lengths), dtype=torch.bool), call.keys.shape[1])

    def keep_of_rows(self, layer: int, due: Tensor) -> Keep:
        here = self.store.layers[layer]
        self._remember(layer)
        self._positions = self.store.seq_lens
        heads = here.keys.shape[1] if here.page_table is None else here.page_table.shape[1]
        return self._ends(lens_of(self.store, layer)[:, 0], due, heads)

    def evicted(self, layer: int, keep: Tensor, counts: Tensor) -> None:
        if self._frequencies is None:
            return
        here, lens = self.store.layers[layer], counts[:, 0]
        for slot in range(self.options.sinks):
            held = lens > slot
            pages = here.page_table[held][:, :, slot // here.page_size].long()
            here.keys[pages, 0, slot % here.page_size] = self._unmoved[layer][held, :, slot]
        ends = lens.clamp(max=self.options.sinks).contiguous()
        shift = (self._positions - lens).long()
        ops.rerotate_keys(here.keys, torch.zeros_like(ends), ends, shift, self._frequencies, here.page_table)

    def keep(self, rows: Sequence[int]) -> None:
        self._unmoved = {layer: keys[list(rows)] for layer, keys in self._unmoved.items()}

    def _remember(self, layer: int) -> None:
        here = self.store.layers[layer]
        if here.page_table is None and self._frequencies is not None:  # nothing was evicted so far
            self._unmoved[layer] = here.keys[:, :, : self.options.sinks].clone()

    def _ends(self, lengths: Tensor, due: Tensor, heads: int) -> Keep:
        sinks, recent = self.options.sinks, self.options.recent
        dropped = torch.where(due, lengths - sinks - recent, 0).clamp(min=0)[:, None]
        counts = lengths[:, None] - dropped
        keep = torch.arange(int(counts.max())).expand(len(lengths), -1)
        keep = keep + dropped * (keep >= sinks)
        keep = torch.where(torch.arange(keep.shape[1]) < counts, keep, -1).int()
        return keep[:, None].expand(-1, heads, -1).contiguous(), counts.int().expand(-1, heads).contiguous()


def inverse_frequencies(model: PreTrainedModel) -> Tensor:
    """f32[R / 2] of the rotary embedding of a model's layers with full attention.

    Raises:
        ValueError: it has none, several, or one that changes with the length.
    """
    found: list[Tensor] = []
    for module in model.modules():
        # Models with a rotary embedding per type of layer keep them side by side.
        for prefix in ("", "full_attention_"):
            frequencies: Any = getattr(module, f"{prefix}inv_freq", None)
            if isinstance(frequencies, Tensor):
                types: Any = getattr(module, "rope_type", "default")
                kind = types.get("full_attention") if isinstance(types, dict) else types
                if kind not in ("dynamic", "longrope"):
                    found.append(frequencies)
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has no single, fixed rotary embedding; its sinks cannot be moved: "
            "pass renumber=False"
        )
    return found[0].detach().float().contiguous()
