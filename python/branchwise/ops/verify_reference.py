"""The acceptance rules as written on card tree-verify, in Python and fp64: the oracle of the ops in verify.py.

Every decision goes through a :class:`Chance`, so the same code runs on given uniforms, to be compared with the ops,
and on all branches with their probabilities, to be compared with the target's law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

NO_MASS = 1e-12
Row = np.ndarray  # f64[V]


class Chance(Protocol):
    def accept(self, node: int, probability: float) -> bool:
        """The node's coin falls below the probability."""
        ...

    def draw(self, node: int, weights: Row) -> int:
        """A token in proportion to the weights."""
        ...


class Uniforms:
    """Given uniforms f32[T, 2]. ``margin`` is how close the closest decision was, for comparing with fp32."""

    def __init__(self, uniforms: np.ndarray) -> None:
        self.uniforms, self.margin = uniforms.astype(np.float64), np.inf

    def accept(self, node: int, probability: float) -> bool:
        coin = self.uniforms[node, 0]
        self.margin = min(self.margin, abs(coin - probability))
        return bool(coin < probability)

    def draw(self, node: int, weights: Row) -> int:
        edges = np.cumsum(weights) / weights.sum()
        coin = self.uniforms[node, 1]
        self.margin = min(self.margin, np.abs(edges[edges < 1] - coin).min(initial=np.inf))
        positive = np.flatnonzero(weights > 0)
        return int(min(np.searchsorted(edges, coin, side="right"), positive[-1]))


class Tree:
    """One row: children of every node in draw order, their tokens, the target's law ``p[node]`` and the draft's
    ``q[node]``."""

    def __init__(
        self, tokens: Sequence[int], parents: Sequence[int], p: Sequence[Row], q: Sequence[Row | None]
    ) -> None:
        self.tokens, self.p, self.q = tokens, p, q
        self.children: list[list[int]] = [[] for _ in tokens]
        for node, parent in enumerate(parents):
            if parent >= 0:
                self.children[parent].append(node)


Verdict = tuple[list[int], int]  # the path, root first, and the bonus token


def _walk(decide: Callable[[int], tuple[int | None, int]]) -> Verdict:
    path = [0]
    while True:
        child, bonus = decide(path[-1])
        if child is None:
            return path, bonus
        path.append(child)


def _child_with(tree: Tree, node: int, token: int) -> int | None:
    return next((c for c in tree.children[node] if tree.tokens[c] == token), None)


def greedy(tree: Tree, chance: Chance) -> Verdict:
    """Rule A."""

    def decide(node: int) -> tuple[int | None, int]:
        token = int(np.argmax(tree.p[node]))
        return _child_with(tree, node, token), token

    return _walk(decide)


def match(tree: Tree, chance: Chance) -> Verdict:
    """Rule F."""

    def decide(node: int) -> tuple[int | None, int]:
        token = chance.draw(node, tree.p[node])
        return _child_with(tree, node, token), token

    return _walk(decide)


def each_child(tree: Tree, chance: Chance) -> Verdict:
    """Rule E. A rejected token keeps its mass if there is no other."""

    def decide(node: int) -> tuple[int | None, int]:
        left = tree.p[node].copy()
        for child in tree.children[node]:
            token = tree.tokens[child]
            if chance.accept(child, left[token] / left.sum()):
                return child, 0
            left = _without(left, token)
        return None, chance.draw(node, left)

    return _walk(decide)


def one_coin(tree: Tree, chance: Chance, threshold_single: float = 1.0, threshold_accumulated: float = 1.0) -> Verdict:
    """Rule E with one coin per node; rule J with thresholds below 1."""

    def decide(node: int) -> tuple[int | None, int]:
        p, cumulative = tree.p[node], 0.0
        seen: list[int] = []
        for child in tree.children[node]:
            token = tree.tokens[child]
            if token in seen:
                continue
            seen.append(token)
            cumulative += p[token]
            if p[token] >= threshold_single or chance.accept(node, cumulative / threshold_accumulated):
                return child, 0
        left = p
        for token in seen:
            left = _without(left, token)
        return None, chance.draw(node, left)

    return _walk(decide)


def _without(left: Row, token: int) -> Row:
    rest = left.copy()
    rest[token] = 0
    return rest if rest.sum() > NO_MASS * left.sum() else left


def _reject(target: Row, draft: Row, accepted: float, token: int, replacement: bool) -> tuple[Row, Row, float]:
    """Target and draft after a rejection, normalised, and the target's mass before that (0: it stays as it was)."""
    rest = np.maximum(accepted * target - draft, 0)
    mass = float(rest.sum())
    if not replacement:
        draft = draft.copy()
        draft[token] = 0
        draft = draft / draft.sum() if draft.sum() > 0 else draft
    return (rest / mass, draft, mass) if mass > NO_MASS else (target, draft, 0.0)


def multi_draft(tree: Tree, chance: Chance, replacement: bool) -> Verdict:
    """Rules C and D, and B for one child per node."""

    def decide(node: int) -> tuple[int | None, int]:
        target, draft = tree.p[node], tree.q[node]
        for child in tree.children[node]:
            token = tree.tokens[child]
            assert draft is not None
            if draft[token] <= 0:
                continue
            if chance.accept(child, target[token] / draft[token]):
                return child, 0
            target, draft, _ = _reject(target, draft, 1.0, token, replacement)
        return None, chance.draw(node, target)

    return _walk(decide)


def traversal(tree: Tree, chance: Chance, replacement: bool) -> Verdict:
    """Rule H, and G for a chain."""

    def visit(node: int, accepted: float) -> Verdict | None:
        target, draft = tree.p[node], tree.q[node]
        for child in tree.children[node]:
            token = tree.tokens[child]
            assert draft is not None
            if draft[token] <= 0:
                continue
            found = visit(child, min(1.0, accepted * target[token] / draft[token]))
            if found is not None:
                return [node, *found[0]], found[1]
            target, draft, mass = _reject(target, draft, accepted, token, replacement)
            if mass > 0:
                accepted = mass / (mass + 1 - accepted)
            elif accepted < 1:
                accepted = 0.0
        if node == 0 or chance.accept(node, accepted):
            return [node], chance.draw(node, target)
        return None

    found = visit(0, 1.0)
    assert found is not None
    return found


def entropy(p: Row) -> float:
    """In nats."""
    return -float((p[p > 0] * np.log(p[p > 0])).sum())


def typical(tree: Tree, chance: Chance, epsilon: float = 0.09, alpha: float = 0.3) -> Verdict:
    """Rule I."""
    reached: list[tuple[list[int], float]] = [([0], 0.0)]
    for path, likelihood in reached:
        p = tree.p[path[-1]]
        floor = min(epsilon, alpha * np.exp(-entropy(p)))
        reached += [
            ([*path, child], likelihood + np.log(p[tree.tokens[child]]))
            for child in tree.children[path[-1]]
            if p[tree.tokens[child]] > floor
        ]
    best = max(reached, key=lambda found: (len(found[0]), found[1]))[0]
    return best, chance.draw(best[-1], tree.p[best[-1]])


def policy(
    tree: Tree,
    chance: Chance,
    name: str,
    threshold: float = 0.0,
    alpha: float = 0.3,
    top_k: int = 20,
    first_only: bool = False,
) -> Verdict:
    """The tests of :func:`branchwise.ops.verify_policy`."""
    trusted = False

    def decide(node: int) -> tuple[int | None, int]:
        nonlocal trusted
        p = tree.p[node]
        choice = int(np.argmax(p))
        likeliest = np.argsort(-p, kind="stable")[:top_k]
        for child in tree.children[node]:
            token = tree.tokens[child]
            if name == "greedy_match":
                passes = token == choice
            elif name == "surprisal":
                passes = trusted or p[token] >= np.exp(-threshold)
                if not passes and token == choice:
                    passes, trusted = True, first_only
            elif name == "probability_floor":
                passes = p[token] >= threshold and token in likeliest
            else:
                passes = p[token] > min(threshold, alpha * np.exp(-entropy(p)))
            if passes:
                return child, 0
        if name in ("greedy_match", "surprisal"):
            return None, choice
        if name == "typical":
            return None, chance.draw(node, p)
        kept = np.zeros_like(p)
        kept[likeliest] = p[likeliest]
        return None, chance.draw(node, kept)

    return _walk(decide)
