"""A cache layer whose heads have pages of their own: what is left of a layer after eviction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from . import _host, ops

Allocate = Callable[[Tensor, tuple[int, ...]], Tensor]  # of the dtype of the first argument


def empty_slots(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised, and in large pages where the system has them."""
    slots = like.new_empty(shape)
    if slots.device.type == "cpu":
        _host.advise_huge_pages(slots.data_ptr(), slots.nbytes)
    return slots


def zero_slots(allocate: Allocate, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Other allocators than :func:`empty_slots` give zeros as it is."""
    slots = allocate(like, shape)
    return slots.zero_() if allocate is empty_slots else slots


class PagedLayer(CacheLayerMixin):
    """Pages of one layer. Every head of every row has its own length and its own pages.

    Attributes:
        keys, values: [pages, 1, page_size, D].
        page_table: i32[B, Hkv, N]; -1 where a head has no page.
        lens: i32[B, Hkv], committed slots.
        allocate: where its slots come from.
    """

    is_initialized = True

    def __init__(
        self, keys: Tensor, values: Tensor, page_table: Tensor, lens: Tensor, allocate: Allocate = empty_slots
    ) -> None:
        super().__init__()
        self.allocate = allocate
        self.is_initialized = True
        self.keys, self.values, self.page_table, self.lens = keys, values, page_table, lens
        self._pending = 0
        self._free = sorted(set(range(len(keys))) - set(page_table.flatten().tolist()), reverse=True)

    @classmethod
    def from_slots(
        cls,
        keys: Tensor,
        values: Tensor,
        lens: Tensor,
        page_size: int,
        hole: tuple[np.ndarray, np.ndarray] | None = None,
        allocate: Allocate = empty_slots,
    ) -> PagedLayer:
        """The first ``lens[b, h]`` slots of contiguous caches [B, Hkv, S, D], copied, but for pages that lie wholly in
        the ``hole``, see :meth:`release`; S is a multiple of ``page_size``."""
        B, Hkv, S, _ = keys.shape
        table = torch.arange(B * Hkv * (S // page_size), dtype=torch.int32).view(B, Hkv, -1)
        pools = [cache.reshape(-1, 1, page_size, cache.shape[3]) for cache in (keys, values)]
        layer = cls(pools[0], pools[1], table, lens, allocate)
        if hole is not None:
            layer.release(*hole)
        return layer._packed()

    @classmethod
    def empty(cls, keys: Tensor, values: Tensor, shape: tuple[int, int], page_size: int) -> PagedLayer:
        """Without a slot, for ``shape`` (B, Hkv) and keys and values as wide as the given ones [.., .., .., D]."""
        pools = [like.new_empty(0, 1, page_size, like.shape[3]) for like in (keys, values)]
        lens = torch.zeros(shape, dtype=torch.int32)
        return cls(pools[0], pools[1], torch.empty(*lens.shape, 0, dtype=torch.int32), lens)

    @property
    def page_size(self) -> int:
        return self.keys.shape[2]

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return self.keys.nbytes + self.values.nbytes if self.allocate is empty_slots else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        at = self.lens + self._pending if self._pending else self.lens
        ops.append_kv(key_states, value_states, self.keys, self.values, at, self.page_table)
        return self.keys, self.values

    def reserve(self, new_tokens: int, pending: int = 0) -> None:
        """Gives every head the pages that its next tokens need."""
        self._pending = pending
        table = self.page_table.numpy()
        needed = -(-(self.lens.numpy() + pending + new_tokens) // self.page_size)
        if needed.max() > table.shape[2]:
            more = np.full((*table.shape[:2], int(needed.max()) - table.shape[2]), -1, np.int32)
            table = np.concatenate([table, more], axis=2)
        # Pages before the last used slot that are missing were given back on purpose.
        first = np.maximum(self.lens.numpy(), 0) // self.page_size
        columns = np.arange(table.shape[2])
        wanted = (columns < needed[..., None]) & (columns >= first[..., None]) & (table < 0)
        count = int(wanted.sum())
        if count > len(self._free):
            self._grow(count - len(self._free))
        table[wanted] = [self._free.pop() for _ in range(count)]
        self.page_table = torch.from_numpy(table)

    def commit(self, accepted: Tensor, num_accepted: Tensor) -> None:
        caches = [self.keys, self.values]
        self.lens = ops.commit_kv(caches, accepted, num_accepted, self.lens, self.page_table)

    def advance(self, counts: Tensor) -> None:
        self.lens = self.lens + counts[:, None]

    def evict(self, keep: Tensor, counts: Tensor) -> None:
        """Keeps the listed slots; pages behind the last one are given back. The pool keeps its size."""
        ops.evict_kv(self.keys, self.values, keep, counts, self.page_table)
        self.truncate(counts.expand(-1, self.lens.shape[1]).contiguous())

    def truncate(self, lens: Tensor) -> None:
        """Makes i32[B, Hkv] ``lens`` the committed slots, and gives back the pages behind."""
        self.lens = lens
        self._release(np.arange(self.page_table.shape[2]) >= -(-lens.numpy() // self.page_size)[..., None])

    def release(self, begin: np.ndarray, end: np.ndarray) -> None:
        """Gives back the pages that lie wholly in slots ``begin`` to ``end - 1``, each i32[B, Hkv]; lengths stay."""
        columns = np.arange(self.page_table.shape[2])
        first, last = -(-begin // self.page_size), end // self.page_size
        self._release((columns >= first[..., None]) & (columns < last[..., None]))

    def select_rows(self, rows: list[int]) -> None:
        index = torch.tensor(rows)
        self.page_table, self.lens = self.page_table[index], self.lens[index]
        packed = self._packed()
        self.keys, self.values, self.page_table, self._free = packed.keys, packed.values, packed.page_table, []

    def contiguous_keys(self) -> Tensor:
        """A copy of the keys [B, Hkv, S, D]; where a head has no page, another's."""
        return self.keys[self.page_table.clamp(min=0).long()].flatten(2, 4)

    def row(self, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Committed keys and values [n, D] of one head, copied; of a head that has all its pages."""
        n = int(self.lens[row, head])
        pages = self.page_table[row, head, : -(-n // self.page_size)].long()
        return self.keys[pages].flatten(0, 2)[:n], self.values[pages].flatten(0, 2)[:n]

    def get_seq_length(self) -> int:
        return int(self.lens.max())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise RuntimeError("a paged layer is made from one that holds something")

    def _release(self, where: np.ndarray) -> None:
        table = self.page_table.numpy()
        where = where & (table >= 0)
        self._free += table[where].tolist()
        table[where] = -1

    def _grow(self, pages: int) -> None:
        # An eighth more than needed: growth by single pages would copy the pool for every one.
        keys, values, old = self.keys, self.values, len(self.keys)
        pages = max(pages, old // 8)
        self.keys, self.values = (
            zero_slots(self.allocate, pool, (old + pages, *pool.shape[1:])) for pool in (keys, values)
        )
        self.keys[:old], self.values[:old] = keys, values
        self._free += range(old + pages - 1, old - 1, -1)

    def _packed(self) -> PagedLayer:
        """With pools of just the pages that hold committed slots."""
        table = self.page_table.numpy()
        used = (np.arange(table.shape[2]) < -(-self.lens.numpy() // self.page_size)[..., None]) & (table >= 0)
        kept = torch.from_numpy(table[used]).long()
        packed = np.full_like(table, -1)
        packed[used] = np.arange(len(kept))
        width = int(np.flatnonzero(used.any(axis=(0, 1))).max(initial=-1)) + 1
        packed = np.ascontiguousarray(packed[:, :, :width])
        keys, values = (
            torch.index_select(pool, 0, kept, out=self.allocate(pool, (len(kept), *pool.shape[1:])))
            for pool in (self.keys, self.values)
        )
        return PagedLayer(keys, values, torch.from_numpy(packed), self.lens, self.allocate)
