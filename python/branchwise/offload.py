"""Keys and values that lie in a file: where they live, and the pages of them that are in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import ops
from .attention import LayerCall
from .cache import KVStore


@dataclass(frozen=True)
class MappedFiles:
    """Allocates tensors in files that are mapped into memory and have no name, so nothing is left behind.

    The system reads and writes them as it needs to, and may drop what it has written: they need disk, not memory.

    Args:
        directory: on the disk to use. Not one that lives in memory itself, as ``/tmp`` does on some systems.
    """

    directory: str | os.PathLike[str]

    def __post_init__(self) -> None:
        if not Path(self.directory).is_dir():
            raise ValueError(f"offload must be a directory, got {str(self.directory)!r}")

    def __call__(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Zeros of the dtype of ``like``."""
        count = torch.Size(shape).numel()
        if count == 0:
            return like.new_empty(shape)
        handle, path = tempfile.mkstemp(suffix=".kv", dir=self.directory)
        try:
            # A full disk is an error here, and would be the end of the process at the first write.
            os.posix_fallocate(handle, 0, count * like.element_size())
            return torch.from_file(path, shared=True, size=count, dtype=like.dtype).view(shape)
        finally:
            os.close(handle)
            os.unlink(path)


class PageCache:
    """The pages of a layer that are in memory, per row and head: those that the last lists named."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.copied_bytes = 0  # from the file, so far
        self.clear()

    def clear(self) -> None:
        """Forgets everything: rows have gone."""
        self._keys = self._values = self._table = self._owners = torch.empty(0)

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def fetch(self, call: LayerCall, lists: tuple[Tensor, Tensor], unit: int, ahead: bool = False) -> None:
        """Brings in what the lists name and the new tokens; ``ahead`` of the forward, only the complete pages."""
        B = len(call.lens)
        Hkv = call.keys.shape[1] if call.page_table is None else call.page_table.shape[1]
        lens, new = call.lens, call.query.shape[2]
        capacity = call.keys.shape[2] if call.page_table is None else call.page_table.shape[2] * call.keys.shape[2]
        later = 0
        if ahead:
            later = -(-new // self.page_size) + 1
            lens, new = lens // self.page_size * self.page_size, 0
        self._widen(B, Hkv, -(-capacity // self.page_size), call)
        while True:
            needed, copied = ops.fetch_slots(
                call.keys,
                call.values,
                call.page_table,
                *lists,
                unit,
                lens,
                new,
                self._keys,
                self._values,
                self._table,
                self._owners,
            )
            most, held = int(needed.max()) + later, self._owners.shape[2]
            if most <= held:
                break
            self._make(B, Hkv, most if held == 1 else most + most // 8, call)
        page_bytes = self.page_size * (self._keys.shape[3] + self._values.shape[3]) * self._keys.element_size()
        self.copied_bytes += int(copied.sum()) * page_bytes

    def view(self, call: LayerCall) -> LayerCall:
        """The same layer, read from memory."""
        return replace(call, keys=self._keys, values=self._values, page_table=self._table)

    def _make(self, B: int, Hkv: int, slots: int, call: LayerCall) -> None:
        """Room for ``slots`` pages per head, empty."""
        self._keys, self._values = (
            like.new_zeros(B * Hkv * slots, 1, self.page_size, like.shape[3]) for like in (call.keys, call.values)
        )
        self._owners = torch.full((B, Hkv, slots), -1, dtype=torch.int32)
        self._table = torch.full((B, Hkv, self._table.shape[2]), -1, dtype=torch.int32)

    def _widen(self, B: int, Hkv: int, pages: int, call: LayerCall) -> None:
        """A table for so many pages of the source."""
        if self._table.dim() == 3 and self._table.shape[2] >= pages:
            return
        table = torch.full((B, Hkv, pages), -1, dtype=torch.int32)
        if self._table.dim() == 3:
            table[:, :, : self._table.shape[2]] = self._table
        self._table = table
        if self._owners.dim() == 1:
            self._make(B, Hkv, 1, call)


def _fetch(cache: PageCache, call: LayerCall, lists: tuple[Tensor, Tensor], unit: int, inference: bool) -> None:
    with torch.inference_mode(inference):  # modes belong to threads
        cache.fetch(call, lists, unit, ahead=True)


class Offloaded:
    """The layers of a store that lie in files, and their pages in memory.

    Args:
        store: of a batch.
        files: where.
        page_size: tokens that are fetched together.
    """

    def __init__(self, store: KVStore, files: MappedFiles, page_size: int) -> None:
        self.store, self.files, self.page_size = store, files, page_size
        self.caches: dict[int, PageCache] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._fetches: dict[int, Future[None]] = {}

    def move(self, layers: Iterable[int]) -> None:
        """Moves layers to files, now and for all they are given later."""
        for layer in layers:
            if layer not in self.caches:
                self.store.move(layer, self.files)
                self.caches[layer] = PageCache(self.page_size)

    def prefetch(self, call: LayerCall, lists: tuple[Tensor, Tensor], unit: int) -> None:
        """Begins to fetch for this layer and those behind it, all with the same lists, while the caller goes on.

        Where the model's own threads take all cores, a thread more would slow them down by more than it saves, and
        every layer fetches when its turn comes.
        """
        if torch.get_num_threads() >= len(os.sched_getaffinity(0)):
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="branchwise-fetch")
        inference = torch.is_inference_mode_enabled()
        for index in sorted(layer for layer in self.caches if layer >= call.layer):
            layer = self.store.layers[index]
            there = replace(call, layer=index, keys=layer.keys, values=layer.values, page_table=layer.page_table)
            self._fetches[index] = self._thread.submit(_fetch, self.caches[index], there, lists, unit, inference)

    def fetched(self, call: LayerCall, lists: tuple[Tensor, Tensor], unit: int) -> LayerCall:
        """The layer with what the lists name in memory; a layer that is in memory as it is."""
        cache = self.caches.get(call.layer)
        if cache is None:
            return call
        ahead = self._fetches.pop(call.layer, None)
        if ahead is not None:
            ahead.result()
        cache.fetch(call, lists, unit)
        return cache.view(call)

    def select_rows(self) -> None:
        """Rows have gone."""
        self.wait()
        for cache in self.caches.values():
            cache.clear()

    def wait(self) -> None:
        """Until nothing is being fetched; a forward may have ended before its last layer."""
        for fetch in self._fetches.values():
            fetch.cancel()
            if not fetch.cancelled():
                fetch.result()
        self._fetches.clear()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    @property
    def num_bytes(self) -> int:
        """Bytes of the pages in memory."""
        return sum(cache.num_bytes for cache in self.caches.values())

    @property
    def copied_bytes(self) -> int:
        """Bytes fetched so far."""
        return sum(cache.copied_bytes for cache in self.caches.values())
