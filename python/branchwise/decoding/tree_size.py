"""How large a tree pays: expected tokens per second from measured costs and measured acceptance."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedModel

from ..tree import RowTree

_SCORE_BUCKETS = 16
_FORGET = 0.98  # per call of observe: acceptance drifts with the text
_SAMPLES = 9  # kept per size class, for a median that survives stalls of the machine
_ENOUGH = 3  # of them, for a size to count as known
_LOOK = 16  # forwards
_FOLLOW, _JUMP = 0.25, 1.25  # share of a forward's change of speed that is believed, and the largest such change
_STALE = 400  # forwards after which a sample no longer counts
_PRIOR_TRIES = 8.0
_PLACES = (3, 6, 10)  # nodes of a tree before these, and those behind, are looked at apart
_PRIOR_HITS = 8.0
_FREE = 0.01  # of a forward: a drafter that costs less is always asked, since texts change
_TRIAL, _TRIAL_COST = 64, 3.0  # proposals, or forwards' worth of drafting, before a drafter may be left alone
_FIRST_WAIT, _LAST_WAIT = 4, 256  # rounds until a drafter that did not pay is tried again, doubling
_RECENT, _RECENT_GAIN = 0.9, 0.8  # weight of the past in running means
_TEXT = 64  # rounds, over which luck evens out
_PRIOR_SLOPE = 0.04  # cost of one more token relative to the smallest forward, where nothing was measured


_COSTS: WeakKeyDictionary[PreTrainedModel, CostModel] = WeakKeyDictionary()


def cost_model(model: PreTrainedModel) -> CostModel:
    """What forwards of a model cost: the same for all decoders, as opposed to what texts are like."""
    return _COSTS.setdefault(model, CostModel())


class CostModel:
    """Seconds of a target forward and its verdict by the number of tokens, measured while decoding.

    Medians of recent forwards per size class (1, 2, 3-4, 5-8, ...), linear in between: the step from one token to a
    few is often much larger than the next ones, so one line would not do. A machine's speed changes as its neighbours
    and clocks do, for all sizes at once: samples are kept relative to what is usual now, or a size measured in a slow
    minute would look dear beside one measured in a fast one.
    """

    def __init__(self) -> None:
        self._classes: dict[int, deque[tuple[int, int, float]]] = {}
        self._points: dict[int, tuple[float, float]] = {}  # of a class, its mean size and median seconds
        self._clock = 0
        self._pace = 1.0  # seconds of the last forwards, relative to what their sizes took before
        self._curve: tuple[list[float], np.ndarray] | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        self._clock += 1
        self._curve = None
        size = (tokens - 1).bit_length()
        if size in self._points:
            # Slowly: it must not follow the sizes of forwards, whose own costs may have changed.
            ratio = seconds / float(self.seconds(np.array([tokens]))[0])
            self._pace *= min(max(ratio, 1 / _JUMP), _JUMP) ** _FOLLOW
        self._classes.setdefault(size, deque(maxlen=_SAMPLES)).append((self._clock, tokens, seconds / self._pace))
        # Samples of other classes only grow old: it is enough to look now and then.
        for each in [size] if self._clock % _LOOK else sorted(self._classes):
            self._summarise(each)

    def knows(self, tokens: int) -> bool:
        """Whether forwards of about this size were measured of late, often enough for a stall not to count."""
        samples = self._classes.get((tokens - 1).bit_length(), ())
        return sum(self._clock - tick < _STALE for tick, _, _ in samples) >= _ENOUGH

    def seconds(self, tokens: np.ndarray) -> np.ndarray:
        """Estimated seconds; in units of the smallest forward if nothing was measured yet."""
        return self._pace * self._relative(tokens)

    def _relative(self, tokens: np.ndarray) -> np.ndarray:
        sizes, curve = self._measured()
        if not sizes:
            return 1.0 + _PRIOR_SLOPE * (tokens - 1)
        slope = rise = _PRIOR_SLOPE * curve[0]
        if len(sizes) > 1:
            # Who thinks larger forwards dearer than they are never learns better.
            rise = min(slope, max(slope / 4, (curve[-1] - curve[0]) / (sizes[-1] - sizes[0])))
        below, above = np.minimum(tokens - sizes[0], 0.0), np.maximum(tokens - sizes[-1], 0.0)
        return np.maximum(np.interp(tokens, sizes, curve) + slope * below + rise * above, 0.3 * curve[0])

    def _measured(self) -> tuple[list[float], np.ndarray]:
        """Mean size and median seconds of each class; asked several times between two forwards."""
        if self._curve is None:
            points = sorted(self._points.values())
            # A forward costs no more than a larger one: this corrects a class that only saw a stall.
            times = np.minimum.accumulate([t for _, t in points][::-1])[::-1]
            self._curve = [n for n, _ in points], times
        return self._curve

    def _summarise(self, size: int) -> None:
        recent = [(n, t) for tick, n, t in self._classes[size] if self._clock - tick < _STALE]
        self._points.pop(size, None)
        if recent:
            self._points[size] = sum(n for n, _ in recent) / len(recent), median(t for _, t in recent)

    def state(self) -> list[tuple[int, float]]:
        """The samples, for :meth:`restore`."""
        return [(n, t * self._pace) for _, samples in sorted(self._classes.items()) for _, n, t in samples]

    def restore(self, samples: Sequence[tuple[int, float]]) -> None:
        """Adds samples of an earlier process where this one has none."""
        known = set(self._classes)
        for n, t in samples:
            if (n - 1).bit_length() not in known:
                self.observe(n, t)


class Calibration:
    """Chance that a node is accepted, by its drafter's score: the observed frequency among nodes of similar score,
    which starts at the score itself; times a factor for the node's place in the tree, which starts at 1, since what
    comes late among nodes of one score is accepted less often, and it is late nodes that a size decides about."""

    def __init__(self) -> None:
        self._prior_hits = _PRIOR_TRIES * ((np.arange(_SCORE_BUCKETS) + 0.5) / _SCORE_BUCKETS) ** 2
        self.hits, self.tries = np.zeros(_SCORE_BUCKETS), np.zeros(_SCORE_BUCKETS)
        self.hits_at, self.expected_at = np.zeros(len(_PLACES) + 1), np.zeros(len(_PLACES) + 1)  # by place

    def chances(self, scores: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Estimated probability of acceptance for drafter scores in [0, 1] and places in the tree, the root's 0."""
        factor = (self.hits_at + _PRIOR_HITS) / (self.expected_at + _PRIOR_HITS)
        return np.minimum(self._rate()[_bucket(scores)] * factor[_class(places)], 1.0)

    def observe(self, scores: np.ndarray, places: np.ndarray, accepted: np.ndarray) -> None:
        """``accepted``: bool per score, of a round or of one of its rows. Where nothing was drafted, none: what is long
        ago counts less and less, or where nothing was worth drafting nothing ever would be."""
        bucket, place = _bucket(scores), _class(places)
        expected = self._rate()[bucket]
        self.hits = _FORGET * self.hits + np.bincount(bucket, accepted, _SCORE_BUCKETS)
        self.tries = _FORGET * self.tries + np.bincount(bucket, minlength=_SCORE_BUCKETS)
        self.hits_at = _FORGET * self.hits_at + np.bincount(place, accepted, len(_PLACES) + 1)
        self.expected_at = _FORGET * self.expected_at + np.bincount(place, expected, len(_PLACES) + 1)

    def _rate(self) -> np.ndarray:
        return (self.hits + self._prior_hits) / (self.tries + _PRIOR_TRIES)

    def state(self) -> dict[str, list[float]]:
        """For :meth:`restore`."""
        return {name: getattr(self, name).tolist() for name in ("hits", "tries", "hits_at", "expected_at")}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Goes on from what was learned before."""
        for name, counts in state.items():
            setattr(self, name, np.array(counts))


@dataclass
class Record:
    """What is known about one drafter.

    Attributes:
        seconds: of proposing and observing in a round; running mean.
        gain: log of the ratio of expected tokens per second with the drafter to those without; running mean.
        invested: what it has cost so far, in forwards.
        wait: rounds until it is tried again if it does not pay.
        idle: rounds since it was asked.
        asked: rounds in which it was.
        proposals: trees it was asked for, one per row.
        drafted, accepted: its nodes.
    """

    seconds: float = 0.0
    gain: float = 0.0
    invested: float = 0.0
    wait: int = _FIRST_WAIT
    idle: int = 0
    asked: int = 0
    proposals: int = 0
    drafted: int = 0
    accepted: int = 0

    def wanted(self) -> bool:
        """Whether to ask it in this round."""
        return self.trusted() or self.idle >= self.wait

    def trusted(self) -> bool:
        """Nothing says yet that it does not pay."""
        return self._on_trial() or self.gain >= 0

    def _on_trial(self) -> bool:
        # Some need to see text before they are of use, and a large batch shows much of it in a round; others are too
        # dear to wait for that.
        return self.proposals < _TRIAL and self.invested < _TRIAL_COST

    def is_free(self, forward: float) -> bool:
        """Its cost does not matter beside a forward of so many seconds."""
        return self.seconds <= _FREE * forward

    def spend(self, seconds: float) -> None:
        """It took so long in this round."""
        self.seconds = seconds if self.asked < 2 else _RECENT * self.seconds + (1 - _RECENT) * seconds

    def learn(self, rows: int, rate: float, without: float, seconds: float) -> None:
        """It was asked.

        Args:
            rows: for which it proposed.
            rate, without: expected tokens per second of the forward with what it proposed, and without.
            seconds: of that forward.
        """
        share = float(self.seconds / seconds)
        # What costs next to nothing is worth asking whatever it says today.
        gain = 0.0 if self.is_free(seconds) else math.log(rate / without) - math.log1p(share)
        probe = not self._on_trial() and self.gain < 0
        self.invested += share
        if probe and gain >= 0:
            self.gain = 0.0  # what did not pay then pays now
        else:
            self.gain = gain if self.asked == 0 else _RECENT_GAIN * self.gain + (1 - _RECENT_GAIN) * gain
        if self.gain >= 0:
            self.wait = _FIRST_WAIT
        elif probe:
            self.wait = min(2 * self.wait, _LAST_WAIT)
        self.skip(rows)

    def skip(self, rows: int) -> None:
        """It was asked, and what it brought was not looked at."""
        self.asked += 1
        self.proposals += rows
        self.idle = 0


class TreeSizer:
    """Chooses for one drafter whether to ask it and how many nodes to verify, and learns from every round.

    The size chosen maximises (sum over rows of 1 + sum of chances) / seconds; it may be 1, which is plain decoding.
    Nothing depends on this round's draws.
    """

    def __init__(self, cost: CostModel) -> None:
        self.cost, self.record, self.calibration = cost, Record(), Calibration()
        self._asked = False

    def budgets(self, budgets: Sequence[int]) -> Sequence[int]:
        """1 for every row in a round that is better off without drafts."""
        self.record.idle += 1
        self._asked = self.record.wanted()
        return budgets if self._asked else [1] * len(budgets)

    def choose(self, trees: Sequence[RowTree]) -> list[RowTree]:
        """The trees cut to the best common number of nodes."""
        size, rate = best_size(self.calibration, trees, self.cost)
        if self._asked:
            forward, single = self.cost.seconds(len(trees) * np.array([size, 1]))
            self.record.learn(len(trees), rate, len(trees) / single, forward)
        return [tree.first(size) for tree in trees]

    def spend(self, seconds: float) -> None:
        """The round's drafting took so long."""
        if self._asked:
            self.record.spend(seconds)

    def observe(self, tree: RowTree, accepted: Sequence[int]) -> None:
        """One row of a round. ``accepted``: node ids of the accepted path, root included."""
        hit = np.zeros(len(tree), bool)
        hit[list(accepted)] = True
        self.calibration.observe(tree.scores[1:], np.arange(1, len(tree)), hit[1:])


def best_size(calibration: Calibration, trees: Sequence[RowTree], cost: CostModel) -> tuple[int, float]:
    """The common number of nodes with the most expected tokens per second, and that rate; of a batch, where rows wait
    for the slowest, see :func:`_lag`.

    Args:
        calibration: what scores are worth.
        trees: one per row, nodes in the order in which they would be kept.
        cost: of a forward.
    """
    lengths = np.array([len(tree) for tree in trees])
    place = places_of(lengths)
    chances = calibration.chances(np.concatenate([tree.scores for tree in trees]), place)
    chances[place == 0] = 1.0  # roots are kept for sure
    rows, sizes = len(trees), np.arange(1, lengths.max() + 1)
    tokens = np.cumsum(np.bincount(place, chances)) / rows
    rate = rows * (tokens - _lag(tokens, rows, cost)) / cost.seconds(rows * sizes)
    least = max(tree.fixed for tree in trees) - 1
    best = least + int(rate[least:].argmax())
    return int(sizes[best]), float(rate[best])


def _lag(tokens: np.ndarray, rows: int, cost: CostModel) -> np.ndarray:
    """Tokens per round by which the slowest row of a batch falls behind its mean, by mere luck.

    A batch takes as long as its slowest row, and rows that end before it save only what is their own in a forward.
    Accepted drafts, ``tokens - 1``, are taken to be Poisson distributed, and the slowest row's sum over a text to
    be the least of ``rows`` normal ones. The number of rounds is our choice, not measured.
    """
    if rows == 1:
        return np.zeros_like(tokens)
    least = NormalDist().inv_cdf((rows - 0.375) / (rows + 0.25))
    one, all_rows = cost.seconds(np.array([1, rows]))
    shared = max(float(one * rows - all_rows) / ((rows - 1) * float(all_rows)), 0.0)  # of a forward
    return shared * least * np.sqrt((tokens - 1) / _TEXT)


def places_of(lengths: np.ndarray) -> np.ndarray:
    """Each node's place in its tree, for trees of i64[B] ``lengths`` one behind the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _class(places: np.ndarray) -> np.ndarray:
    return np.searchsorted(_PLACES, places, side="right")


def _bucket(scores: np.ndarray) -> np.ndarray:
    # Finer towards 0, where most nodes are and where it is decided whether they pay.
    return np.clip((np.sqrt(scores) * _SCORE_BUCKETS).astype(np.int64), 0, _SCORE_BUCKETS - 1)
