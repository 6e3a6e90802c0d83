"""Quest: attend to the pages whose keys may matter most to this query (card quest-pages)."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall
from ..cache import KVStore
from ..pages import empty_slots
from .base import check_range, full_layers
from .selecting import SelectingSession


class Quest:
    """Attends, per KV head and query, to the pages with the largest bound of query-key products (Tang et al. 2024,
    arXiv 2406.10774), the first ones and the recent ones.

    Nothing is evicted: it saves reading, not memory. Summaries of pages (largest and smallest value per channel) take
    ``1 / page_size`` of the keys' and values' bytes more, as e4m3 half of that (fp32: a quarter); a step reads them and
    ``budget`` tokens instead of all S. Exact while a row has at most ``budget`` tokens, and below ``min_length``.

    Args:
        budget: tokens attended to per KV head, recent ones included; rounded up to pages.
        page_size: slots per page.
        dense_layers: the first layers attend to everything.
        sinks: first tokens that are always attended to.
        recent: newest tokens that are always attended to, rounded up to pages; trees grow no deeper than this.
        min_length: attend to everything below so many tokens; None measures, once per shape, where selecting pays.
        summary_dtype: ``torch.float8_e4m3fn`` for summaries of a byte per value, read in half the time. They suit keys
            of ordinary size: from 2**-6 to 448, and without a bias that is much larger than their differences. None:
            the keys' dtype.
        offload: directory for files that keep the layers behind the dense ones, of which then only what a step attends
            to is in memory, as for :class:`branchwise.kv.SpeContext`; None: everything stays in memory.

    Raises:
        ValueError: an option outside its range; on use, a model whose layers share keys.

    One list per KV head, by the largest score of its query heads; the original has lists per query head, and reads
    pages up to G times.
    """

    def __init__(
        self,
        budget: int = 1024,
        page_size: int = 16,
        dense_layers: int = 2,
        sinks: int = 0,
        recent: int = 32,
        min_length: int | None = None,
        summary_dtype: torch.dtype | None = None,
        offload: str | os.PathLike[str] | None = None,
    ) -> None:
        check_range("page_size", page_size, 1)
        check_range("dense_layers", dense_layers, 0)
        check_range("sinks", sinks, 0)
        check_range("recent", recent, 0)
        check_range("budget", budget, recent + 2 * page_size)
        self.budget, self.page_size, self.dense_layers = budget, page_size, dense_layers
        if summary_dtype not in (None, torch.float8_e4m3fn):
            raise ValueError(f"summary_dtype must be None or torch.float8_e4m3fn, got {summary_dtype}")
        self.sinks, self.recent, self.min_length = sinks, recent, min_length
        self.summary_dtype, self.offload = summary_dtype, offload

    def begin(self, model: PreTrainedModel, store: KVStore) -> QuestSession:
        return QuestSession(model, store, self)


class QuestSession(SelectingSession):
    options: Quest

    def __init__(self, model: PreTrainedModel, store: KVStore, options: Quest) -> None:
        super().__init__(model, store, options)
        self.summary_dtype = options.summary_dtype
        self._summaries: dict[int, Tensor] = {}  # [B, Hkv, pages, 2 D]
        self._summarised: dict[int, Tensor] = {}  # i32[B], pages of each row that they cover
        if options.offload is not None:
            self.offload(options.offload, full_layers(model) - set(range(options.dense_layers)))

    @property
    def num_bytes(self) -> int:
        """Bytes of the summaries, and of what is in memory of layers in files."""
        pages = 0 if self.offloaded is None else self.offloaded.num_bytes
        return pages + sum(tensor.nbytes for tensor in self._summaries.values())

    def select(self, call: LayerCall) -> tuple[Tensor, Tensor] | None:
        if call.layer < self.options.dense_layers:
            return None
        summaries = self._summarise(call)
        scores = ops.score_pages(call.query, summaries, self.of_round(call).whole, per_token=True)
        return self.choose(call, scores)

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        for tensors in (self._summaries, self._summarised):
            for layer in tensors:
                tensors[layer] = tensors[layer][list(rows)]

    def _summarise(self, call: LayerCall) -> Tensor:
        """Brings a layer's summaries up to its last whole page; younger ones do not compete."""
        size, whole = self.options.page_size, self.of_round(call).whole
        B, Hkv, capacity, D = call.keys.shape
        pages = -(-capacity // size)
        old = self._summaries.get(call.layer)
        if old is None or old.shape[2] < pages:
            like = call.keys.new_empty(0, dtype=self.summary_dtype)
            new = empty_slots(like, (B, Hkv, pages, 2 * D)).zero_()
            if old is None:
                self._summarised[call.layer] = torch.zeros_like(whole)
            else:
                new[:, :, : old.shape[2]] = old
            self._summaries[call.layer] = new
        summaries, done = self._summaries[call.layer], self._summarised[call.layer]
        if done is not whole:
            ops.page_summaries(call.keys, done * size, whole * size, summaries, size)
            self._summarised[call.layer] = whole
        return summaries
