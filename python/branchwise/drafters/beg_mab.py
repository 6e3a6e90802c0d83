"""Choosing among arms by the tokens per second that they have gained (card tlt-adaptive, "BEG-MAB")."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from statistics import median
from typing import Generic, TypeVar

Arm = TypeVar("Arm", bound=Hashable)


class BegMab(Generic[Arm]):
    """Bucketed epsilon-greedy: a bandit whose arms are those that suit the batch size.

    Arms come in groups, in TLT strategies by their number of nodes: the more rows, the smaller the trees that may be
    tried. Within its group, an arm is drawn uniformly with chance ``epsilon``, else the one with the largest median
    reward, tokens per second over a window of rounds; one that was never tried comes first. Rewards are kept per size
    of the batch. Thread-safe.

    Args:
        groups: of arms.
        thresholds: batch sizes from which the groups are used, ascending, the first 1; one per group.
        epsilon: chance of exploring.
        window: rewards kept per arm and batch size.
        seed: of the exploration.

    Raises:
        ValueError: an empty group; thresholds that are not as many as groups, or do not ascend from 1; epsilon outside
            [0, 1].
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Arm]],
        thresholds: Sequence[int],
        epsilon: float = 0.1,
        window: int = 300,
        seed: int = 0,
    ) -> None:
        if not groups or not all(groups):
            raise ValueError(f"groups must hold at least one arm each, got {groups}")
        if len(groups) != len(thresholds):
            raise ValueError(f"thresholds must be one per group, {len(groups)}, got {list(thresholds)}")
        if list(thresholds) != sorted(set(thresholds)) or thresholds[0] != 1:
            raise ValueError(f"thresholds must ascend from 1, got {list(thresholds)}")
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
        self.groups, self.thresholds = [list(group) for group in groups], list(thresholds)
        self.epsilon, self.window = epsilon, window
        self._rewards: dict[tuple[int, Arm], deque[float]] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def group(self, batch_size: int) -> list[Arm]:
        """The arms for a batch of this size."""
        fitting = [i for i, threshold in enumerate(self.thresholds) if threshold <= batch_size]
        return self.groups[fitting[-1]]

    def select(self, batch_size: int) -> Arm:
        arms = self.group(batch_size)
        with self._lock:
            if len(arms) == 1:
                return arms[0]
            if self._random.random() < self.epsilon:
                return self._random.choice(arms)
            return max(arms, key=lambda arm: self._value(batch_size, arm))

    def record(self, batch_size: int, arm: Arm, emitted: int, seconds: float) -> None:
        """``emitted``: tokens that all rows gained in a round of so many seconds."""
        with self._lock:
            rewards = self._rewards.setdefault((_size_class(batch_size), arm), deque(maxlen=self.window))
            rewards.append(emitted / seconds)

    def _value(self, batch_size: int, arm: Arm) -> float:
        rewards = self._rewards.get((_size_class(batch_size), arm))
        return median(rewards) if rewards else float("inf")


def _size_class(batch_size: int) -> int:
    """Batches that share their rewards: each size to 31, then steps of 8, from 128 on of 32."""
    step = 1 if batch_size < 32 else 8 if batch_size < 128 else 32
    return batch_size // step * step
