"""Attention of a forward's blocks as rows that name the same pages, so that a block's bits are its own."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..attention import LayerCall, pack_mask


class BlockRows:
    """A :class:`branchwise.attention.LayerPolicy` of block-causal models.

    The new tokens of a forward are blocks; each sees what is kept, some of the blocks before it and itself. Here every
    block is a row of :func:`branchwise.ops.cascade_attention`, over pages of the store's slots in the order of the
    text. A row of that op does not depend on the others, so a state is seen in a forward of many exactly as in one of
    its own, in any dtype; under one tree mask, its keys stand elsewhere and are summed in another order.

    Args:
        block: tokens per block.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._page_size = gcd(block, 64)  # what is kept ends with a block, and slots are multiples of 64
        self._mask = pack_mask(torch.ones(1, block, block, dtype=torch.bool))
        self._views: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # of a layer: its keys, and both caches as pages

    def plan(self, held: Sequence[int], sees: np.ndarray) -> None:
        """What the next forward's blocks see: tokens kept of every row, and bool[B, T, T] of the new ones."""
        self._held, self._seen = held, sees[:, :: self._block, :: self._block].tolist()
        lens = [
            kept + (sum(row) - 1) * self._block for kept, seen in zip(held, self._seen, strict=True) for row in seen
        ]
        self._lens = torch.tensor(lens, dtype=torch.int32)
        if len(self._mask) != len(lens):
            self._mask = self._mask[:1].repeat(len(lens), 1, 1)
        self._tables: dict[int, Tensor] = {}

    def before(self, tokens: Tensor, positions: Tensor) -> None:
        pass

    def attend(self, call: LayerCall) -> Tensor:
        B, Hq, T, D = call.query.shape
        query, many = call.query, self._block < T
        if many:
            query = query.transpose(1, 2).reshape(-1, self._block, Hq, D).transpose(1, 2)
        if call.layer not in self._views or self._views[call.layer][0] is not call.keys:
            self._views[call.layer] = (call.keys, self._as_pages(call.keys), self._as_pages(call.values))
        _, keys, values = self._views[call.layer]
        out, _ = ops.cascade_attention(
            query,
            keys,
            values,
            self._lens,
            self._table(call.keys.shape[1] * call.keys.shape[2]),
            self._mask,
            scale=call.scale,
            sinks=call.sinks,
            softcap=call.softcap,
        )
        # In memory as the model wants it, a token's heads side by side.
        return out.transpose(1, 2).reshape(B, T, Hq, D).transpose(1, 2) if many else out

    def _as_pages(self, cache: Tensor) -> Tensor:
        """[B, Hkv, S, D] as [pages, Hkv, page_size, D]; row b begins at page ``b * Hkv * S / page_size``."""
        (B, Hkv, S, D), size = cache.shape, self._page_size
        return cache.as_strided((((B - 1) * Hkv + 1) * S // size, Hkv, size, D), (size * D, S * D, D, 1))

    def _table(self, slots: int) -> Tensor:
        """i32[rows, N] of caches with so many slots per row, in all heads."""
        if slots in self._tables:
            return self._tables[slots]
        size, each = self._page_size, self._block // self._page_size
        table = np.zeros((len(self._lens), max(self._held) // size + len(self._seen[0]) * each), np.int32)
        row = 0
        for b, (kept, seen) in enumerate(zip(self._held, self._seen, strict=True)):
            begin, n = b * slots // size, kept // size
            table[row : row + len(seen), :n] = np.arange(begin, begin + n)
            for others in seen:
                own = [begin + n + i * each + j for i, sees in enumerate(others) if sees for j in range(each)]
                table[row, n : n + len(own)] = own
                row += 1
        return self._tables.setdefault(slots, torch.from_numpy(table))
