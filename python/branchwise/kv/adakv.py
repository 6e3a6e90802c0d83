"""Ada-KV: SnapKV whose heads share a layer's budget as they need it (card kv-eviction-baselines)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import LayerCall
from ..cache import KVStore
from .base import check_range
from .snapkv import SnapKV, SnapKVSession


class AdaKV(SnapKV):
    """SnapKV with a budget per layer instead of per head: heads whose attention is spread keep more (Feng et al. 2024,
    arXiv 2407.11550). Lengths differ from head to head, and so do the bytes held.

    Args:
        budget, window, kernel, pooling, page_size: of :class:`SnapKV`; the layer keeps ``Hkv * budget`` slots in all.
        safeguard: share of its even budget that every head keeps in any case; 1 is SnapKV.

    Raises:
        ValueError: as :class:`SnapKV`, or ``safeguard`` outside [0, 1].
    """

    def __init__(
        self,
        budget: int | float,
        window: int = 32,
        kernel: int = 5,
        pooling: Literal["avg", "max"] = "avg",
        page_size: int = 16,
        safeguard: float = 0.2,
    ) -> None:
        super().__init__(budget, window, kernel, pooling, page_size)
        check_range("safeguard", safeguard, 0, 1)
        self.safeguard = safeguard

    def begin(self, model: PreTrainedModel, store: KVStore) -> AdaKVSession:
        return AdaKVSession(model, store, self)


class AdaKVSession(SnapKVSession):
    options: AdaKV

    def budgets(self, call: LayerCall, scores: Tensor, before: Tensor, base: Tensor) -> Tensor:
        return torch.stack(
            [
                head_budgets(row[:, : int(n)], int(min(b, n)), self.options.safeguard)
                for row, n, b in zip(scores, before, base, strict=True)
            ]
        )


def head_budgets(scores: Tensor, base: int, safeguard: float) -> Tensor:
    """i64[Hkv] that add up to ``Hkv * base``, from f32[Hkv, n] scores: how many of the layer's best lie in each head,
    mixed with an even share. No head gets more than there is."""
    heads, length = scores.shape
    best = torch.topk(scores.flatten(), heads * base).indices // length
    mixed = torch.bincount(best, minlength=heads).double() * (1 - safeguard) + safeguard * base
    budgets = mixed.floor().long()
    # What rounding lost goes to the largest remainders, ties to the lower head.
    rest = heads * base - int(budgets.sum())
    budgets[torch.sort(mixed - budgets, descending=True, stable=True).indices[:rest]] += 1
    return budgets
