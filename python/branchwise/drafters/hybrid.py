"""Several drafters, one tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .. import _host
from ..tree import FOREIGN, DrawKind, RowTree
from .base import Drafter, DraftRequest, DraftSession, Needs, Verified
from .early_exit import EarlyExit


class Hybrid:
    """Merges what several drafters propose: equal paths become one, the likeliest nodes stay.

    Args:
        drafters: in the order in which they are asked; each a :class:`Drafter` that is deterministic and has its nodes
            verified by the whole target.
        enough: expected accepted tokens of a row's tree from which on the drafters that follow are not asked for it,
            which is for costly ones; None asks all.

    Raises:
        ValueError: no drafters, or one that draws or exits early.
    """

    draws = DrawKind.DETERMINISTIC

    def __init__(self, *drafters: Drafter, enough: float | None = None) -> None:
        if not drafters:
            raise ValueError("drafters must name at least one, got none")
        for drafter in drafters:
            if drafter.draws is not DrawKind.DETERMINISTIC or isinstance(drafter, EarlyExit):
                raise ValueError(
                    f"drafters must be deterministic and leave the target alone, got {type(drafter).__name__}"
                )
        self.drafters, self.enough = drafters, enough
        self.needs = Needs.NOTHING
        for drafter in drafters:
            self.needs |= drafter.needs

    def begin(self, request: DraftRequest) -> HybridSession:
        return HybridSession([drafter.begin(request) for drafter in self.drafters], self.enough)


class HybridSession:
    def __init__(self, sessions: list[DraftSession], enough: float | None) -> None:
        self._sessions, self._enough = sessions, enough
        self._names: list[np.ndarray] = []  # per row, see merge

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        proposals: list[list[RowTree]] = []
        open_budgets = list(budgets)
        for session in self._sessions:
            proposals.append(session.propose(open_budgets))
            if self._enough is not None:
                for b, tree in enumerate(proposals[-1]):
                    if tree.scores[1:].sum() >= self._enough:
                        open_budgets[b] = 1
        self._names, merged = [], []
        for trees, budget in zip(zip(*proposals, strict=True), budgets, strict=True):
            tree, names = merge(trees, budget)
            merged.append(tree)
            self._names.append(names)
        return merged

    def observe(self, verified: Verified) -> None:
        for d, session in enumerate(self._sessions):
            session.observe(as_seen_by(d, verified, self._names))

    def keep(self, rows: Sequence[int]) -> None:
        self._names = [self._names[row] for row in rows] if self._names else []
        for session in self._sessions:
            session.keep(rows)

    def close(self) -> None:
        for session in self._sessions:
            session.close()


def as_seen_by(d: int, verified: Verified, names: Sequence[np.ndarray]) -> Verified:
    """``verified`` with the d-th drafter's own names for the nodes; ``names``: per row, see :func:`merge`."""
    if verified.tree is None or not names:
        return verified
    tree = verified.tree
    return replace(
        verified, tree=tree.named(lambda: [own[d, row.ids] for row, own in zip(tree.rows, names, strict=True)])
    )


def foreign(verified: Verified) -> Verified:
    """``verified`` as a drafter sees it whose trees were not used."""
    if verified.tree is None:
        return verified
    tree = verified.tree
    return replace(verified, tree=tree.named(lambda: [np.full(len(row), FOREIGN, np.int32) for row in tree.rows]))


def merge(trees: Sequence[RowTree], budget: int, factors: np.ndarray | None = None) -> tuple[RowTree, np.ndarray]:
    """One tree: equal paths once. A node's chance behind its parent lies halfway between the mean of what the trees say
    that have children of the parent, weighted by all that they expect of these, and the largest; cut where siblings
    together would be likelier than their parent.

    Args:
        trees: of one row, with the same root.
        budget: nodes.
        factors: f32[2**trees], what a node's chance behind its parent is multiplied by, by the set of trees that have
            it (bit d: ``trees[d]``); None for 1.

    Returns:
        A tree of at most ``budget`` nodes, best first after the fixed ones, its ``ids`` counting up; and i32[trees,
        nodes], by those ids, what each tree calls its nodes: :data:`branchwise.tree.FOREIGN` where it has none.
    """
    drafts = [(tree.tokens, tree.parents, tree.scores, tree.fixed, tree.ids) for tree in trees]
    tokens, parents, scores, fixed, names = _host.merge_drafts(drafts, budget, factors)
    return RowTree(tokens, parents, scores, ids=np.arange(len(tokens), dtype=np.int32), fixed=fixed), names
