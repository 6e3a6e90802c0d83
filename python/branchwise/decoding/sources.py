"""What it says about a node which drafters propose it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST = 12  # drafters, as every set of them is counted
_FORGET = 0.98  # per round
_PRIOR = 4.0  # nodes


class Sources:
    """A factor for a node's chance behind its accepted parent, by the set of drafters that have the node: accepted
    nodes over those that their scores promised, learned from 1.

    Where drafters agree, they are right more often than their merged scores say, and where one stands alone among
    others, less often. A node is judged only where its parent was accepted: whether its path came true up to
    there is other nodes' merit.

    Args:
        drafters: how many there are.
    """

    def __init__(self, drafters: int) -> None:
        self._accepted, self._promised = np.zeros(1 << drafters), np.zeros(1 << drafters)

    def factors(self, asked: Sequence[int]) -> np.ndarray:
        """f32[2**len(asked)] for :func:`branchwise.drafters.hybrid.merge`, for trees of the drafters ``asked``."""
        sets = np.zeros(1, np.int64)
        for d in asked:
            sets = np.concatenate([sets, sets | 1 << d])
        return ((self._accepted[sets] + _PRIOR) / (self._promised[sets] + _PRIOR)).astype(np.float32)

    def observe(self, sets: np.ndarray, promised: np.ndarray, accepted: np.ndarray) -> None:
        """Nodes whose parents were accepted, of one round.

        Args:
            sets: i64[n], bit d: the d-th drafter has the node.
            promised: [n] chances behind the parent, before any factor.
            accepted: bool[n].
        """
        n = len(self._accepted)
        self._accepted = _FORGET * self._accepted + np.bincount(sets, accepted, n)
        self._promised = _FORGET * self._promised + np.bincount(sets, promised, n)

    def state(self) -> dict[str, list[float]]:
        """For :meth:`restore`."""
        return {"accepted": self._accepted.tolist(), "promised": self._promised.tolist()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Goes on from what was learned before, of the same drafters."""
        self._accepted, self._promised = np.array(state["accepted"]), np.array(state["promised"])
