"""TLT's choice of a strategy by its measured reward (card tlt-adaptive, "BEG-MAB" and "Elastic activation")."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..drafters import Drafter, DraftRequest, DraftSession, Hybrid, Suffix, TokenRecycling, Verified
from ..drafters.beg_mab import BegMab
from ..drafters.hybrid import foreign
from ..tree import DrawKind, RowTree


@dataclass(frozen=True)
class Strategy:
    """A drafter, by its index, and how many nodes of its trees are verified; 1 node is plain decoding."""

    drafter: int
    nodes: int


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
