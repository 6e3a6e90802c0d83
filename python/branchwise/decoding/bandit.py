"""TLT's choice of a strategy by its measured reward (card tlt-adaptive, "BEG-MAB" and "Elastic activation")."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ..drafters import Drafter, DraftRequest, DraftSession, Hybrid, Suffix, TokenRecycling, Verified
from ..drafters.hybrid import foreign
from ..tree import DrawKind, RowTree


@dataclass(frozen=True)
class Strategy:
    """A drafter, by its index, and how many nodes of its trees are verified; 1 node is plain decoding."""

    drafter: int
    nodes: int


class BegMab:
    """Bucketed epsilon-greedy: a bandit whose arms are those that suit the batch size.

    Strategies come in groups, by their number of nodes in TLT: the more rows, the smaller the trees that may be tried.
    Within its group, a strategy is drawn uniformly with chance ``epsilon``, else the one with the largest median
    reward, tokens per second over a window of rounds; one that was never tried comes first. Rewards are kept per size
    of the batch. Thread-safe.

    Args:
        groups: of strategies.
        thresholds: batch sizes from which the groups are used, ascending, the first 1; one per group.
        epsilon: chance of exploring.
        window: rewards kept per strategy and batch size.
        seed: of the exploration.

    Raises:
        ValueError: an empty group; thresholds that are not as many as groups, or do not ascend from 1; epsilon outside
            [0, 1].
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Strategy]],
        thresholds: Sequence[int],
        epsilon: float = 0.1,
        window: int = 300,
        seed: int = 0,
    ) -> None:
        if not groups or not all(groups):
            raise ValueError(f"groups must hold at least one strategy each, got {groups}")
        if len(groups) != len(thresholds):
            raise ValueError(f"thresholds must be one per group, {len(groups)}, got {list(thresholds)}")
        if list(thresholds) != sorted(set(thresholds)) or thresholds[0] != 1:
            raise ValueError(f"thresholds must ascend from 1, got {list(thresholds)}")
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
        self.groups, self.thresholds = [list(group) for group in groups], list(thresholds)
        self.epsilon, self.window = epsilon, window
        self._rewards: dict[tuple[int, Strategy], deque[float]] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def group(self, batch_size: int) -> list[Strategy]:
        """The strategies for a batch of this size."""
        fitting = [i for i, threshold in enumerate(self.thresholds) if threshold <= batch_size]
        return self.groups[fitting[-1]]

    def select(self, batch_size: int) -> Strategy:
        arms = self.group(batch_size)
        with self._lock:
            if len(arms) == 1:
                return arms[0]
            if self._random.random() < self.epsilon:
                return self._random.choice(arms)
            return max(arms, key=lambda arm: self._value(batch_size, arm))

    def record(self, batch_size: int, strategy: Strategy, emitted: int, seconds: float) -> None:
        """``emitted``: tokens that all rows gained in a round of so many seconds."""
        with self._lock:
            rewards = self._rewards.setdefault((_size_class(batch_size), strategy), deque(maxlen=self.window))
            rewards.append(emitted / seconds)

    def _value(self, batch_size: int, strategy: Strategy) -> float:
        rewards = self._rewards.get((_size_class(batch_size), strategy))
        return median(rewards) if rewards else float("inf")


def _size_class(batch_size: int) -> int:
    """Batches that share their rewards: each size to 31, then steps of 8, from 128 on of 32."""
    step = 1 if batch_size < 32 else 8 if batch_size < 128 else 32
    return batch_size // step * step


class Elastic:
    """Speculation for batches that have shrunk: on when no more than ``threshold`` rows were running in ``patience``
    rounds one after another; it stays on for the rest of the call."""

    def __init__(self, threshold: int = 32, patience: int = 10) -> None:
        if threshold < 1 or patience < 1:
            raise ValueError(f"threshold and patience must be at least 1, got {threshold} and {patience}")
        self.threshold, self.patience = threshold, patience
        self._rounds = 0

    def active(self, running: int) -> bool:
        """Called once per round with the number of running rows."""
        if self._rounds < self.patience:
            self._rounds = self._rounds + 1 if running <= self.threshold else 0
        return self._rounds >= self.patience


class Bandit:
    """A controller that learns from rewards alone what :class:`branchwise.decoding.Auto` computes from measured costs
    and chances. ``bench/drafters.py`` compares the two; "auto" is the other one.

    Args:
        drafters: deterministic ones that leave the target alone; suffix and token recycling by default.
        nodes: sizes of trees; every drafter is tried with each, and 1 is plain decoding.
        thresholds: batch sizes from which the next smaller size is the one to use, as many as sizes, the first 1; None
            lets every batch try everything.
        epsilon: chance of exploring, per round.
        elastic: threshold and patience of :class:`Elastic`; None speculates at any batch size.

    Raises:
        ValueError: an unsuitable drafter or option.
    """

    draws = DrawKind.DETERMINISTIC

    def __init__(
        self,
        *drafters: Drafter,
        nodes: Sequence[int] = (1, 4, 8, 16),
        thresholds: Sequence[int] | None = None,
        epsilon: float = 0.1,
        elastic: tuple[int, int] | None = None,
    ) -> None:
        if not nodes or min(nodes) < 1:
            raise ValueError(f"nodes must be at least 1, got {list(nodes)}")
        merged = Hybrid(*(drafters or (Suffix(), TokenRecycling())))
        self.drafters, self.needs = merged.drafters, merged.needs
        sizes = sorted(set(nodes), reverse=True)
        by_size = [[Strategy(d, n) for d in range(len(self.drafters) if n > 1 else 1)] for n in sizes]
        if thresholds is None:
            self.bandit = BegMab([[s for group in by_size for s in group]], [1], epsilon)
        else:
            self.bandit = BegMab(by_size, thresholds, epsilon)
        if elastic is not None:
            Elastic(*elastic)
        self.elastic = elastic

    def begin(self, request: DraftRequest) -> BanditSession:
        return BanditSession(self, request)


class BanditSession:
    def __init__(self, options: Bandit, request: DraftRequest) -> None:
        self._bandit = options.bandit
        self._elastic = None if options.elastic is None else Elastic(*options.elastic)
        self._sessions: list[DraftSession] = [drafter.begin(request) for drafter in options.drafters]
        self._last = [int(prompt[-1]) for prompt in request.prompts]
        self._strategy: Strategy | None = None
        self._begun = 0.0

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        self._begun = time.perf_counter()
        running = sum(budget > 1 for budget in budgets)
        self._strategy = None
        if self._elastic is None or self._elastic.active(running):
            self._strategy = self._bandit.select(len(budgets))
        if self._strategy is None or self._strategy.nodes == 1:
            return [RowTree.root(token) for token in self._last]
        return self._sessions[self._strategy.drafter].propose([min(b, self._strategy.nodes) for b in budgets])

    def observe(self, verified: Verified) -> None:
        self._last = [tokens[-1] if tokens else last for tokens, last in zip(verified.emitted, self._last, strict=True)]
        for d, session in enumerate(self._sessions):
            mine = self._strategy is None or self._strategy.nodes == 1 or d == self._strategy.drafter
            session.observe(verified if mine else foreign(verified))
        if self._strategy is not None:
            emitted = sum(map(len, verified.emitted))
            self._bandit.record(len(self._last), self._strategy, emitted, time.perf_counter() - self._begun)

    def keep(self, rows: Sequence[int]) -> None:
        self._last = [self._last[row] for row in rows]
        for session in self._sessions:
            session.keep(rows)

    def close(self) -> None:
        for session in self._sessions:
            session.close()
