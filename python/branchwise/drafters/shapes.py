"""Tree shapes from how often the k-th child is the right one (Sequoia; card tree-verify, "Sequoia static tree")."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np


@lru_cache(maxsize=64)
def best_shape(chances: tuple[float, ...], nodes: int, depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tree of at most ``nodes`` nodes with the most expected tokens, by Sequoia's dynamic program.

    Args:
        chances: that the k-th child of a node is accepted given that the node was, first child first.
        nodes: root included.
        depth: levels below the root.

    Returns:
        Parents (-1 for the root) and ranks among siblings (the root's is 0), level by level.

    Raises:
        ValueError: ``nodes`` or ``depth`` below 1, or a chance outside [0, 1].
    """
    if nodes < 1 or depth < 1:
        raise ValueError(f"nodes and depth must be at least 1, got {nodes} and {depth}")
    if not all(0 <= p <= 1 for p in chances):
        raise ValueError(f"chances must lie between 0 and 1, got {chances}")
    if all(a >= b for a, b in pairwise(chances)):
        return _greedy(chances, nodes, depth)
    return _program(chances, nodes, depth)


def expected_tokens(chances: Sequence[float], parents: Sequence[int], ranks: Sequence[int]) -> float:
    """1 for the target's own token, plus the chance of every drafted node."""
    value = np.ones(len(parents))
    for node in range(1, len(parents)):
        value[node] = value[parents[node]] * chances[ranks[node]]
    return float(value.sum())


def _greedy(chances: Sequence[float], nodes: int, depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    # Where later children are never likelier, the likeliest next node is always right: O(n log n).
    found: list[tuple[float, int, int, int]] = []  # -chance, parent, rank, level
    tree = [(-1, 0, 0)]  # parent, rank, level

    def offer(node: int, value: float, rank: int, level: int) -> None:
        if rank < len(chances) and level <= depth and chances[rank] > 0:
            heapq.heappush(found, (-value * chances[rank], node, rank, level))

    values = [1.0]
    offer(0, 1.0, 0, 1)
    while found and len(tree) < nodes:
        negative, parent, rank, level = heapq.heappop(found)
        tree.append((parent, rank, level))
        values.append(-negative)
        offer(len(tree) - 1, -negative, 0, level + 1)
        offer(parent, values[parent], rank + 1, level)
    return _by_level(tree)


def _program(chances: Sequence[float], nodes: int, depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    # value[l][b][m]: most expected tokens of a tree of m nodes, l levels below its root, and exactly b children.
    most = len(chances)
    worst = -1e9  # finite: it is multiplied by chances of 0
    value = np.full((depth + 1, most + 1, nodes + 1), worst)
    size = np.zeros((depth + 1, most + 1, nodes + 1), np.int64)  # nodes in the last child's subtree
    value[:, 0, 1] = 1.0
    best = np.full((depth + 1, nodes + 1), worst)  # over b
    best[0] = value[0].max(0)
    for level in range(1, depth + 1):
        for b in range(1, most + 1):
            for m in range(2, nodes + 1):
                # y nodes stay with the root and its first b - 1 children
                options = value[level, b - 1, 1:m] + chances[b - 1] * best[level - 1, m - 1 : 0 : -1]
                y = int(options.argmax())
                value[level, b, m], size[level, b, m] = options[y], m - 1 - y
        best[level] = value[level].max(0)
    tree: list[tuple[int, int, int]] = []

    def build(parent: int, rank: int, depth_left: int, m: int, at: int) -> None:
        tree.append((parent, rank, at))
        me, b = len(tree) - 1, int(value[depth_left, :, m].argmax())
        parts = []
        while b > 0:
            parts.append((b - 1, int(size[depth_left, b, m])))
            m, b = m - parts[-1][1], b - 1
        for child, count in reversed(parts):
            build(me, child, depth_left - 1, count, at + 1)

    build(-1, 0, depth, int(best[depth].argmax()), 0)
    return _by_level(tree)


def _by_level(tree: list[tuple[int, int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    order = sorted(range(len(tree)), key=lambda node: (tree[node][2], node))
    place = {node: i for i, node in enumerate(order)}
    parents = tuple(place[tree[node][0]] if node else -1 for node in order)
    return parents, tuple(tree[node][1] for node in order)
