"""How many layers must leave memory: SpeContext's memory model (card specontext)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of a batch's keys and values when some layers lie in files and the others in memory.

    The paper's model counts weights and a buffer for repeated heads, too; weights are there already when decoding
    begins, and the kernels read KV heads in place.

    Attributes:
        layers, rows, kv_heads, head_dim: of the model and the batch.
        item_bytes: of one value, 2 for bfloat16.
        budget: tokens per KV head that a layer in a file has in memory.
        head_bytes: of the retrieval head, per token of every row.
    """

    layers: int
    rows: int
    kv_heads: int
    head_dim: int
    item_bytes: int
    budget: int
    head_bytes: int = 0

    @property
    def token_bytes(self) -> int:
        """Keys and values of one layer and one token of every row."""
        return 2 * self.rows * self.kv_heads * self.head_dim * self.item_bytes

    def needed(self, slots: int, offloaded: int) -> int:
        """Bytes for ``slots`` tokens per row with so many layers in files."""
        held = (self.layers - offloaded) * slots + offloaded * self.budget
        return self.token_bytes * held + self.rows * self.head_bytes * slots

    def thresholds(self, memory: int) -> list[int]:
        """Most tokens per row that fit ``memory`` bytes with 0, 1, .. all layers in files; negative: none."""
        return [
            (memory - i * self.budget * self.token_bytes)
            // ((self.layers - i) * self.token_bytes + self.rows * self.head_bytes or 1)
            for i in range(self.layers + 1)
        ]

    def offloaded(self, slots: int, memory: int) -> int:
        """Fewest layers in files with which ``slots`` tokens per row fit; all where none suffices."""
        return next((i for i in range(self.layers) if self.needed(slots, i) <= memory), self.layers)
