"""Sequoia's tree shapes against all shapes."""

import random

import numpy as np
import pytest

from branchwise.drafters.ranks import RankChances
from branchwise.drafters.shapes import _program, best_shape, expected_tokens
from branchwise.tree import FOREIGN, RowTree


def best_of_all(chances, nodes, depth):
    """Most expected tokens over every tree, by brute force."""
    seen, best = set(), 1.0

    def visit(tree):
        nonlocal best
        if tree in seen:
            return
        seen.add(tree)
        value = 0.0
        for path in tree:
            chance = 1.0
            for rank in path:
                chance *= chances[rank]
            value += chance
        best = max(best, value)
        if len(tree) == nodes:
            return
        for path in tree:
            for rank in range(len(chances)):
                child = (*path, rank)
                if len(child) <= depth and child not in tree and (rank == 0 or (*path, rank - 1) in tree):
                    visit(tree | {child})

    visit(frozenset([()]))
    return best


@pytest.mark.parametrize("seed", range(60))
def test_shapes_are_the_best_ones(seed):
    rng = random.Random(seed)
    chances = tuple(round(rng.random(), 2) for _ in range(rng.randint(1, 3)))
    nodes, depth = rng.randint(1, 6), rng.randint(1, 4)
    for p in (chances, tuple(sorted(chances, reverse=True))):
        best = pytest.approx(best_of_all(p, nodes, depth), abs=1e-9)
        assert expected_tokens(p, *best_shape(p, nodes, depth)) == best
        assert expected_tokens(p, *_program(p, nodes, depth)) == best


def test_a_shape_is_a_tree_level_by_level():
    parents, ranks = best_shape((0.7, 0.3, 0.2), 40, 5)
    level = [0] * 40
    for node in range(1, 40):
        assert 0 <= parents[node] < node
        level[node] = level[parents[node]] + 1
        siblings = [m for m in range(1, node) if parents[m] == parents[node]]
        assert ranks[node] == len(siblings)
    assert level == sorted(level) and max(level) <= 5


def test_bad_arguments():
    with pytest.raises(ValueError, match="nodes and depth must be at least 1, got 0 and 2"):
        best_shape((0.5,), 0, 2)
    with pytest.raises(ValueError, match="chances must lie between 0 and 1"):
        best_shape((1.5,), 3, 2)


def test_ranks_are_counted_as_by_hand():
    """Against a count node by node, on random trees of several rows with nodes of other drafters in between."""
    rng = np.random.default_rng(0)
    trees, paths, hits, tries = [], [], np.zeros(3), np.zeros(3)
    for _ in range(40):
        n = int(rng.integers(1, 12))
        parents = np.int32([-1, *(rng.integers(0, i) for i in range(1, n))])
        ids = rng.choice([0, FOREIGN], n).astype(np.int32) if rng.random() < 0.7 else None
        path = [0] if rng.random() < 0.9 else []
        while path and (children := np.flatnonzero(parents == path[-1]).tolist()) and rng.random() < 0.7:
            path.append(int(rng.choice(children)))
        trees.append(RowTree(np.arange(n, dtype=np.int32), parents, np.ones(n, np.float32), ids=ids))
        paths.append(path)
        for parent in path:
            own = [c for c in np.flatnonzero(parents == parent).tolist() if ids is None or ids[c] != FOREIGN]
            for rank, child in enumerate(own[:3]):
                tries[rank] += 1
                hits[rank] += child in path
    ranks = RankChances(3)
    prior = 8 * 0.6 * 0.3 ** np.arange(3)
    ranks.observe(trees, paths)
    assert tries.min() > 5
    assert np.allclose(ranks.chances, (hits + prior) / (tries + 8))


def test_chances_are_measured_by_rank():
    ranks = RankChances(3)
    tree = RowTree(np.int32([1, 2, 3, 4]), np.int32([-1, 0, 0, 1]), np.ones(4, np.float32))
    for _ in range(400):
        ranks.observe([tree], [[0, 2]])  # the second child is the right one
    first, second, third = ranks.chances
    assert first < 0.1 and second > 0.9 and third == pytest.approx(0.6 * 0.09)
    assert ranks.shape(3, 2)[0] == (-1, 0, 0)
