"""How often the k-th child is the right one, measured while decoding."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from ..tree import FOREIGN, RowTree
from .growth import Shape
from .shapes import best_shape

_FORGET = 0.995  # per tree
_PRIOR_TRIES = 8.0
_STEP = 0.05  # chances are rounded to it, so that shapes repeat and are computed once


class RankChances:
    """Chances of acceptance by rank among siblings, given that the parent was accepted. Thread-safe.

    Only past rounds count, so a shape made from it does not depend on what is drawn in it.
    """

    def __init__(self, ranks: int, first: float = 0.6, falloff: float = 0.3) -> None:
        self._prior = _PRIOR_TRIES * first * falloff ** np.arange(ranks)
        self._hits, self._tries = np.zeros(ranks), np.zeros(ranks)
        self._rounded = np.full(ranks, np.inf)
        self._lock = threading.Lock()

    @property
    def chances(self) -> np.ndarray:
        """f64[ranks]."""
        with self._lock:
            return (self._hits + self._prior) / (self._tries + _PRIOR_TRIES)

    @property
    def rounded(self) -> tuple[float, ...]:
        """Chances in steps, none of them 0 or 1; they stay while none is off by more than three quarters of a step."""
        chances = self.chances
        with self._lock:
            if np.abs(chances - self._rounded).max() > 0.75 * _STEP:
                self._rounded = np.clip(np.round(chances / _STEP), 0.2, 1 / _STEP - 0.2) * _STEP
            return tuple(self._rounded.tolist())

    def state(self) -> dict[str, list[float]]:
        """For :meth:`restore`."""
        with self._lock:
            return {"hits": self._hits.tolist(), "tries": self._tries.tolist()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Goes on from what was learned before; of more ranks than there are now, the first."""
        with self._lock:
            for mine, saved in ((self._hits, state["hits"]), (self._tries, state["tries"])):
                n = min(len(mine), len(saved))
                mine[:n] = saved[:n]

    def shape(self, nodes: int, depth: int) -> Shape:
        """The best shape for these chances, see :func:`branchwise.drafters.shapes.best_shape`."""
        return best_shape(self.rounded, nodes, depth)

    def observe(self, trees: Sequence[RowTree], paths: Sequence[Sequence[int]]) -> None:
        """Learns from trees whose siblings are in the order of their ranks, other drafters' nodes left out, and the
        paths that were kept, none of a row that had ended."""
        pairs = [(tree, path) for tree, path in zip(trees, paths, strict=True) if len(path) and len(tree) > 1]
        if not pairs:
            return
        sizes = np.array([len(tree) for tree, _ in pairs])
        begins = np.cumsum(sizes) - sizes  # of each tree, among all their nodes
        parents = np.concatenate([tree.parents for tree, _ in pairs]) + np.repeat(begins, sizes)
        own = np.concatenate([np.ones(len(t), bool) if t.ids is None else t.ids != FOREIGN for t, _ in pairs])
        own[begins] = False
        kept = np.zeros(len(parents), bool)
        kept[[begin + node for begin, (_, path) in zip(begins.tolist(), pairs, strict=True) for node in path]] = True
        tried = np.flatnonzero(own & kept[parents])
        tried = tried[np.argsort(parents[tried], kind="stable")]
        above = parents[tried]
        ranks = np.arange(len(tried)) - np.searchsorted(above, above)
        known = len(self._tries)
        tried, ranks = tried[ranks < known], ranks[ranks < known]
        forget = _FORGET ** len(pairs)
        with self._lock:
            self._hits = forget * self._hits + np.bincount(ranks[kept[tried]], minlength=known)
            self._tries = forget * self._tries + np.bincount(ranks, minlength=known)
