"""The controller: asks the drafters that pay, merges what they propose, verifies what pays, down to nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ..drafters import Drafter, DraftRequest, DraftSession, Hybrid, Suffix, TokenRecycling, Trie, Verified, make_drafter
from ..drafters.hybrid import as_seen_by, foreign, merge
from ..drafters.ranks import RankChances
from ..tree import FOREIGN, DrawKind, RowTree
from .profile import Profile
from .sources import MOST, Sources
from .tree_size import Calibration, CostModel, Record, best_size, cost_model, places_of

_LEAST_BUDGET, _LEAST_NODES = 6, 32  # nodes that are proposed where few pay: per row, and in all
# What a cheap drafter brings costs about as much to know as to use, so it is not asked in every round.
_CHEAP, _WEIGH_EVERY = 0.05, 4  # of a forward; rounds

# After so many rounds in which no draft promised a gain worth mentioning, drafters are asked in every few rounds only.
_QUIET, _WORTH, _DOZE = 8, 1.01, 4


class Auto:
    """Chooses drafters and tree sizes by what they bring per second: on this machine, for this model, batch and text.

    The trees of the drafters are merged by their scores, weighed by who agrees with whom. What a score is worth, the
    chance of acceptance, is learned from what was observed for such scores; the tree is cut to the size with the most
    expected tokens per second, given the measured seconds of forwards by size; that size may be a single token. A
    drafter that costs more than it adds is left alone after a trial, and tried again after 4, 8, ... 256 rounds; where
    nothing paid in eight rounds, all are asked in every fourth only. Choices depend on past rounds only, so they bias
    nothing.

    Args:
        drafters: deterministic ones that leave the target alone; by default suffix, trie and token recycling. Add
            ``Model(draft_model)`` if you have one.
        profile: a file that :meth:`save` or ``branchwise tune`` wrote, to start from what was learned for this model
            and task on this machine; a file that does not exist is no error.
        task: a tag of your choice for the kind of texts, such as "code".

    Raises:
        ValueError: an unsuitable drafter, more than 12 of them, or a file that is not a profile.
    """

    draws = DrawKind.DETERMINISTIC

    def __init__(self, *drafters: Drafter, profile: str | os.PathLike[str] | None = None, task: str = "") -> None:
        merged = Hybrid(*(drafters or (Suffix(), Trie(), TokenRecycling())))
        self.drafters, self.needs = merged.drafters, merged.needs
        self.records = {name: Record() for name in unique_names(self.drafters)}
        if len(self.drafters) > MOST:
            raise ValueError(f"drafters must be at most {MOST}, got {len(self.drafters)}")
        self.calibration, self.sources = Calibration(), Sources(len(self.drafters))
        self.task = task
        self._profile = None if profile is None else Profile(profile)
        self.lock = threading.Lock()

    def begin(self, request: DraftRequest) -> AutoSession:
        if self._profile is not None and request.target is not None:
            learned = self._profile.find(request.target, self.task)
            self._profile = None  # later calls go on from what this one learned
            if learned is not None:
                self._restore(learned, cost_model(request.target))
        return AutoSession(self, request)

    def save(self, path: str | os.PathLike[str], model: PreTrainedModel) -> None:
        """Adds what was learned for ``model`` and this object's task to a profile, which is made if need be."""
        with self.lock:
            learned = {
                "calibration": self.calibration.state(),
                "sources": self.sources.state(),
                "records": {name: asdict(record) for name, record in self.records.items()},
                "ranks": {name: ranks.state() for name, ranks in self._ranks().items()},
                "cost": cost_model(model).state(),
            }
        Profile(path).put(model, self.task, learned)

    def _restore(self, learned: Any, cost: CostModel) -> None:
        with self.lock:
            self.calibration.restore(learned["calibration"])
            if "sources" in learned and list(learned["records"]) == list(self.records):
                self.sources.restore(learned["sources"])
            for name, record in learned["records"].items():
                if name in self.records:  # this one may have other drafters
                    for key, value in record.items():
                        setattr(self.records[name], key, value)
            ranks = self._ranks()
            for name, saved in learned.get("ranks", {}).items():
                if name in ranks:
                    ranks[name].restore(saved)
            cost.restore(learned["cost"])

    def _ranks(self) -> dict[str, RankChances]:
        """What drafters themselves learned of their trees."""
        found = {name: getattr(d, "ranks", None) for name, d in zip(self.records, self.drafters, strict=True)}
        return {name: ranks for name, ranks in found.items() if isinstance(ranks, RankChances)}


class AutoSession:
    def __init__(self, auto: Auto, request: DraftRequest) -> None:
        self._auto, self._lock = auto, auto.lock
        self._sessions: list[DraftSession] = [drafter.begin(request) for drafter in auto.drafters]
        self._records = list(auto.records.values())
        self._cost = CostModel() if request.target is None else cost_model(request.target)
        self._last = [int(prompt[-1]) for prompt in request.prompts]
        self._asked: list[int] = []  # the drafters of this round
        self._proposals: list[list[RowTree]] = []  # of each of them, by row
        self._names: list[np.ndarray] = []  # by row, see merge
        self._factors = np.ones(1, np.float32)  # of this round, see merge
        self._spent: list[float] = []  # seconds by drafter, this round
        self._budget = 1 << 10  # of the next round
        self._quiet = 0  # rounds without a gain

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        dozing = self._quiet >= _QUIET and self._quiet % _DOZE > 0
        self._quiet += dozing
        with self._lock:
            self._asked = [d for d, record in enumerate(self._records) if record.wanted() and not dozing]
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
            self._names = []
            return [RowTree.root(token) for token in self._last]
        with self._lock:
            self._factors = self._auto.sources.factors(self._asked)
        merged, self._names = _merge(self._proposals, budgets, self._factors)
        size, rate = self._size(merged)
        plain = float(self._cost.seconds(np.array([len(budgets)]))[0])
        self._quiet = 0 if rate * plain > _WORTH * len(budgets) else self._quiet + 1
        self._weigh(budgets, size, rate)
        # Where few nodes pay, many are not worth proposing; where all do, there may be more.
        self._budget = max(_LEAST_BUDGET, _LEAST_NODES // len(budgets), 2 * size)
        return [tree.first(size) for tree in merged]

    def _size(self, trees: Sequence[RowTree]) -> tuple[int, float]:
        with self._lock:
            return best_size(self._auto.calibration, trees, self._cost)

    def _weigh(self, budgets: Sequence[int], size: int, rate: float) -> None:
        """What would the round be without each of the drafters?"""
        forward, single = self._cost.seconds(len(budgets) * np.array([size, 1]))
        for i, d in enumerate(self._asked):
            record, without = self._records[d], rate
            if not record.is_free(forward):
                if record.seconds < _CHEAP * forward and record.asked % _WEIGH_EVERY:
                    with self._lock:
                        record.skip(len(budgets))
                    continue
                without = self._rate_without(i, budgets) if len(self._asked) > 1 else len(budgets) / single
            with self._lock:
                record.learn(len(budgets), rate, without, forward)

    def _rate_without(self, i: int, budgets: Sequence[int]) -> float:
        others = self._asked[:i] + self._asked[i + 1 :]
        with self._lock:
            factors = self._auto.sources.factors(others)
        merged, _ = _merge(self._proposals[:i] + self._proposals[i + 1 :], budgets, factors)
        return self._size(merged)[1]

    def observe(self, verified: Verified) -> None:
        self._last = [tokens[-1] if tokens else last for tokens, last in zip(verified.emitted, self._last, strict=True)]
        for d, session in enumerate(self._sessions):
            if d not in self._asked:
                # Reading logits and hidden states is what may cost.
                trusted = self._records[d].trusted()
                seen = verified if trusted else replace(verified, logits=None, hidden_states=None)
                session.observe(foreign(seen) if self._names else seen)
            else:
                begun = time.perf_counter()
                session.observe(as_seen_by(self._asked.index(d), verified, self._names))
                self._records[d].spend(self._spent[d] + time.perf_counter() - begun)
        if verified.tree is not None:
            self._calibrate(verified, verified.tree.rows)

    def _calibrate(self, verified: Verified, trees: Sequence[RowTree]) -> None:
        scores, parents, names, hits, roots, size = [], [], [], [], [], 0
        for b, tree in enumerate(trees):
            if len(tree) == 1 or not verified.emitted[b] or tree.ids is None:
                continue
            scores.append(tree.scores)
            parents.append(size + tree.parents)
            names.append(self._names[b][:, tree.ids])
            hits += [size + node for node in verified.path(b)]
            roots.append(size)
            size += len(tree)
        if not scores:
            with self._lock:
                self._auto.calibration.observe(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, bool))
            return
        accepted, drafted = np.zeros(size, bool), np.ones(size, bool)
        accepted[hits], accepted[roots], drafted[roots] = True, True, False
        score, parent = np.concatenate(scores), np.concatenate(parents)[drafted]
        tried, above = accepted[parent], score[parent]
        accepted, score = accepted[drafted], score[drafted]
        own = np.concatenate(names, 1)[:, drafted] != FOREIGN
        for d, nodes, kept in zip(self._asked, own.sum(1).tolist(), (own & accepted).sum(1).tolist(), strict=True):
            self._records[d].drafted += nodes
            self._records[d].accepted += kept
        places = places_of(np.array([len(each) for each in scores]))
        sets = (own << np.arange(len(own))[:, None]).sum(0)
        promised = np.divide(score, above, out=np.zeros_like(score), where=above > 0) / self._factors[sets]
        sets = (own << np.array(self._asked)[:, None]).sum(0)
        with self._lock:
            self._auto.calibration.observe(score, places[drafted], accepted)
            self._auto.sources.observe(sets[tried], promised[tried], accepted[tried])

    def keep(self, rows: Sequence[int]) -> None:
        self._names, self._last = [], [self._last[row] for row in rows]
        for session in self._sessions:
            session.keep(rows)

    def close(self) -> None:
        for session in self._sessions:
            session.close()


def _merge(
    proposals: Sequence[Sequence[RowTree]], budgets: Sequence[int], factors: np.ndarray
) -> tuple[list[RowTree], list[np.ndarray]]:
    """One tree per row, and what its nodes are called; see :func:`branchwise.drafters.hybrid.merge`."""
    pairs = [merge(trees, budget, factors) for trees, budget in zip(zip(*proposals, strict=True), budgets, strict=True)]
    return [tree for tree, _ in pairs], [names for _, names in pairs]


def unique_names(drafters: Sequence[Drafter]) -> list[str]:
    """Class names, numbered where they repeat."""
    names: list[str] = []
    for drafter in drafters:
        name = type(drafter).__name__
        names.append(name if name not in names else f"{name} {len(names) + 1}")
    return names


def drafter_of(drafter: str | Drafter) -> Drafter:
    """A drafter by name, "auto" among them, or the given one."""
    return Auto() if drafter == "auto" else make_drafter(drafter)
