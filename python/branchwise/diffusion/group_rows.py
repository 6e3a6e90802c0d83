"""Attention of a forward's states as rows that name the same pages, so that a state's bits are its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..attention import LayerCall, pack_mask
from .window import Window


class GroupRows:
    """A :class:`branchwise.attention.LayerPolicy` for one forward, over these windows of its rows.

    Nodes come in groups that see each other, what is kept and some of the groups before them. Here every group is a row
    of :func:`branchwise.ops.cascade_attention`, over pages of the store's slots in the order of the text. A row of that
    op does not depend on the others, so a state is seen in a forward of many exactly as in one of its own, in any
    dtype; under one tree mask, its keys stand elsewhere and are summed in another order. Nor does the work grow with
    what states do not see.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        widths = sorted({window.width for window in windows})
        self._calls = [
            _Call(width, [b for b, w in enumerate(windows) if w.width == width], windows) for width in widths
        ]

    def before(self, tokens: Tensor, positions: Tensor) -> None:
        pass

    def attend(self, call: LayerCall) -> Tensor:
        if len(self._calls) == 1 and self._calls[0].tokens == call.query.shape[2]:
            return self._attend(self._calls[0], call, call.query)
        out = torch.zeros_like(call.query)
        for part in self._calls:
            out[part.rows, :, : part.tokens] = self._attend(part, call, call.query[part.rows, :, : part.tokens])
        return out

    def _attend(self, part: _Call, call: LayerCall, query: Tensor) -> Tensor:
        """out [len(part.rows), Hq, part.tokens, D]."""
        B, Hq, T, D = query.shape
        if part.width < T:
            query = query.transpose(1, 2).reshape(-1, part.width, Hq, D).transpose(1, 2)
        keys, values = _as_pages(call.keys, part.page_size), _as_pages(call.values, part.page_size)
        table = part.table(call.keys.shape[1] * call.keys.shape[2])
        out, _ = ops.cascade_attention(
            query, keys, values, part.lens, table, part.mask, scale=call.scale, sinks=call.sinks, softcap=call.softcap
        )
        # In memory as the model wants it, a token's heads side by side.
        return out.transpose(1, 2).reshape(B, T, Hq, D).transpose(1, 2) if part.width < T else out


class _Call:
    """Of the windows whose groups are ``width`` nodes; where a row has fewer groups than others, some are idle."""

    def __init__(self, width: int, rows: list[int], windows: Sequence[Window]) -> None:
        self.rows, self.width = rows, width
        self._seen = [windows[b].sees.tolist() for b in rows]
        self._held = [windows[b].held for b in rows]
        self._groups = max(map(len, self._seen))
        self.tokens = self._groups * width
        self.page_size = gcd(width, 64, *self._held)  # capacities are multiples of 64
        lens = []
        for held, seen in zip(self._held, self._seen, strict=True):
            lens += [held + (sum(others) - 1) * width for others in seen] + [0] * (self._groups - len(seen))
        self.lens = torch.tensor(lens, dtype=torch.int32)
        mask = _each_other(width)
        self.mask = mask if len(lens) == 1 else mask.repeat(len(lens), 1, 1)
        self._tables: dict[int, Tensor] = {}

    def table(self, slots: int) -> Tensor:
        """i32[rows * groups, N] of caches with so many slots per row, in all heads."""
        if slots in self._tables:
            return self._tables[slots]
        size, each = self.page_size, self.width // self.page_size
        table = np.zeros((len(self.rows), self._groups, max(self._held) // size + self._groups * each), np.int32)
        for row, b in enumerate(self.rows):
            begin, kept = b * slots // size, self._held[row] // size
            table[row, :, :kept] = np.arange(begin, begin + kept)
            for i, others in enumerate(self._seen[row]):
                first = begin + kept + np.flatnonzero(others) * each
                table[row, i, kept : kept + len(first) * each] = (first[:, None] + np.arange(each)).ravel()
        return self._tables.setdefault(slots, torch.from_numpy(table.reshape(len(self.lens), -1)))


def _as_pages(cache: Tensor, size: int) -> Tensor:
    """[B, Hkv, S, D] as [pages, Hkv, size, D]; row b begins at page ``b * Hkv * S / size``."""
    B, Hkv, S, D = cache.shape
    return cache.as_strided((((B - 1) * Hkv + 1) * S // size, Hkv, size, D), (size * D, S * D, D, 1))


@lru_cache(8)
def _each_other(width: int) -> Tensor:
    return pack_mask(torch.ones(1, width, width, dtype=torch.bool))
