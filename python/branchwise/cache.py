"""KVStore: keys and values of a batch in preallocated slots, as a transformers Cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from . import ops

_SLOT_STEP = 64  # capacities are multiples of this


class KVLayer(CacheLayerMixin):
    """Slots of one layer: ``keys`` and ``values`` [B, Hkv, S, D]; None until the first append."""

    def __init__(self) -> None:
        super().__init__()
        self.store: KVStore | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        assert self.store is not None
        S = self.store.capacity
        self.keys, self.values = (
            states.new_zeros(*states.shape[:2], S, states.shape[3]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.store is not None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        ops.append_kv(key_states, value_states, self.keys, self.values, self.store.append_at)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.store.max_length if self.store is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class KVStore(Cache):
    """KV storage whose rows have lengths of their own.

    ``append`` happens inside the model's forward, through :meth:`Cache.update`: new tokens go to the slots after
    ``seq_lens`` and stay uncommitted until :meth:`commit` keeps some of them. Call :meth:`reserve` before a forward.

    Attributes:
        seq_lens: i32[B], committed tokens.
        append_at: i32[B], the slot of the next append.

    Args:
        batch_size: rows, B.
        capacity: slots per row to allocate at first.
    """

    def __init__(self, batch_size: int, capacity: int = _SLOT_STEP) -> None:
        if batch_size < 1 or capacity < 1:
            raise ValueError(f"batch_size and capacity must be at least 1, got {batch_size} and {capacity}")
        super().__init__(layer_class_to_replicate=KVLayer)
        self.capacity = _round_up(capacity)
        self.seq_lens = self.append_at = torch.zeros(batch_size, dtype=torch.int32)
        self.max_length = self._pending = 0  # max(seq_lens), kept on the host

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Writes the new tokens; returns the whole slots [B, Hkv, S, D], not a copy."""
        while len(self.layers) <= layer_idx:
            layer = KVLayer()
            layer.store = self
            self.layers.append(layer)
        return self.layers[layer_idx].update(key_states, value_states)

    def reserve(self, new_tokens: int, pending: int = 0) -> None:
        """Makes room for ``new_tokens`` more in every row; grows by half at least, so appends stay cheap.

        ``pending``: uncommitted tokens of earlier appends that stay, and behind which the new ones go.
        """
        needed = self.max_length + pending + new_tokens
        self.append_at = self.seq_lens + pending if pending else self.seq_lens
        self._pending = pending
        if needed <= self.capacity:
            return
        self.capacity = _round_up(max(needed, self.capacity * 3 // 2))
        for layer in self._used_layers():
            layer.keys, layer.values = self._grown(layer.keys), self._grown(layer.values)

    def commit(self, accepted: Tensor, num_accepted: Tensor) -> None:
        """Keeps the accepted nodes of the last append and forgets the rest; see :func:`branchwise.ops.commit_kv`."""
        caches = [tensor for layer in self._used_layers() for tensor in (layer.keys, layer.values)]
        self.set_lengths(ops.commit_kv(caches, accepted, num_accepted, self.seq_lens))

    def advance(self, counts: Tensor) -> None:
        """Keeps the first ``counts[b]`` (i32[B]) new tokens of each row as they lie: a prompt, or an accepted chain."""
        self.set_lengths(self.seq_lens + counts)

    def select_rows(self, rows: list[int]) -> None:
        """Keeps only these rows, in this order."""
        index = torch.tensor(rows)
        for layer in self._used_layers():
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        self.set_lengths(self.seq_lens[index])

    def row(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Committed keys and values [Hkv, P, D] of one row, as views."""
        P = int(self.seq_lens[row])
        return self.layers[layer].keys[row, :, :P], self.layers[layer].values[row, :, :P]

    @property
    def num_bytes(self) -> int:
        """Bytes held by all slots, used or not."""
        return sum(t.nbytes for layer in self._used_layers() for t in (layer.keys, layer.values))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.max_length + query_length, 0

    def _used_layers(self) -> list[Any]:
        return [layer for layer in self.layers if layer.is_initialized]  # layers that share KV hold none

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros(*old.shape[:2], self.capacity, old.shape[3])
        used = self.max_length + self._pending
        new[:, :, :used] = old[:, :, :used]
        return new

    def set_lengths(self, seq_lens: Tensor) -> None:
        """Makes i32[B] ``seq_lens`` the committed tokens: fewer to forget some, others where layers differ."""
        self.seq_lens = self.append_at = seq_lens
        self.max_length = int(seq_lens.max())
        self._pending = 0


def _round_up(slots: int) -> int:
    return -(-slots // _SLOT_STEP) * _SLOT_STEP
