"""How large a tree pays: expected tokens per second from measured costs and measured acceptance."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

import numpy as np

from ..tree import RowTree

_SCORE_BUCKETS = 16
_FORGET = 0.98  # per round: acceptance drifts with the text
_SAMPLES = 9  # kept per size class, for a median that survives stalls of the machine
_STALE = 400  # forwards after which a sample no longer counts
_PRIOR_SLOPE = 0.04  # cost of one more token relative to the smallest forward, where nothing was measured


class CostModel:
    """Seconds of a target forward by its number of tokens, measured while decoding.

    Medians of recent forwards per size class (1, 2, 3-4, 5-8, ...), linear in between: the step from one token to a
    few is often much larger than the next ones, so one line would not do.
    """

    def __init__(self) -> None:
        self._classes: dict[int, deque[tuple[int, int, float]]] = {}
        self._clock = 0

    def observe(self, tokens: int, seconds: float) -> None:
        self._clock += 1
        samples = self._classes.setdefault((tokens - 1).bit_length(), deque(maxlen=_SAMPLES))
        samples.append((self._clock, tokens, seconds))

    def seconds(self, tokens: np.ndarray) -> np.ndarray:
        """Estimated seconds; in units of the smallest forward if nothing was measured yet."""
        sizes, times = [], []
        for _, samples in sorted(self._classes.items()):
            recent = [(n, t) for tick, n, t in samples if self._clock - tick < _STALE]
            if recent:
                sizes.append(float(np.mean([n for n, _ in recent])))
                times.append(median(t for _, t in recent))
        if not sizes:
            return 1.0 + _PRIOR_SLOPE * (tokens - 1)
        # A forward costs no more than a larger one: this corrects a class that only saw a stall.
        curve = np.minimum.accumulate(times[::-1])[::-1]
        slope = _PRIOR_SLOPE * curve[0]
        below, above = np.minimum(tokens - sizes[0], 0.0), np.maximum(tokens - sizes[-1], 0.0)
        return np.maximum(np.interp(tokens, sizes, curve) + slope * (below + above), 0.3 * curve[0])


class TreeSizer:
    """Chooses how many nodes to verify, and learns from every round.

    The chance that a node is accepted is the observed frequency among nodes of similar drafter score, which starts at
    the score itself. The size chosen maximises (sum over rows of 1 + sum of chances) / seconds; it may be 1, which is
    plain decoding. Nothing depends on this round's draws.
    """

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        centres = ((np.arange(_SCORE_BUCKETS) + 0.5) / _SCORE_BUCKETS) ** 2
        self._prior_hits, self._prior_tries = 4.0 * centres, 4.0
        self._hits, self._tries = np.zeros(_SCORE_BUCKETS), np.zeros(_SCORE_BUCKETS)

    def chances(self, scores: np.ndarray) -> np.ndarray:
        """Estimated probability of acceptance for drafter scores in [0, 1]."""
        rate = (self._hits + self._prior_hits) / (self._tries + self._prior_tries)
        return rate[_bucket(scores)]

    def choose(self, trees: Sequence[RowTree]) -> list[RowTree]:
        """The trees cut to the best common number of nodes."""
        longest = max(len(tree) for tree in trees)
        if longest == 1:
            return list(trees)
        gain = np.zeros(longest)
        for tree in trees:
            gain[: len(tree)] += np.concatenate([[1.0], self.chances(tree.scores[1:])])
        sizes = np.arange(1, longest + 1)
        rate = np.cumsum(gain) / self.cost.seconds(len(trees) * sizes)
        best = int(sizes[rate.argmax()])
        return [tree.first(best) for tree in trees]

    def observe(self, tree: RowTree, accepted: Sequence[int]) -> None:
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
