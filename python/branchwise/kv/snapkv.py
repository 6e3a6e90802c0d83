"""SnapKV: after the prompt, keep what its last tokens attended to (card kv-eviction-baselines)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall
from ..cache import KVStore
from .base import check_budget, check_range, resolve_budget
from .evicting import EvictingSession, Keep, window_mass


class SnapKV:
    """Keeps, per KV head, the prompt tokens that the prompt's last ones attended to most, and those last ones (Li et
    al. 2024, arXiv 2404.14469).

    Evicts once, after the prompt; tokens generated later are all kept, at their true positions. Exact while
    ``budget >= `` prompt length. Holds ``2 D b Hkv budget`` bytes per layer and row after the prompt, rounded up to
    whole pages per head, instead of ``2 D b Hkv S``; the scores cost one more pass of W queries over the keys.

    Args:
        budget: tokens kept per head, or a ratio of the prompt; windows count.
        window: last tokens whose attention counts, W, which are kept themselves.
        kernel: odd width of the pooling over positions.
        pooling: "avg" or "max".
        page_size: slots allocated together per head.

    Raises:
        ValueError: an option outside its range; on use, a model whose layers share keys.

    Attention is reduced to KV heads by the mean over their query heads; the original keeps slots per query head, which
    takes G times the memory.
    """

    def __init__(
        self,
        budget: int | float,
        window: int = 32,
        kernel: int = 5,
        pooling: Literal["avg", "max"] = "avg",
        page_size: int = 16,
    ) -> None:
        check_range("window", window, 1)
        check_budget("budget", budget, window + 1)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {kernel}")
        if pooling not in ("avg", "max"):
            raise ValueError(f"pooling must be 'avg' or 'max', got {pooling!r}")
        self.budget, self.window, self.kernel, self.pooling, self.page_size = budget, window, kernel, pooling, page_size

    def begin(self, model: PreTrainedModel, store: KVStore) -> SnapKVSession:
        return SnapKVSession(model, store, self)


class SnapKVSession(EvictingSession):
    def __init__(self, model: PreTrainedModel, store: KVStore, options: SnapKV) -> None:
        super().__init__(model, store, options.window, options.page_size)
        self.options = options

    def keep_of_prompt(self, call: LayerCall, lengths: Tensor, queries: Tensor | None) -> Keep | None:
        assert queries is not None
        kept = torch.minimum(resolve_budget(self.options.budget, lengths), lengths.long())  # [B]
        if bool((kept == lengths).all()):
            return None
        W = queries.shape[2]
        before = (lengths - W).clamp(min=0)
        scores = self.scores(call, lengths, queries)
        budgets = self.budgets(call, scores, before, (kept - W).clamp(min=0))
        budgets = torch.where((kept == lengths)[:, None], before[:, None].long(), budgets)  # short rows keep all
        indices, counts = ops.select_pages(
            scores[:, None].contiguous(), lengths[:, None], before[:, None], budgets[:, None].int().contiguous()
        )
        return indices[:, 0].contiguous(), counts[:, 0].contiguous()

    def scores(self, call: LayerCall, lengths: Tensor, queries: Tensor) -> Tensor:
        """f32[B, Hkv, S] of the slots before the window."""
        group = queries.shape[1] // call.keys.shape[1]
        mass = window_mass(call, lengths, queries) / (group * queries.shape[2])
        mass *= torch.arange(mass.shape[2]) < (lengths - queries.shape[2])[:, None, None]
        return pool(mass, self.options.kernel, self.options.pooling)

    def budgets(self, call: LayerCall, scores: Tensor, before: Tensor, base: Tensor) -> Tensor:
        """i64[B, Hkv], how many of i32[B] ``before`` slots each head keeps, given i64[B] ``base``."""
        return torch.minimum(base, before)[:, None].expand(-1, scores.shape[1])


def pool(scores: Tensor, kernel: int, pooling: str) -> Tensor:
    """Smooths f32[B, H, S] over positions."""
    function = torch.nn.functional.avg_pool1d if pooling == "avg" else torch.nn.functional.max_pool1d
    return function(scores, kernel, stride=1, padding=kernel // 2)
