"""KVStore: keys and values of a batch in preallocated slots, as a transformers Cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import ops
from .devices import Mirror
from .pages import Allocate, PagedLayer, empty_slots, zero_slots

# What models call their cache, as an argument and in their output: transformers 5.24 renamed it.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

KVScales = Sequence[tuple[Tensor, Tensor]]  # per layer, f32[Hkv] of keys and of values

_SLOT_STEP = 64  # capacities are multiples of this


class KVLayer(CacheLayerMixin):
    """Slots of one layer: ``keys`` and ``values`` [B, Hkv, S, D]; None until the first append."""

    page_table = None
    allocate: Allocate = staticmethod(empty_slots)

    def __init__(self, store: KVStore, scales: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.store, self.scales = store, scales

    @property
    def lens(self) -> Tensor:
        """i32[B], committed slots."""
        return self.store.seq_lens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        S = self.store.capacity
        dtype = key_states.dtype if self.scales is None else torch.float8_e4m3fn
        self.keys, self.values = (
            zero_slots(self.allocate, states.new_empty(0, dtype=dtype), (*states.shape[:2], S, states.shape[3]))
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        append_at = self.store.append_mirror(self.store.append_at, key_states.device)
        key_scale, value_scale = self.scales or (None, None)
        ops.append_kv(
            key_states,
            value_states,
            self.keys,
            self.values,
            append_at,
            key_scale=key_scale,
            value_scale=value_scale,
        )
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.store.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized and self.allocate is empty_slots else 0


class KVStore(Cache):
    """KV storage whose rows have lengths of their own.

    ``append`` happens inside the model's forward, through :meth:`Cache.update`: new tokens go to the slots after
    ``seq_lens`` and stay uncommitted until :meth:`commit` keeps some of them. Call :meth:`reserve` before a forward.

    Attributes:
        seq_lens: i32[B], committed tokens, on the host; positions count from here. Layers that tokens were evicted from
            (:meth:`evict`) hold fewer, see their ``lens``.
        append_at: i32[B], the slot of the next append, on the host.
        lens_mirror, append_mirror: these two on the device of a layer.

    Args:
        batch_size: rows, B.
        capacity: slots per row to allocate at first.
        scales: of a store in float8_e4m3fn, a byte per value: what the values of each layer and KV head are divided by
            before they are rounded (:func:`branchwise.measure_kv_scales`). None: a store in the model's dtype.

    Raises:
        ValueError: batch_size or capacity below 1; in a forward: fewer ``scales`` than layers.
    """

    shared_pages: Tensor | None = None  # i32[B, N], the page table of all layers where rows have pages in common

    def __init__(self, batch_size: int, capacity: int = _SLOT_STEP, scales: KVScales | None = None) -> None:
        if batch_size < 1 or capacity < 1:
            raise ValueError(f"batch_size and capacity must be at least 1, got {batch_size} and {capacity}")
        super().__init__(layer_class_to_replicate=KVLayer)
        self.capacity = _round_up(capacity)
        self.scales = scales
        self.seq_lens = self.append_at = torch.zeros(batch_size, dtype=torch.int32)
        self.max_length = self._pending = 0  # max(seq_lens)
        self.lens_mirror, self.append_mirror = Mirror(), Mirror()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Writes the new tokens; returns the whole slots [B, Hkv, S, D] or pages, not a copy."""
        return self.layer(layer_idx).update(key_states, value_states)

    def layer(self, index: int) -> KVLayer | PagedLayer:
        if self.scales is not None and index >= len(self.scales):
            raise ValueError(f"scales must have factors of every layer, got {len(self.scales)} and layer {index}")
        while len(self.layers) <= index:
            self.layers.append(KVLayer(self, None if self.scales is None else self.scales[len(self.layers)]))
        return self.layers[index]

    def reserve(self, new_tokens: int, pending: int = 0, layers: Sequence[int] | None = None) -> None:
        """Makes room for ``new_tokens`` more in every row; grows by half at least, so appends stay cheap.

        ``pending``: uncommitted tokens of earlier appends that stay, and behind which the new ones go. ``layers``:
        those that are appended to, all of them paged; None: all.
        """
        needed = self.max_length + pending + new_tokens
        self.append_at = self.seq_lens + pending if pending else self.seq_lens
        self._pending = pending
        for layer in self._paged() if layers is None else [self.layers[index] for index in layers]:
            layer.reserve(new_tokens, pending)
        if needed <= self.capacity or layers is not None:
            return
        self.capacity = _round_up(max(needed, self.capacity * 3 // 2))
        for layer in self._contiguous():
            layer.keys, layer.values = self._grown(layer, layer.keys), self._grown(layer, layer.values)

    def commit(self, accepted: Tensor, num_accepted: Tensor) -> None:
        """Keeps the accepted nodes of the last append and forgets the rest; see :func:`branchwise.ops.commit_kv`."""
        caches = self.caches()
        for layer in self._paged():
            layer.commit(accepted, num_accepted)
        if caches:
            device = caches[0].device
            lens = self.lens_mirror(self.seq_lens, device)
            ops.commit_kv(caches, accepted.to(device), num_accepted.to(device), lens)
        self.set_lengths(self.seq_lens + num_accepted)

    def advance(self, counts: Tensor) -> None:
        """Keeps the first ``counts[b]`` (i32[B]) new tokens of each row as they lie: a prompt, or an accepted chain."""
        for layer in self._paged():
            layer.advance(counts)
        self.set_lengths(self.seq_lens + counts)

    def evict(self, layer: int, keep: Tensor, counts: Tensor, page_size: int = 16) -> None:
        """Keeps some slots of a layer and frees the memory of the others.

        Args:
            layer: index of the layer, which is paged from now on.
            keep, counts: as :func:`branchwise.ops.evict_kv` takes them; slots behind the kept ones are lost, so call it
                between forwards, or within one with slots that the forward appended.
            page_size: slots that are allocated together, per head; a divisor of 64.
        """
        old = self.layers[layer]
        if isinstance(old, PagedLayer):
            old.evict(keep, counts)
            return
        ops.evict_kv(old.keys, old.values, keep, counts)
        lens = counts.expand(-1, old.keys.shape[1]).contiguous()
        self.layers[layer] = PagedLayer.from_slots(old.keys, old.values, lens, page_size, allocate=old.allocate)

    def make_pages(self, layer: int, lens: Tensor, page_size: int, hole: tuple[np.ndarray, np.ndarray]) -> None:
        """Gives the heads of a layer pages of their own for slots below i32[B, Hkv] ``lens``, and frees the rest.

        ``hole``: first slot and the one behind the last, i32[B, Hkv] each, of what a head does not need; whole pages in
        between are freed, and the other slots stay where they are.
        """
        old = self.layers[layer]
        self.layers[layer] = PagedLayer.from_slots(old.keys, old.values, lens, page_size, hole, old.allocate)

    def move(self, layer: int, allocate: Allocate) -> None:
        """Gives a layer of contiguous slots memory of another kind, now and for what it is given later."""
        moved = self.layer(layer)
        assert isinstance(moved, KVLayer)
        moved.allocate = allocate
        if moved.is_initialized:
            moved.keys, moved.values = self._grown(moved, moved.keys), self._grown(moved, moved.values)

    def start_empty(self, layers: Sequence[int], page_size: int) -> None:
        """Makes layers that hold nothing yet fill up on their own, whatever the others hold. Layer 0 holds something,
        and is as wide as they are."""
        like = self.layers[0]
        shape = (len(self.seq_lens), like.keys.shape[1] if like.page_table is None else like.page_table.shape[1])
        self.layer(max(layers))
        for index in layers:
            self.layers[index] = PagedLayer.empty(like.keys, like.values, shape, page_size)

    def clear(self) -> None:
        """Forgets everything and frees it."""
        self.layers.clear()
        self.capacity = _SLOT_STEP
        self.set_lengths(torch.zeros_like(self.seq_lens))

    def select_rows(self, rows: list[int]) -> None:
        """Keeps only these rows, in this order."""
        index = torch.tensor(rows)
        for layer in self._contiguous():
            layer.keys, layer.values = (self._rows(layer, cache, index) for cache in (layer.keys, layer.values))
        for layer in self._paged():
            layer.select_rows(rows)
        self.set_lengths(self.seq_lens[index])

    def copy_rows(self, rows: list[int]) -> KVStore:
        """Another store with these rows, each as often as it is named; of contiguous layers."""
        index = torch.tensor(rows)
        other = KVStore(len(rows), self.capacity, self.scales)
        for i, layer in enumerate(self._contiguous()):
            copy = other.layer(i)
            copy.keys, copy.values = (as_bytes(cache)[index].view(cache.dtype) for cache in (layer.keys, layer.values))
            copy.is_initialized = True
        other.set_lengths(self.seq_lens[index])
        return other

    def caches(self) -> list[Tensor]:
        """Keys and values of all contiguous layers, for :func:`branchwise.ops.commit_kv`."""
        return [cache for layer in self._contiguous() for cache in (layer.keys, layer.values)]

    def row(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Committed keys and values [Hkv, P, D] of one row, as views; of a layer without evicted tokens."""
        P = int(self.seq_lens[row])
        return self.layers[layer].keys[row, :, :P], self.layers[layer].values[row, :, :P]

    @property
    def num_bytes(self) -> int:
        """Bytes that all slots, used or not, hold in memory."""
        return sum(layer.num_bytes for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.max_length + query_length, 0

    def _contiguous(self) -> list[Any]:
        # Layers that share KV hold none.
        return [layer for layer in self.layers if isinstance(layer, KVLayer) and layer.is_initialized]

    def _paged(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    def _rows(self, layer: KVLayer, old: Tensor, index: Tensor) -> Tensor:
        new = layer.allocate(old, (len(index), *old.shape[1:]))
        torch.index_select(as_bytes(old), 0, index.to(old.device), out=as_bytes(new))
        return new

    def _grown(self, layer: KVLayer, old: Tensor) -> Tensor:
        new = zero_slots(layer.allocate, old, (*old.shape[:2], self.capacity, old.shape[3]))
        used = self.max_length + self._pending
        new[:, :, :used] = old[:, :, :used]
        return new

    def set_lengths(self, seq_lens: Tensor) -> None:
        """Makes i32[B] ``seq_lens`` the committed tokens: fewer to forget some, others where layers differ."""
        self.seq_lens = self.append_at = seq_lens
        self.max_length = int(seq_lens.max())
        self._pending = 0


def as_bytes(cache: Tensor) -> Tensor:
    """For torch's ops that lack e4m3: a cache in it as bytes, others as they are."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _round_up(slots: int) -> int:
    return -(-slots // _SLOT_STEP) * _SLOT_STEP
