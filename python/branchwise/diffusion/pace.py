"""How many states a forward should verify, by what forwards cost and how often states are reached."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from ..decoding.tree_size import CostModel

LEAST_CHANCE = 0.02  # of states that are looked at
_LOOK = 16  # forwards after which costs are looked at again
_MOST, _MORE = 64, 2  # states to look at, and beyond those that paid lately


class Pace:
    """Of one call, or of the rows that go through forwards together.

    Attributes:
        rows: that share a forward.
        room: states that are worth looking at, as many as paid lately and some more.
    """

    def __init__(self, cost: CostModel) -> None:
        self._cost, self.rows, self.room = cost, 1, _MOST
        self._chosen = 0  # the most since costs were looked at
        self._seconds: dict[tuple[int, int, int], list[float]] = {}  # of forwards with 1, 2, .. states
        self._forwards = 0

    def observe(self, tokens: int, seconds: float) -> None:
        """A forward of so many tokens, with what is done between it and the next."""
        self._cost.observe(tokens, seconds)
        self._forwards += 1
        if self._forwards % _LOOK == 0:
            self._seconds.clear()
            self.room, self._chosen = self._chosen + _MORE, 0

    def states(self, chances: Sequence[float], before: int, each: int) -> int:
        """How many states give the most steps per second; all of them, where that size has not been tried of late.

        Args:
            chances: that a state is reached, of the states behind the certain one; falling.
            before: tokens of a row's forward that belong to no state.
            each: tokens of a state.
        """
        count = len(chances) + 1
        key = self.rows, before, each
        seconds = self._seconds.get(key, [])
        if len(seconds) < count:
            sizes = self.rows * (before + each * np.arange(1, count + 1))
            if not self._cost.knows(int(sizes[-1])):
                self._chosen = _MOST
                return count
            seconds = self._seconds[key] = self._cost.seconds(sizes).tolist()
        steps = accumulate(chances, initial=1.0)
        rates = [step / time for step, time in zip(steps, seconds[:count], strict=True)]
        best = 1 + rates.index(max(rates))
        self._chosen = max(self._chosen, best)
        return best
