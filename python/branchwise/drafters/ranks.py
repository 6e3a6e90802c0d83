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

    def shape(self, nodes: int, depth: int) -> Shape:
        """The best shape for these chances, see :func:`branchwise.drafters.shapes.best_shape`."""
        return best_shape(self.rounded, nodes, depth)

    def observe(self, tree: RowTree, path: Sequence[int]) -> None:
        """Learns from a tree whose siblings are in the order of their ranks, other drafters' nodes left out, and the
        path that was kept."""
        if len(path) == 0 or len(tree) == 1:
            return
        children = dict.fromkeys(path, 0)  # of every accepted node, so far
        own = range(len(tree)) if tree.ids is None else np.flatnonzero(tree.ids != FOREIGN).tolist()
        parents = tree.parents.tolist()
        with self._lock:
            self._hits *= _FORGET
            self._tries *= _FORGET
            for node in own:
                rank = children.get(parents[node])
                if rank is None:
                    continue
                children[parents[node]] = rank + 1
                if rank < len(self._tries):
                    self._tries[rank] += 1
                    self._hits[rank] += node in children
