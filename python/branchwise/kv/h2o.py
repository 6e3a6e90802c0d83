"""H2O: keep the heavy hitters, the tokens that gathered most attention so far, and the recent ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall
from ..cache import KVStore
from .base import check_budget, check_range, resolve_budget
from .evicting import Keep, RollingSession, lens_of


class H2O:
    """Keeps, per KV head, the tokens with the largest sums of attention over all queries so far, and the recent ones
    (Zhang et al. 2023, arXiv 2306.14048; card kv-eviction-baselines).

    The sums of the whole prompt's causal matrix are computed without the matrix, from the log-sum-exp that attention
    leaves: one more product of queries with keys during the prompt. Exact while a row has at most ``budget`` tokens.
    Holds up to ``2 D b Hkv (budget + interval)`` bytes per layer and row, and one float per slot for the sums.

    Args:
        budget: tokens kept per head, or a ratio of the prompt.
        recent: how many of them are the newest ones; None: half.
        interval: positions between evictions while decoding; 1 as published, see
            :class:`branchwise.kv.evicting.RollingSession`.
        page_size: slots allocated together per head.

    Raises:
        ValueError: an option outside its range; on use, a model whose layers share keys.

    Keys keep their positions (the paper's standard variant). Sums run over the query heads of a KV head.
    """

    def __init__(self, budget: int | float, recent: int | None = None, interval: int = 16, page_size: int = 16) -> None:
        check_budget("budget", budget)
        check_range("interval", interval, 1)
        if recent is not None:
            check_range("recent", recent, 0, None if isinstance(budget, float) else budget)
        self.budget, self.recent, self.interval, self.page_size = budget, recent, interval, page_size

    def begin(self, model: PreTrainedModel, store: KVStore) -> H2OSession:
        return H2OSession(model, store, self)


class H2OSession(RollingSession):
    """``sums[layer]``: f32[B, Hkv, >= slots], attention that each slot gathered."""

    def __init__(self, model: PreTrainedModel, store: KVStore, options: H2O) -> None:
        super().__init__(model, store, 0, options.page_size, options.interval)
        self.options = options
        self.sums: dict[int, Tensor] = {}
        self._budgets: Tensor | None = None  # i64[B], once the prompt's length is known
        self._round: dict[int, tuple[LayerCall, Tensor]] = {}

    def prompt_chunk(self, call: LayerCall, lse: Tensor, ends: Tensor) -> None:
        weights = (torch.arange(call.query.shape[2]) < ends[:, None]).float().contiguous()
        self._add(call, call.query, call.lens, lse, weights)

    def keep_of_prompt(self, call: LayerCall, lengths: Tensor, queries: Tensor | None) -> Keep:
        self._budgets = resolve_budget(self.options.budget, lengths)
        return self._best(call.layer, lengths, torch.ones(len(lengths), dtype=torch.bool))

    def verified(self, call: LayerCall, lse: Tensor) -> None:
        super().verified(call, lse)
        self._round[call.layer] = call, lse

    def committed(self, nodes: Tensor, count: Tensor) -> None:
        A = max(int(count.max()), 1)
        path = nodes[:, :A].clamp(min=0).long()
        weights = (torch.arange(A) < count[:, None]).float().contiguous()
        for call, lse in self._round.values():
            Hq, D = call.query.shape[1], call.query.shape[3]
            index = path[:, None].expand(-1, Hq, -1)
            query = call.query.gather(2, index[..., None].expand(-1, -1, -1, D))
            layer = self.store.layers[call.layer]
            call.keys, call.page_table = layer.keys, layer.page_table
            before = layer.lens - (count if layer.lens.dim() == 1 else count[:, None])
            self._add(call, query, before, lse.gather(2, index), weights)
        self._round.clear()
        super().committed(nodes, count)

    def keep_of_rows(self, layer: int, due: Tensor) -> Keep:
        return self._best(layer, lens_of(self.store, layer)[:, 0].contiguous(), due)

    def evicted(self, layer: int, keep: Tensor, counts: Tensor) -> None:
        sums = self.sums[layer].gather(2, keep.clamp(min=0).long())
        self.sums[layer] = sums * (torch.arange(keep.shape[2]) < counts[..., None])

    def keep(self, rows: Sequence[int]) -> None:
        self.sums = {layer: sums[list(rows)] for layer, sums in self.sums.items()}
        if self._budgets is not None:
            self._budgets = self._budgets[list(rows)]

    def _best(self, layer: int, lengths: Tensor, due: Tensor) -> Keep:
        assert self._budgets is not None
        recent = self._budgets // 2
        if self.options.recent is not None:
            recent = self._budgets.clamp(max=self.options.recent)
        scored = torch.where(due, (lengths - recent).clamp(min=0), 0).int()
        sums = self.sums[layer]
        budgets = (self._budgets - recent)[:, None, None].expand(-1, 1, sums.shape[1]).int().contiguous()
        indices, counts = ops.select_pages(sums[:, None].contiguous(), lengths[:, None], scored[:, None], budgets)
        return indices[:, 0].contiguous(), counts[:, 0].contiguous()

    def _add(self, call: LayerCall, query: Tensor, before: Tensor, lse: Tensor, weights: Tensor) -> None:
        mass = ops.attention_mass(
            query,
            call.keys,
            before,
            lse=lse.contiguous(),
            weights=weights,
            page_table=call.page_table,
            scale=call.scale,
            softcap=call.softcap,
        )[:, 0]
        old = self.sums.get(call.layer)
        if old is not None:
            old = old[..., : mass.shape[2]]
            mass[..., : old.shape[2]] += old
        self.sums[call.layer] = mass
