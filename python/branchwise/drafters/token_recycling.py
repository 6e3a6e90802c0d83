"""Token recycling: what the target once thought might follow a token is guessed when the token comes up again."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch

from .. import ops
from ..tree import DrawKind, RowTree
from .base import DraftRequest, Needs, Verified
from .ranks import RankChances
from .shapes import best_shape


class TokenRecycling:
    """Trees from a table of each token's last seen likeliest successors (card suffix-decoding, algorithm B; Luo et al.
    2024, arXiv 2408.08696).

    Every verified node, accepted or not, refreshes its token's entry; where a token occurs more than once in a forward,
    the last row's and highest node's entry stays. The shape of the tree, fixed in the paper, follows the acceptance
    measured per rank (:func:`branchwise.drafters.shapes.best_shape`). The table is kept in this object: 4 bytes times
    ``successors`` per token of the vocabulary. Thread-safe.

    Args:
        successors: kept per token.
        depth: most levels of the tree.

    Raises:
        ValueError: an option below 1.
    """

    draws, needs = DrawKind.DETERMINISTIC, Needs.LOGITS

    def __init__(self, successors: int = 8, depth: int = 6) -> None:
        if successors < 1 or depth < 1:
            raise ValueError(f"successors and depth must be at least 1, got {successors} and {depth}")
        self.successors, self.depth = successors, depth
        self.ranks = RankChances(successors, first=0.4, falloff=0.4)
        self._tables: dict[frozenset[int], np.ndarray] = {}  # i32[V, successors] by EOS, -1 where not seen yet
        self._lock = threading.Lock()

    def begin(self, request: DraftRequest) -> TokenRecyclingSession:
        return TokenRecyclingSession(self, request)

    def shape(self, nodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
        """The tree that the acceptance so far asks for, likeliest nodes first: parents, ranks among siblings, scores,
        and the nodes of each level."""
        # Rises are noise, and shapes without them are found at once.
        chances = tuple(accumulate(self.ranks.rounded, min))
        return _ordered(chances, *best_shape(chances, nodes, self.depth))

    def table(self, eos: frozenset[int], vocabulary: int) -> np.ndarray:
        with self._lock:  # models with other EOS tokens must not read each other's table
            table = self._tables.get(eos)
            if table is None or len(table) < vocabulary:
                table = self._tables[eos] = np.full((vocabulary, self.successors), -1, np.int32)
            return table


@lru_cache(maxsize=64)
def _ordered(
    chances: tuple[float, ...], parents: tuple[int, ...], ranks: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    n = len(parents)
    scores, depths = np.ones(n, np.float32), np.zeros(n, np.int64)
    for node in range(1, n):
        scores[node] = scores[parents[node]] * chances[ranks[node]]
        depths[node] = depths[parents[node]] + 1
    order = np.argsort(-scores, kind="stable")
    place, above = np.argsort(order), np.array(parents)[order]
    levels = [np.flatnonzero(depths[order] == level) for level in range(1, int(depths.max()) + 1)]
    moved = np.where(above >= 0, place[above], -1).astype(np.int32)
    return moved, np.array(ranks, np.int32)[order], scores[order], levels


class TokenRecyclingSession:
    def __init__(self, options: TokenRecycling, request: DraftRequest) -> None:
        self._options, self._key = options, request.eos
        self._eos = torch.tensor(sorted(request.eos), dtype=torch.int64)
        self._last = np.array([prompt[-1] for prompt in request.prompts], np.int64)
        self._table: np.ndarray | None = None

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        if self._table is None or max(budgets) < 2:
            return [RowTree.root(int(token)) for token in self._last]
        parents, ranks, scores, levels = self._options.shape(max(budgets))
        tokens = np.full((len(self._last), len(parents)), -1, np.int32)
        tokens[:, 0] = self._last
        for level in levels:
            above = tokens[:, parents[level]]
            tokens[:, level] = np.where(above >= 0, self._table[above, ranks[level]], -1)
        # A token that was not seen yet has no successors, and they have none.
        trees, seen = RowTree.alike(tokens, parents, scores, ranks), tokens >= 0
        if not seen.all():
            trees = [tree.only(keep) for tree, keep in zip(trees, seen, strict=True)]
        return [tree.first(budget) for tree, budget in zip(trees, budgets, strict=True)]

    def observe(self, verified: Verified) -> None:
        for b, tokens in enumerate(verified.emitted):
            if tokens:
                self._last[b] = tokens[-1]
        if verified.logits is None or verified.tree is None:
            return
        logits = verified.logits
        self._table = self._options.table(self._key, logits.shape[-1])
        best = ops.top_tokens(logits, self._options.successors, self._eos)[0].numpy()
        self._options.ranks.observe(verified.tree.rows, verified.paths)
        rows = verified.tree.rows
        real = np.arange(best.shape[1]) < np.array([len(tree) for tree in rows])[:, None]
        self._table[np.concatenate([tree.tokens for tree in rows])] = best[real]

    def keep(self, rows: Sequence[int]) -> None:
        self._last = self._last[list(rows)]

    def close(self) -> None: ...
