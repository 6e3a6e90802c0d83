"""What selecting policies share: which pages compete, which are recent, and where selecting pays."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import AttentionPlan, LayerCall
from ..cache import KVStore
from ..offload import MappedFiles, Offloaded
from .base import KVSession, check_layers


class SelectingOptions(Protocol):
    budget: int
    page_size: int
    sinks: int
    recent: int
    min_length: int | None


@dataclass(frozen=True)
class Round:
    """Of one forward.

    Attributes:
        plan: its plan.
        pays: some row is long enough to select for.
        whole: i32[B], pages full of committed slots; the same tensor as long as these numbers are.
        pages, competing: i32[B, T], pages that hold committed slots, and how many of them compete for each token.
    """

    plan: AttentionPlan
    pays: bool
    whole: Tensor
    pages: Tensor
    competing: Tensor


class SelectingSession(KVSession):
    """Attends to a part of the pages, chosen anew for every token; evicts nothing.

    A token at position p attends to its own last pages, from page ``(p - recent) // page_size`` on, and to a fixed
    number of pages before them. So what it sees depends on its position alone, and a node of a tree no deeper than
    ``recent`` finds every page that competes in the store already.
    """

    summary_dtype: torch.dtype | None = None  # None: the keys'

    def __init__(self, model: PreTrainedModel, store: KVStore, options: SelectingOptions) -> None:
        check_layers(model)
        super().__init__(model, store)
        self.options = options
        size = options.page_size
        self.recent_pages = -(-options.recent // size)
        self.budget_pages = max(1, -(-options.budget // size) - self.recent_pages - 1)
        self._round: Round | None = None
        self.offloaded: Offloaded | None = None

    def offload(self, directory: str | os.PathLike[str], layers: Iterable[int]) -> None:
        """Keeps layers in files."""
        self.offloaded = Offloaded(self.store, MappedFiles(directory), self.options.page_size)
        self.offloaded.move(layers)

    def select(self, call: LayerCall) -> tuple[Tensor, Tensor] | None:
        """Lists i32[B, T, Hs, K] and counts i32[B, T, Hs] of pages; None: everything."""
        raise NotImplementedError

    def attend(self, call: LayerCall) -> Tensor:
        if call.plan.prompt_ends is not None or call.window or not self.of_round(call).pays:
            return call.dense()[0]
        chosen = self.select(call)
        if chosen is None:
            return call.dense()[0]
        if self.offloaded is not None:
            call = self.offloaded.fetched(call, chosen, self.options.page_size)
        return call.sparse(*chosen, unit=self.options.page_size)

    def max_depth(self) -> Sequence[int]:
        return [self.recent_pages * self.options.page_size] * len(self.store.seq_lens)

    def keep(self, rows: Sequence[int]) -> None:
        if self.offloaded is not None:
            self.offloaded.select_rows()

    def close(self) -> None:
        if self.offloaded is not None:
            self.offloaded.close()

    def choose(self, call: LayerCall, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Pages for every token, from scores f32[B, T, Hs, N] of the committed ones."""
        here = self.of_round(call)
        sinks = -(-self.options.sinks // self.options.page_size)
        return ops.select_pages(scores, here.pages, here.competing, self.budget_pages, num_sinks=sinks)

    def of_round(self, call: LayerCall) -> Round:
        """What all layers of a forward have in common; lengths are those of the store, since nothing is evicted."""
        if self._round is None or self._round.plan is not call.plan:
            self._round = self._new_round(call)
        return self._round

    def _new_round(self, call: LayerCall) -> Round:
        size, positions, least = self.options.page_size, call.plan.positions, self.min_length(call)
        pages, whole = -(-call.plan.seq_lens // size), call.plan.seq_lens // size
        if self._round is not None and torch.equal(self._round.whole, whole):
            whole = self._round.whole
        competing = torch.where(positions < least, 0, positions // size - self.recent_pages)
        competing = torch.minimum(competing.clamp(min=0), whole[:, None])
        held = (self.budget_pages + self.recent_pages + 1) * size
        return Round(
            plan=call.plan,
            pays=int(positions.max()) >= max(held, least),
            whole=whole,
            pages=pages[:, None].expand_as(competing).contiguous(),
            competing=competing.int().contiguous(),
        )

    def min_length(self, call: LayerCall) -> int:
        if self.options.min_length is not None:
            return self.options.min_length
        _, Hq, _, D = call.query.shape
        of = self.options
        return break_even(Hq, call.keys.shape[1], D, call.query.dtype, of.page_size, of.budget, self.summary_dtype)


@cache
def break_even(
    Hq: int,
    Hkv: int,
    D: int,
    dtype: torch.dtype,
    page_size: int,
    budget: int,
    summary_dtype: torch.dtype | None = None,
) -> int:
    """Tokens from which selecting and attending to ``budget`` of them is faster than attending to all, for one token of
    one row on this machine: a multiple of the budget, or 2**31 - 1 if it is not up to 32 times the budget."""
    query = torch.randn(1, Hq, 1, D).to(dtype)
    for factor in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        S = factor * budget
        keys, values = (torch.randn(1, Hkv, S + page_size, D).to(dtype) for _ in range(2))
        lens, pages = torch.tensor([S], dtype=torch.int32), torch.tensor([S // page_size], dtype=torch.int32)
        summaries = torch.randn(1, Hkv, S // page_size, 2 * D).to(summary_dtype or dtype)

        sparse = partial(_select_and_attend, query, keys, values, lens, summaries, pages, page_size, budget)
        if _time_ratio(sparse, partial(ops.tree_attention, query, keys, values, lens)) < 1:
            return S
    return 2**31 - 1


def _select_and_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lens: Tensor,
    summaries: Tensor,
    pages: Tensor,
    page_size: int,
    budget: int,
) -> None:
    scores = ops.score_pages(query, summaries, pages, per_token=True)
    chosen = ops.select_pages(scores, pages[None], pages[None], budget // page_size)
    ops.sparse_attention(query, keys, values, lens, *chosen, unit=page_size)


def _time_ratio(first: Callable[[], Any], second: Callable[[], Any], repeats: int = 9) -> float:
    """Time of the first over that of the second, median of pairs."""
    ratios = []
    for _ in range(repeats):
        times = []
        for function in (first, second):
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)
