"""TreeSizer: picks sizes that pay under known costs."""

import numpy as np

from branchwise import RowTree
from branchwise.decoding.tree_size import TreeSizer


def chain(n, score):
    return RowTree.chain(0, np.arange(1, n), score * np.ones(n - 1))


def train(sizer, slope, chance, rounds=200, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(rounds):
        size = int(rng.integers(1, 32))
        sizer.observe_time(size, 0.03 * (1 + slope * size))
        tree = chain(16, 0.5)
        sizer.observe_tree(tree, [0, *(i for i in range(1, 16) if rng.random() < chance)])


def test_learns_cost_and_chance():
    sizer = TreeSizer()
    train(sizer, slope=0.02, chance=0.1)
    assert abs(sizer.cost(16) / sizer.cost(1) - 1.32 / 1.02) < 0.05
    assert abs(sizer.chances(np.array([0.5]))[0] - 0.1) < 0.05


def test_verifies_much_when_nodes_are_cheap_and_nothing_when_they_are_dear():
    cheap, dear = TreeSizer(), TreeSizer()
    train(cheap, slope=0.001, chance=0.5)
    train(dear, slope=0.5, chance=0.05)
    assert len(cheap.choose([chain(16, 0.5)])[0]) == 16
    assert len(dear.choose([chain(16, 0.5)])[0]) == 1


def test_a_stall_does_not_change_the_estimate_much():
    sizer = TreeSizer()
    train(sizer, slope=0.02, chance=0.5)
    before = sizer.cost(16) / sizer.cost(1)
    sizer.observe_time(16, 30.0)
    assert abs(sizer.cost(16) / sizer.cost(1) - before) < 0.2


def test_rows_without_a_draft_count():
    sizer = TreeSizer()
    train(sizer, slope=0.04, chance=0.5)
    alone = len(sizer.choose([chain(16, 0.5)])[0])
    crowded = len(sizer.choose([chain(16, 0.5), *[RowTree.root(1)] * 30])[0])
    assert crowded < alone
