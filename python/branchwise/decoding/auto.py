"""The controller: asks the drafters that pay, merges what they propose, verifies what pays, down to nothing."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..drafters import Drafter, DraftRequest, DraftSession, Hybrid, Needs, Suffix, TokenRecycling, Verified
from ..drafters.hybrid import as_seen_by, merge, own_names
from ..tree import FOREIGN, DrawKind, RowTree
from .tree_size import Calibration, CostModel, best_size, cost_model

_FREE = 0.003  # of a round: a drafter that costs less is always asked
_LEAST_BUDGET = 6
_TRIAL = 32  # rounds before a drafter may be left alone: some need to see text before they are of use
_FIRST_WAIT, _LAST_WAIT = 4, 256  # rounds until a drafter that did not pay is tried again, doubling
_RECENT = 0.9  # weight of the past in running means


@dataclass
class Record:
    """What is known about one drafter.

    Attributes:
        calibration: of its scores.
        seconds: of proposing and observing in a round; running mean.
        gain: log of the ratio of expected tokens per second with the drafter to those without; running mean.
        wait: rounds until it is tried again if it does not pay.
        idle: rounds since it was asked.
        asked: rounds in which it was.
        drafted, accepted: its nodes.
    """

    calibration: Calibration = field(default_factory=Calibration)
    seconds: float = 0.0
    gain: float = 0.0
    wait: int = _FIRST_WAIT
    idle: int = 0
    asked: int = 0
    drafted: int = 0
    accepted: int = 0

    def wanted(self) -> bool:
        return self.asked < _TRIAL or self.gain >= 0 or self.idle >= self.wait

    def learn(self, gain: float) -> None:
        probe = self.asked >= _TRIAL and self.gain < 0
        if probe and gain >= 0:
            self.gain = 0.0  # what did not pay then pays now
        else:
            self.gain = gain if self.asked == 0 else _RECENT * self.gain + (1 - _RECENT) * gain
        if self.gain >= 0:
            self.wait = _FIRST_WAIT
        elif probe:
            self.wait = min(2 * self.wait, _LAST_WAIT)
        self.asked += 1
        self.idle = 0


class Auto:
    """Chooses drafters and tree sizes by what they bring per second: on this machine, for this model, batch and text.

    What a drafter's score of a node is worth, the chance of acceptance, is learned from what was observed for such
    scores. Trees are merged by these chances and cut to the size with the most expected tokens per second, given the
    measured seconds of forwards by size; that size may be a single token. A drafter that costs more than it adds is
    left alone after a trial, and tried again after 4, 8, ... 256 rounds. Choices depend on past rounds only, so they
    bias nothing.

    Args:
        drafters: deterministic ones that leave the target alone; by default suffix and token recycling. Add
            ``Model(draft_model)`` if you have one.

    Raises:
        ValueError: an unsuitable drafter.
    """

    draws = DrawKind.DETERMINISTIC

    def __init__(self, *drafters: Drafter) -> None:
        self.drafters = Hybrid(*(drafters or (Suffix(), TokenRecycling()))).drafters
        self.needs = Needs.NOTHING
        for drafter in self.drafters:
            self.needs |= drafter.needs
        self.records = {name: Record() for name in unique_names(self.drafters)}
        self.lock = threading.Lock()

    def begin(self, request: DraftRequest) -> AutoSession:
        return AutoSession(self, request)


class AutoSession:
    def __init__(self, auto: Auto, request: DraftRequest) -> None:
        self._lock = auto.lock
        self._sessions: list[DraftSession] = [drafter.begin(request) for drafter in auto.drafters]
        self._records = list(auto.records.values())
        self._cost = CostModel() if request.target is None else cost_model(request.target)
        self._last = [int(prompt[-1]) for prompt in request.prompts]
        self._asked: list[int] = []  # the drafters of this round
        self._proposals: list[list[RowTree]] = []  # of each of them, by row
        self._sources: list[np.ndarray] = []  # by row, see merge
        self._spent: list[float] = []  # seconds by drafter, this round
        self._budget = 1 << 10  # of the next round

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        with self._lock:
            self._asked = [d for d, record in enumerate(self._records) if record.wanted()]
            for record in self._records:
                record.idle += 1
        self._spent = [0.0] * len(self._sessions)
        self._proposals = []
        budgets = [min(budget, self._budget) for budget in budgets]
        for d in self._asked:
            begun = time.perf_counter()
            self._proposals.append(self._sessions[d].propose(budgets))
            self._spent[d] += time.perf_counter() - begun
        if not self._asked:
            self._sources = []
            return [RowTree.root(token) for token in self._last]
        with self._lock:
            judged = [
                _judged(trees, self._records[d].calibration)
                for d, trees in zip(self._asked, self._proposals, strict=True)
            ]
        merged, self._sources = self._merge(judged, budgets)
        size, rate = self._size(merged)
        self._weigh(judged, budgets, size, rate)
        # Where few nodes pay, many are not worth proposing; where all do, there may be more.
        self._budget = max(_LEAST_BUDGET, 2 * size)
        return [tree.first(size) for tree in merged]

    def _merge(self, proposals: list[list[RowTree]], budgets: Sequence[int]) -> tuple[list[RowTree], list[np.ndarray]]:
        pairs = [merge(trees, budget) for trees, budget in zip(zip(*proposals, strict=True), budgets, strict=True)]
        return [tree for tree, _ in pairs], [sources for _, sources in pairs]

    def _size(self, trees: Sequence[RowTree]) -> tuple[int, float]:
        return best_size([(tree.scores[1:], tree.fixed) for tree in trees], self._cost)

    def _weigh(self, judged: list[list[RowTree]], budgets: Sequence[int], size: int, rate: float) -> None:
        """What would the round be without each of the drafters that are not free?"""
        seconds = float(self._cost.seconds(np.array([len(budgets) * size]))[0])
        for i, d in enumerate(self._asked):
            share = self._records[d].seconds / seconds
            gain = 0.0
            if share > _FREE:
                others = judged[:i] + judged[i + 1 :]
                trees = self._merge(others, budgets)[0] if others else [RowTree.root(0)] * len(budgets)
                gain = math.log(rate / self._size(trees)[1]) - math.log1p(share)
            with self._lock:
                self._records[d].learn(gain)

    def observe(self, verified: Verified) -> None:
        self._last = [tokens[-1] if tokens else last for tokens, last in zip(verified.emitted, self._last, strict=True)]
        names = []
        for b, sources in enumerate(self._sources):
            own = own_names([trees[b] for trees in self._proposals], sources)
            everyone = np.full((len(self._sessions), own.shape[1]), FOREIGN, np.int32)
            everyone[self._asked] = own
            names.append(everyone)
        for d, session in enumerate(self._sessions):
            seen = as_seen_by(d, verified, names)
            if names and d not in self._asked:
                seen = replace(seen, logits=None, hidden_states=None)  # reading them is what costs
            begun = time.perf_counter()
            session.observe(seen)
            if names and d in self._asked:
                spent = self._spent[d] + time.perf_counter() - begun
                record = self._records[d]
                record.seconds = spent if record.asked < 2 else _RECENT * record.seconds + (1 - _RECENT) * spent
        if verified.tree is not None and self._sources:
            self._calibrate(verified, verified.tree.rows)

    def _calibrate(self, verified: Verified, trees: Sequence[RowTree]) -> None:
        for b, (tree, sources) in enumerate(zip(trees, self._sources, strict=True)):
            if len(tree) == 1 or not verified.emitted[b] or tree.ids is None:
                continue
            hit = np.zeros(len(tree), bool)
            hit[verified.path(b)] = True
            for i, d in enumerate(self._asked):
                nodes = sources[i, tree.ids[1:]]  # of the drafter's own tree, -1 where it had none
                own = nodes >= 0
                with self._lock:
                    record = self._records[d]
                    record.calibration.observe(self._proposals[i][b].scores[nodes[own]], hit[1:][own])
                    record.drafted += int(own.sum())
                    record.accepted += int(hit[1:][own].sum())

    def keep(self, rows: Sequence[int]) -> None:
        self._sources, self._last = [], [self._last[row] for row in rows]
        for session in self._sessions:
            session.keep(rows)

    def close(self) -> None:
        for session in self._sessions:
            session.close()


def _judged(trees: Sequence[RowTree], calibration: Calibration) -> list[RowTree]:
    """The trees with chances for scores."""
    chances = calibration.chances(np.concatenate([tree.scores for tree in trees])).astype(np.float32)
    ends = np.cumsum([len(tree) for tree in trees])
    return [
        RowTree(tree.tokens, tree.parents, chances[end - len(tree) : end], ids=tree.ids, fixed=tree.fixed)
        for tree, end in zip(trees, ends, strict=True)
    ]


def unique_names(drafters: Sequence[Drafter]) -> list[str]:
    """Class names, numbered where they repeat."""
    names: list[str] = []
    for drafter in drafters:
        name = type(drafter).__name__
        names.append(name if name not in names else f"{name} {len(names) + 1}")
    return names
