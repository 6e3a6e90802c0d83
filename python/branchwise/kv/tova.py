"""TOVA: keep what the last token attended to (card kv-eviction-baselines)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall
from ..cache import KVStore
from .base import check_budget, check_range, resolve_budget
from .evicting import Keep, RollingSession, lens_of, window_mass


class TOVA:
    """Keeps, per layer, the tokens that the last one attended to most, averaged over all heads (Oren et al. 2024, arXiv
    2401.06104). Nothing is kept for its own sake, not even the newest token.

    Exact while a row has at most ``budget`` tokens. Holds up to ``2 D b Hkv (budget + interval)`` bytes per layer and
    row.

    Args:
        budget: tokens kept, or a ratio of the prompt; one list for all heads of a layer.
        interval: positions between evictions while decoding; 1 as published, see
            :class:`branchwise.kv.evicting.RollingSession`.
        page_size: slots allocated together per head.

    Raises:
        ValueError: an option outside its range; on use, a model whose layers share keys.
    """

    def __init__(self, budget: int | float, interval: int = 16, page_size: int = 16) -> None:
        check_budget("budget", budget)
        check_range("interval", interval, 1)
        self.budget, self.interval, self.page_size = budget, interval, page_size

    def begin(self, model: PreTrainedModel, store: KVStore) -> TOVASession:
        return TOVASession(model, store, self)


class TOVASession(RollingSession):
    def __init__(self, model: PreTrainedModel, store: KVStore, options: TOVA) -> None:
        super().__init__(model, store, 1, options.page_size, options.interval)
        self.options = options
        self._budgets: Tensor | None = None
        self._round: dict[int, LayerCall] = {}
        self._last: Tensor | None = None  # i64[B], the last accepted node of each row

    def keep_of_prompt(self, call: LayerCall, lengths: Tensor, queries: Tensor | None) -> Keep:
        assert queries is not None
        self._budgets = resolve_budget(self.options.budget, lengths)
        return self._best(window_mass(call, lengths, queries), lengths, self._budgets)

    def verified(self, call: LayerCall, lse: Tensor) -> None:
        super().verified(call, lse)
        self._round[call.layer] = call

    def committed(self, nodes: Tensor, count: Tensor) -> None:
        self._last = nodes.gather(1, (count - 1).clamp(min=0)[:, None].long()).clamp(min=0)[:, 0].long()
        super().committed(nodes, count)
        self._round.clear()

    def keep_of_rows(self, layer: int, due: Tensor) -> Keep:
        assert self._last is not None and self._budgets is not None
        call = self._round[layer]
        index = self._last[:, None, None, None].expand(-1, call.query.shape[1], 1, call.query.shape[3])
        here = self.store.layers[layer]
        call.keys, call.page_table = here.keys, here.page_table
        lengths = lens_of(self.store, layer)[:, 0].contiguous()
        mass = window_mass(call, lengths, call.query.gather(2, index))
        return self._best(mass, lengths, torch.where(due, self._budgets, lengths.long()))

    def keep(self, rows: Sequence[int]) -> None:
        if self._budgets is not None:
            self._budgets = self._budgets[list(rows)]

    def _best(self, mass: Tensor, lengths: Tensor, budgets: Tensor) -> Keep:
        scores = mass.mean(1, keepdim=True)[:, None].contiguous()
        at = lengths[:, None].contiguous()
        indices, counts = ops.select_pages(scores, at, at, budgets[:, None, None].int().contiguous())
        heads = mass.shape[1]
        return indices[:, 0].expand(-1, heads, -1).contiguous(), counts[:, 0].expand(-1, heads).contiguous()
