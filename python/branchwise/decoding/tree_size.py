"""How large a tree pays: expected tokens per second from measured costs and measured acceptance."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedModel

from ..tree import RowTree

_SCORE_BUCKETS = 16
_FORGET = 0.98  # per round: acceptance drifts with the text
_SAMPLES = 9  # kept per size class, for a median that survives stalls of the machine
_STALE = 400  # forwards after which a sample no longer counts
_PRIOR_TRIES = 4.0
_PRIOR_SLOPE = 0.04  # cost of one more token relative to the smallest forward, where nothing was measured


_COSTS: WeakKeyDictionary[PreTrainedModel, CostModel] = WeakKeyDictionary()


def cost_model(model: PreTrainedModel) -> CostModel:
    """What forwards of a model cost: the same for all decoders, as opposed to what texts are like."""
    return _COSTS.setdefault(model, CostModel())


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


class Calibration:
    """Chance that a node is accepted, by its drafter's score: the observed frequency among nodes of similar score,
    which starts at the score itself."""

    def __init__(self) -> None:
        centres = ((np.arange(_SCORE_BUCKETS) + 0.5) / _SCORE_BUCKETS) ** 2
        self._prior_hits, self._prior_tries = _PRIOR_TRIES * centres, _PRIOR_TRIES
        self.hits, self.tries = np.zeros(_SCORE_BUCKETS), np.zeros(_SCORE_BUCKETS)

    def chances(self, scores: np.ndarray) -> np.ndarray:
        """Estimated probability of acceptance for drafter scores in [0, 1]."""
        rate = (self.hits + self._prior_hits) / (self.tries + self._prior_tries)
        return rate[_bucket(scores)]

    def observe(self, scores: np.ndarray, accepted: np.ndarray) -> None:
        """``accepted``: bool per score, of one round."""
        if len(scores) == 0:
            return
        bucket = _bucket(scores)
        self.hits *= _FORGET
        self.tries *= _FORGET
        np.add.at(self.hits, bucket, accepted.astype(np.float64))
        np.add.at(self.tries, bucket, 1.0)


class TreeSizer:
    """Chooses how many nodes to verify, and learns from every round.

    The size chosen maximises (sum over rows of 1 + sum of chances) / seconds; it may be 1, which is plain decoding.
    Nothing depends on this round's draws.
    """

    def __init__(self, cost: CostModel) -> None:
        self.cost, self.calibration = cost, Calibration()

    def choose(self, trees: Sequence[RowTree]) -> list[RowTree]:
        """The trees cut to the best common number of nodes."""
        size, _ = best_size([(self.calibration.chances(tree.scores[1:]), tree.fixed) for tree in trees], self.cost)
        return [tree.first(size) for tree in trees]

    def observe(self, tree: RowTree, accepted: Sequence[int]) -> None:
        """``accepted``: node ids of the accepted path, root included."""
        hit = np.zeros(len(tree), bool)
        hit[list(accepted)] = True
        self.calibration.observe(tree.scores[1:], hit[1:])


def best_size(trees: Sequence[tuple[np.ndarray, int]], cost: CostModel) -> tuple[int, float]:
    """The common number of nodes with the most expected tokens per second, and that rate.

    Args:
        trees: per row, the chances of its nodes behind the root, in the order in which they would be kept, and how many
            nodes must be.
        cost: of a forward.
    """
    longest = 1 + max(len(chances) for chances, _ in trees)
    gain = np.zeros(longest)
    for chances, _ in trees:
        gain[0] += 1.0
        gain[1 : 1 + len(chances)] += chances
    sizes = np.arange(1, longest + 1)
    rate = np.cumsum(gain) / cost.seconds(len(trees) * sizes)
    least = max(fixed for _, fixed in trees) - 1
    best = least + int(rate[least:].argmax())
    return int(sizes[best]), float(rate[best])


def _bucket(scores: np.ndarray) -> np.ndarray:
    # Finer towards 0, where most nodes are and where it is decided whether they pay.
    return np.clip((np.sqrt(scores) * _SCORE_BUCKETS).astype(np.int64), 0, _SCORE_BUCKETS - 1)
