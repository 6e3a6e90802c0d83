"""A KV store whose slots stay where they are from call to call, as CUDA graphs need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .cache import KVLayer, KVScales, KVStore, as_bytes


class StaticStore(KVStore):
    """Rows that leave are squeezed out in place, and a later call finds the slots where this one left them.

    Args:
        batch_size: rows at most, ``most_rows``.
        capacity: slots per row; more than that moves everything.
        scales: as :class:`KVStore` takes them.
    """

    def __init__(self, batch_size: int, capacity: int, scales: KVScales | None = None) -> None:
        super().__init__(batch_size, capacity, scales)
        self.most_rows = batch_size

    def begin(self, batch_size: int) -> None:
        """Forgets everything; the first so many rows are in use from now on."""
        for layer in self._contiguous():
            layer.keys, layer.values = (
                cache.as_strided((batch_size, *cache.shape[1:]), cache.stride()) for cache in (layer.keys, layer.values)
            )
        self.set_lengths(torch.zeros(batch_size, dtype=torch.int32))

    @contextmanager
    def lengths_on_device(self, seq_lens: Tensor) -> Iterator[None]:
        """Inside, forwards read i32[B] lengths from here, as a graph does; the host's are not looked at."""
        host, self.seq_lens = self.seq_lens, seq_lens
        try:
            yield
        finally:
            self.seq_lens = self.append_at = host

    def _rows(self, layer: KVLayer, old: Tensor, index: Tensor) -> Tensor:
        kept = old[: len(index)]
        as_bytes(kept).copy_(as_bytes(old).index_select(0, index.to(old.device)))
        return kept

    def _grown(self, layer: KVLayer, old: Tensor) -> Tensor:
        rows = len(old)
        return super()._grown(layer, old.as_strided((self.most_rows, *old.shape[1:]), old.stride()))[:rows]
