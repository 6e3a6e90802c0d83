"""How large a tree pays: expected tokens per second from measured costs and measured acceptance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tree import RowTree

_SCORE_BUCKETS = 16
_FORGET = 0.98  # per round: costs and acceptance drift with the text and the machine


class TreeSizer:
    """Chooses how many nodes to verify, and learns from every round.

    Two running estimates. The time of a forward is taken as a line in its number of tokens. The chance that a node
    is accepted is the observed frequency among nodes of similar drafter score, which starts at the score itself.
    The size chosen maximises (sum over rows of 1 + sum of chances) / time; it may be 1, which is plain decoding.
    """

    def __init__(self) -> None:
        # Weighted sums for the line: n, n^2, t, n t, weight; and a prior slope per token relative to the base.
        self._sums = np.zeros(5)
        self._prior_slope = 0.04
        centres = ((np.arange(_SCORE_BUCKETS) + 0.5) / _SCORE_BUCKETS) ** 2
        self._prior_hits, self._prior_tries = 4.0 * centres, np.full(_SCORE_BUCKETS, 4.0)
        self._hits, self._tries = np.zeros(_SCORE_BUCKETS), np.zeros(_SCORE_BUCKETS)

    def chances(self, scores: np.ndarray) -> np.ndarray:
        """Estimated probability of acceptance for drafter scores in [0, 1]."""
        rate = (self._hits + self._prior_hits) / (self._tries + self._prior_tries)
        return rate[_bucket(scores)]

    def cost(self, tokens: np.ndarray | float) -> np.ndarray | float:
        """Estimated time of a forward over so many tokens, in units of its fixed part."""
        n, nn, t, nt, w = self._sums
        slope = self._prior_slope
        if w > 0:
            # Ridge towards the prior: two pseudo-observations keep the line sane before sizes have varied.
            mean_n, mean_t = n / w, t / w
            spread = max(nn / w - mean_n**2, 0.0)
            raw = (nt / w - mean_n * mean_t) / spread if spread > 0 else 0.0
            base = max(mean_t - raw * mean_n, 0.1 * mean_t)
            trust = w * spread / (w * spread + 50.0)
            slope = trust * max(raw / base, 1e-4) + (1 - trust) * self._prior_slope
        return 1.0 + slope * tokens

    def choose(self, trees: Sequence[RowTree]) -> list[RowTree]:
        """The trees cut to the best common number of nodes."""
        longest = max(len(tree) for tree in trees)
        if longest == 1:
            return list(trees)
        gain = np.zeros(longest)
        for tree in trees:
            gain[: len(tree)] += np.concatenate([[1.0], self.chances(tree.scores[1:])])
        sizes = np.arange(1, longest + 1)
        rate = np.cumsum(gain) / self.cost(len(trees) * sizes)
        best = int(sizes[rate.argmax()])
        return [tree.first(best) for tree in trees]

    def observe_time(self, tokens: int, seconds: float) -> None:
        # A stall of the machine says nothing about the model: cap what one sample may claim.
        _, _, t, _, w = self._sums
        seconds = min(seconds, 3.0 * t / w) if w > 5 else seconds
        self._sums = self._sums * _FORGET + np.array([tokens, tokens**2, seconds, tokens * seconds, 1.0])

    def observe_tree(self, tree: RowTree, accepted: Sequence[int]) -> None:
        """``accepted``: node ids of the accepted path, root included."""
        if len(tree) == 1:
            return
        bucket = _bucket(tree.scores[1:])
        hit = np.zeros(len(tree))
        hit[list(accepted)] = 1.0
        self._hits *= _FORGET
        self._tries *= _FORGET
        np.add.at(self._hits, bucket, hit[1:])
        np.add.at(self._tries, bucket, 1.0)


def _bucket(scores: np.ndarray) -> np.ndarray:
    # Finer towards 0, where most nodes are and where it is decided whether they pay.
    return np.clip((np.sqrt(scores) * _SCORE_BUCKETS).astype(np.int64), 0, _SCORE_BUCKETS - 1)
