"""SentenceKV: attend to the sentences that match the one being written (card sentencekv)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall
from ..cache import KVStore
from ..offload import MappedFiles, Offloaded
from ..pages import empty_slots
from ..tree import RowTree, TokenTree
from .base import check_range, full_layers
from .evicting import EvictingSession, Keep, window_mass
from .snapkv import pool

_MARKS = (".", "!", "?", "。", "！", "？", "\n\n")
_CLOSERS = "\"'”’)]} "


class SentenceKV:
    """Keeps ``factor * budget`` of the prompt's tokens per KV head, and attends to ``budget`` of all that is held:
    sinks, recent ones, and the sentences whose mean key matches the mean query of the sentence being written (Zhu et
    al. 2025, arXiv 2504.00970).

    What the prompt keeps is chosen as in SnapKV, with largest-of pooling. A sentence that is being written is always
    seen whole, and its first tokens see everything that is held. Exact while the prompt fits ``factor * budget`` and
    the text fits ``budget``. Holds ``2 D b Hkv (factor * budget + generated)`` bytes per layer and row and a mean key
    per sentence; with ``offload`` these lie in files, and only the pages of what a step attends to are in memory. Trees
    are cut behind the end of a sentence.

    Args:
        marks: ids of the tokens that end a sentence, see :func:`sentence_marks`.
        budget: tokens attended to per KV head, beside an open sentence that is longer than ``recent``.
        factor: how many times the budget the prompt keeps.
        sinks, recent: first and newest tokens that are always attended to.
        window: last tokens of the prompt whose attention says what it keeps.
        longest: tokens after which a sentence ends without a mark.
        kernel: odd width of the pooling over positions.
        page_size: slots allocated and fetched together per head.
        offload: directory for files that keep the layers, as for :class:`branchwise.kv.SpeContext`; None: everything
            stays in memory. The first tokens of a sentence see everything, and fetch it.

    Raises:
        ValueError: an option outside its range; on use, a model whose layers share keys.
    """

    def __init__(
        self,
        marks: Iterable[int],
        budget: int = 1024,
        factor: float = 3.0,
        sinks: int = 32,
        recent: int = 32,
        window: int = 32,
        longest: int = 256,
        kernel: int = 7,
        page_size: int = 16,
        offload: str | os.PathLike[str] | None = None,
    ) -> None:
        check_range("sinks", sinks, 0)
        check_range("recent", recent, 1)
        check_range("budget", budget, sinks + recent + 1)
        check_range("factor", factor, 1)
        check_range("window", window, 1, int(factor * budget) - 1)
        check_range("longest", longest, 1)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {kernel}")
        self.marks = frozenset(marks)
        self.budget, self.kept, self.sinks, self.recent = budget, int(factor * budget), sinks, recent
        self.window, self.longest, self.kernel, self.page_size = window, longest, kernel, page_size
        self.offload = offload

    def begin(self, model: PreTrainedModel, store: KVStore) -> SentenceKVSession:
        return SentenceKVSession(model, store, self)


def sentence_marks(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens whose text ends a sentence: . ! ? or their CJK forms, perhaps closed off, or a blank line."""
    ids = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if text.endswith("\n\n") or text.rstrip(_CLOSERS).endswith(_MARKS):
            ids.append(token)
    return frozenset(ids)


class SentenceKVSession(EvictingSession):
    """Sentences of a row are the same in all layers and heads; which slots they still have is not."""

    def __init__(self, model: PreTrainedModel, store: KVStore, options: SentenceKV) -> None:
        super().__init__(model, store, options.window, options.page_size)
        self.options = options
        self.marks = np.array(sorted(options.marks), np.int64)
        self.cuts: list[list[int]] = []  # of each row, positions where its closed sentences begin, and end
        self._offsets: dict[int, Tensor] = {}  # by layer, i32[B, Hkv, S + 1]: the same cuts in slots
        self._means: dict[int, Tensor] = {}  # [B, Hkv, S, D]
        self._summarised: dict[int, Tensor] = {}  # i32[B], sentences of each row that they cover
        self._sums: dict[int, Tensor] = {}  # f32[B, Hkv, D], queries of the open sentence so far
        self._round: dict[int, Tensor] = {}  # f32[B, Hkv, T, D], of this round's nodes
        self._tree: TokenTree | None = None
        self.offloaded: Offloaded | None = None
        if options.offload is not None:
            self.offloaded = Offloaded(store, MappedFiles(options.offload), options.page_size)
            self.offloaded.move(full_layers(model))

    @property
    def num_bytes(self) -> int:
        """Bytes of the means, and of what is in memory of layers in files."""
        pages = 0 if self.offloaded is None else self.offloaded.num_bytes
        return pages + sum(tensor.nbytes for tensor in self._means.values())

    # Reading the prompt

    def prefill(self, target: Any, prompts: Sequence[Tensor]) -> Tensor:
        self.cuts = [self._cut(prompt.numpy()) for prompt in prompts]
        return target.extend(prompts)

    def _cut(self, tokens: np.ndarray) -> list[int]:
        cuts = [0]
        ends = set((np.flatnonzero(np.isin(tokens, self.marks)) + 1).tolist())
        for position in range(1, len(tokens) + 1):
            if position in ends or position - cuts[-1] == self.options.longest or position == len(tokens):
                cuts.append(position)
        return cuts

    def keep_of_prompt(self, call: LayerCall, lengths: Tensor, queries: Tensor | None) -> Keep:
        assert queries is not None
        W = queries.shape[2]
        mass = window_mass(call, lengths, queries)
        before = (lengths - W).clamp(min=0)
        mass *= torch.arange(mass.shape[2]) < before[:, None, None]
        scores = pool(mass, self.options.kernel, "max")[:, None].contiguous()
        budget = (lengths.clamp(max=self.options.kept) - W).clamp(min=0)
        budgets = budget[:, None, None].expand(-1, 1, scores.shape[2]).int().contiguous()
        indices, counts = ops.select_pages(scores, lengths[:, None], before[:, None], budgets)
        kept, counts = indices[:, 0].contiguous(), counts[:, 0].contiguous()
        self._map(call.layer, kept, counts)
        return kept, counts

    def _map(self, layer: int, kept: Tensor, counts: Tensor) -> None:
        """The cuts as slots of a layer that keeps these positions."""
        size = max(len(cuts) for cuts in self.cuts)
        padded = torch.tensor([cuts + [cuts[-1]] * (size - len(cuts)) for cuts in self.cuts], dtype=torch.int32)
        ordered = torch.where(torch.arange(kept.shape[2]) < counts[..., None], kept, 2**31 - 1)
        cuts = padded[:, None].expand(-1, kept.shape[1], -1).contiguous()
        self._offsets[layer] = torch.searchsorted(ordered, cuts).int()

    # Writing

    def trim(self, tree: RowTree) -> RowTree:
        """Nothing hangs below the end of a sentence."""
        ends = np.isin(tree.tokens, self.marks)
        keep = np.ones(len(tree), bool)
        for node in range(1, len(tree)):
            parent = tree.parents[node]
            keep[node] = keep[parent] and not ends[parent]
        return tree if keep.all() else tree.only(keep)

    def max_depth(self) -> Sequence[int]:
        # A sentence without a mark ends at a position.
        return [
            min(self.options.recent - 1, self.options.longest - 1 - (int(n) - cuts[-1]))
            for n, cuts in zip(self.store.seq_lens, self.cuts, strict=True)
        ]

    def attend(self, call: LayerCall) -> Tensor:
        if call.plan.prompt_ends is not None or call.window:
            return super().attend(call)
        assert call.plan.tree is not None
        self._tree = call.plan.tree
        lens = call.lens if call.lens.dim() == 2 else call.lens[:, None].expand(-1, call.keys.shape[1])
        B, Hq, T, D = call.query.shape
        Hkv = lens.shape[1]
        query = call.query.view(B, Hkv, Hq // Hkv, T, D).float().mean(2)
        self._round[call.layer] = query
        if int(lens.max()) + T <= self.options.budget:
            return call.dense()[0]
        scores = self._scores(call, lens, query)
        indices, counts = self._select(call, lens, scores)
        if self.offloaded is None:
            return call.sparse(indices, counts)
        # What sees everything reads it where it lies: to bring it all in would fill the memory.
        young = self._young()[..., None]
        few = torch.where(young, 0, counts)
        out = self.offloaded.fetched(call, (indices, few), unit=1).sparse(indices, few)
        if bool(young.any()):
            out = torch.where(young[:, None], call.sparse(indices, torch.where(young, counts, 0)), out)
        return out

    def _scores(self, call: LayerCall, lens: Tensor, query: Tensor) -> Tensor:
        """f32[B, T, Hkv, S]: every node's mean query so far in its sentence against the means of closed ones."""
        means = self._current_means(call)
        path = self._seen(query.shape[2])  # bool[B, T, T], ancestors of the same sentence and the node itself
        sums = path[:, None].float() @ query  # [B, Hkv, T, D]
        so_far = self._sums.get(call.layer)
        if so_far is not None:
            sums = sums + so_far[:, :, None]
        open_tokens = path.sum(-1) + (self.store.seq_lens - self._opened())[:, None]  # [B, T]
        mean = sums / open_tokens[:, None, :, None]
        closed = torch.tensor([len(cuts) - 1 for cuts in self.cuts], dtype=torch.int32)
        return ops.score_pages(mean.to(means.dtype), means, closed, reduce="sum", per_token=True)

    def _select(self, call: LayerCall, lens: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Slots per node and head: the score of a slot is that of its sentence."""
        options, offsets = self.options, self._offsets[call.layer]
        depth = call.plan.positions - self.store.seq_lens[:, None]  # [B, T]
        n = lens[:, :1]  # heads hold equally many
        slots = torch.arange(int(n.max()), dtype=torch.int32)
        sentence = torch.searchsorted(offsets, slots.expand(*offsets.shape[:2], -1).contiguous(), right=True) - 1
        sentence = sentence.clamp(0, scores.shape[3] - 1)
        of_slots = scores.gather(3, sentence[:, None].expand(-1, scores.shape[1], -1, -1))
        opened = n - (self.store.seq_lens - self._opened())[:, None]
        scored = torch.minimum(opened, n - (options.recent - 1 - depth)).clamp(min=0)
        # At a mark and at the first token of a sentence, everything that is held.
        scored = torch.where(self._young(), 0, scored)
        pages = n.expand_as(scored)
        return ops.select_pages(
            of_slots.contiguous(),
            pages.int().contiguous(),
            scored.int().contiguous(),
            options.budget - options.recent,
            num_sinks=options.sinks,
        )

    def _opened(self) -> Tensor:
        """i64[B], where each row's open sentence begins."""
        return torch.tensor([cuts[-1] for cuts in self.cuts])

    def _seen(self, T: int) -> Tensor:
        """bool[B, T, T], the ancestors of each node and itself. No sentence ends above a node."""
        assert self._tree is not None
        seen = torch.eye(T, dtype=torch.bool).repeat(len(self.cuts), 1, 1)
        for node in range(1, T):
            parent = self._tree.parents[:, node].long()
            rows = torch.nonzero(parent >= 0).flatten()
            seen[rows, node] |= seen[rows, parent[rows]]
        return seen

    def _young(self) -> Tensor:
        """bool[B, T]: marks, and nodes that are the first of their sentence."""
        assert self._tree is not None
        marks = torch.isin(self._tree.tokens, torch.from_numpy(self.marks))
        first = self._tree.positions == self._opened()[:, None]
        return marks | first

    def _current_means(self, call: LayerCall) -> Tensor:
        """Mean keys of the closed sentences, [B, Hkv, S, D]; those that were not closed last time are read."""
        offsets, old = self._offsets[call.layer], self._means.get(call.layer)
        closed = torch.tensor([len(cuts) - 1 for cuts in self.cuts], dtype=torch.int32)
        seen = self._summarised.get(call.layer, torch.zeros_like(closed))
        size = offsets.shape[2] - 1
        if old is None or old.shape[2] < size:
            means = empty_slots(call.query, (*offsets.shape[:2], size, call.query.shape[3])).zero_()
            if old is not None:
                means[:, :, : old.shape[2]] = old
            self._means[call.layer] = old = means
        if bool((seen < closed).any()):
            ops.page_summaries(call.keys, seen, closed, old, segment_offsets=offsets, page_table=call.page_table)
            self._summarised[call.layer] = closed
        return old

    def committed(self, nodes: Tensor, count: Tensor) -> None:
        if self._tree is None:
            return
        closed = []
        for row, cuts in enumerate(self.cuts):
            path = nodes[row, : int(count[row])].long()
            n = int(self.store.seq_lens[row])
            ended = len(path) > 0 and int(self._tree.tokens[row, path[-1]]) in self.options.marks
            closed.append(ended or (len(path) > 0 and n - cuts[-1] >= self.options.longest))
            for layer, query in self._round.items():
                sums = self._sums.setdefault(layer, torch.zeros_like(query[:, :, 0]))
                sums[row] = 0 if closed[-1] else sums[row] + query[row][:, path].sum(1)
            if closed[-1]:
                cuts.append(n)
        if any(closed):
            for layer in self._round:
                self._append_cuts(layer)
        self._round.clear()
        self._tree = None

    def _append_cuts(self, layer: int) -> None:
        """The cuts of all rows as slots again: what was written lies behind what the prompt kept, one by one."""
        held, offsets = self.store.layers[layer].lens, self._offsets[layer]
        lens = held if held.dim() == 2 else held[:, None].expand(-1, offsets.shape[1])
        size = max(len(cuts) for cuts in self.cuts)
        new = offsets[:, :, -1:].expand(-1, -1, size).clone()
        new[:, :, : min(size, offsets.shape[2])] = offsets[:, :, :size]
        for row, cuts in enumerate(self.cuts):
            gap = int(self.store.seq_lens[row]) - lens[row]  # [Hkv], positions that the prompt lost
            last = len(cuts) - 1
            new[row, :, last:] = (cuts[-1] - gap)[:, None].int()
        self._offsets[layer] = new

    def keep(self, rows: Sequence[int]) -> None:
        index = list(rows)
        self.cuts = [self.cuts[row] for row in index]
        if self.offloaded is not None:
            self.offloaded.select_rows()
        for tensors in (self._offsets, self._sums, self._means, self._summarised):
            for layer in tensors:
                tensors[layer] = tensors[layer][index]

    def close(self) -> None:
        if self.offloaded is not None:
            self.offloaded.close()
