"""KVTree: keys and values of texts that continue one another, each stored once (card shared-prefix-search)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from . import ops
from ._host import PagePool
from .cache import KVStore


class TreeLayer(CacheLayerMixin):
    """Pages of one layer, ``keys`` and ``values`` [pages, Hkv, page_size, D]; None until the first append."""

    def __init__(self, tree: KVTree) -> None:
        super().__init__()
        self.tree = tree

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_empty(0, states.shape[1], self.tree.page_size, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.grow()
        ops.append_kv(key_states, value_states, self.keys, self.values, self.tree.append_at, self.tree.shared_pages)
        return self.keys, self.values

    def grow(self) -> None:
        """Makes room for all pages that there are."""
        old, needed = len(self.keys), self.tree.pool.size
        if needed <= old:
            return
        # Half as many again: growing copies the pool. Small pages of the system, so that what is not used yet takes
        # none of its memory.
        for name in ("keys", "values"):
            pages = getattr(self, name)
            grown = pages.new_empty(needed + needed // 2, *pages.shape[1:])
            grown[:old] = pages
            setattr(self, name, grown)

    def get_seq_length(self) -> int:
        return self.tree.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0


class KVTree(KVStore):
    """KV storage of a tree of texts: what branches have in common is stored once, and read once per forward.

    A branch is a number. :meth:`fork` costs a list of page numbers; the keys and values are those of the parent, and a
    page that several branches hold is copied when one of them writes behind its end, one page per branch at most.
    Forwards (:class:`branchwise.forward.StoredModel`) run the branches named by :meth:`select`, one per row, and read
    shared pages once (:func:`branchwise.ops.cascade_attention`). Appending is a forward, as for any KVStore.

    In deterministic forwards of one token per row, a branch's logits are bit for bit the same whatever the other
    branches are; those of :class:`branchwise.decoding.branches.Branches` are. Not so for mixtures of experts, which
    batch the rows that chose an expert.

    Args:
        page_size: slots per page, a divisor of 256. Branches waste half a page each on average.

    Attributes:
        rows: branches of the next forward.
        shared_pages: i32[B, N], the page table of these rows.
        seq_lens, append_at: i32[B], as in :class:`KVStore`.

    Source: card shared-prefix-search ("KV tree"); pages with reference counts take the place of its segments.
    """

    def __init__(self, page_size: int = 8) -> None:
        super().__init__(1)
        if page_size < 1 or 256 % page_size:
            raise ValueError(f"page_size must divide 256, got {page_size}")
        self.pool = PagePool(page_size)
        self.page_size = page_size
        self.rows: list[int] = []
        self.select([])

    def root(self) -> int:
        """A new branch without a token."""
        return self.pool.root()

    def fork(self, branch: int, n: int = 1) -> list[int]:
        """``n`` new branches with the tokens of ``branch``, which stays."""
        return self.pool.fork(branch, n)

    def prune(self, branches: Sequence[int]) -> None:
        """Forgets branches; pages that no other holds can be used again. None of them may be in hand."""
        if held := sorted(set(branches) & set(self.rows)):
            raise ValueError(f"branches {held} are rows in hand; select others first")
        self.pool.prune(branches)

    def resample(self, branches: Sequence[int], ancestors: Sequence[int]) -> list[int]:
        """New branches, the i-th a fork of ``branches[ancestors[i]]``, in the place of the old ones."""
        if held := sorted(set(branches) & set(self.rows)):
            raise ValueError(f"branches {held} are rows in hand; select others first")
        return self.pool.resample(branches, ancestors)

    def truncate(self, branch: int, length: int) -> None:
        """Forgets the tokens of a branch from ``length`` on."""
        if length > self.length(branch):
            raise ValueError(f"length must be at most {self.length(branch)}, what the branch holds, got {length}")
        if branch in self.rows:
            raise ValueError(f"branch {branch} is a row in hand; select others first")
        self.pool.set_length(branch, length)

    def length(self, branch: int) -> int:
        """Committed tokens."""
        return self.pool.length(branch)

    def select(self, branches: Sequence[int]) -> None:
        """Makes these branches, each once, the rows of the next forwards."""
        if len(set(branches)) < len(branches):
            raise ValueError(f"branches must differ, got {list(branches)}")
        table, lengths = self.pool.page_table(branches)
        self.rows = list(branches)
        self.shared_pages = torch.from_numpy(table)
        self._note_lengths(torch.from_numpy(lengths))

    def export(self, branches: Sequence[int]) -> tuple[Tensor, Tensor]:
        """For kernels that know nothing of trees: page table i32[n, N], -1 behind a branch's pages, and i32[n]
        lengths. ``layers[i].keys`` and ``values`` hold the pages."""
        table, lengths = self.pool.page_table(branches)
        return torch.from_numpy(table), torch.from_numpy(lengths)

    def branch(self, layer: int, branch: int) -> tuple[Tensor, Tensor]:
        """Committed keys and values [Hkv, P, D] of one branch, copied."""
        table, lengths = self.export([branch])
        held = self.layers[layer]
        return tuple(
            cache[table[0].long()].transpose(0, 1).flatten(1, 2)[:, : int(lengths[0])]
            for cache in (held.keys, held.values)
        )

    def shrink(self) -> None:
        """Gives the memory of unused pages back to the system."""
        kept = torch.tensor(self.pool.compact(), dtype=torch.int64)
        for layer in self._initialized():
            layer.keys, layer.values = layer.keys[kept], layer.values[kept]
        self.select(self.rows)

    def layer(self, index: int) -> TreeLayer:
        while len(self.layers) <= index:
            self.layers.append(TreeLayer(self))
        return self.layers[index]

    def reserve(self, new_tokens: int, pending: int = 0, layers: Sequence[int] | None = None) -> None:
        copies = self.pool.reserve(self.rows, pending + new_tokens)
        source, to = (torch.tensor([copy[end] for copy in copies], dtype=torch.int64) for end in (0, 1))
        for layer in self._initialized():
            layer.grow()
            if copies:
                layer.keys[to], layer.values[to] = layer.keys[source], layer.values[source]
        self.shared_pages = torch.from_numpy(self.pool.page_table(self.rows)[0])
        self.append_at = self.seq_lens + pending if pending else self.seq_lens

    def commit(self, accepted: Tensor, num_accepted: Tensor) -> None:
        caches = [tensor for layer in self._initialized() for tensor in (layer.keys, layer.values)]
        self.set_lengths(ops.commit_kv(caches, accepted, num_accepted, self.seq_lens, self.shared_pages))

    def advance(self, counts: Tensor) -> None:
        self.set_lengths(self.seq_lens + counts)

    def set_lengths(self, seq_lens: Tensor) -> None:
        for branch, length in zip(self.rows, seq_lens.tolist(), strict=True):
            self.pool.set_length(branch, length)
        self._note_lengths(seq_lens)

    def select_rows(self, rows: list[int]) -> None:
        """Keeps only these rows in hand; the other branches stay in the tree."""
        self.select([self.rows[row] for row in rows])

    def clear(self) -> None:
        self.select([])
        self.pool.prune(self.pool.branches)
        self.layers.clear()
        self.pool.compact()

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a KVTree's pages belong to several branches: it has no rows to evict from, move or copy")

    evict = make_pages = move = start_empty = copy_rows = row = _refuse

    @property
    def num_pages(self) -> int:
        """That some branch holds."""
        return self.pool.size - self.pool.num_free

    @property
    def used_bytes(self) -> int:
        """Of the pages that some branch holds; ``num_bytes`` counts all that there is room for."""
        per_page = sum(2 * layer.keys.nbytes // max(len(layer.keys), 1) for layer in self._initialized())
        return self.num_pages * per_page

    def _note_lengths(self, seq_lens: Tensor) -> None:
        self.seq_lens = self.append_at = seq_lens
        self.max_length = int(seq_lens.max()) if len(seq_lens) else 0

    def _initialized(self) -> list[TreeLayer]:
        # Layers that share KV hold none.
        return [layer for layer in self.layers if layer.is_initialized]
