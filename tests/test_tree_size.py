"""CostModel and TreeSizer: sizes that pay under known costs."""

import numpy as np

from branchwise import RowTree
from branchwise.decoding.tree_size import Calibration, CostModel, TreeSizer, best_size


def chain(n, score):
    return RowTree.chain(0, np.arange(1, n), score * np.ones(n - 1))


def trained(cost_of, chance, rounds=200):
    rng = np.random.default_rng(0)
    sizer = TreeSizer(CostModel())
    for _ in range(rounds):
        size = int(rng.integers(1, 33))
        sizer.cost.observe(size, 0.03 * cost_of(size) * rng.uniform(0.95, 1.05))
        sizer.observe(chain(16, 0.5), [0, *(i for i in range(1, 16) if rng.random() < chance)])
    return sizer


def test_learns_cost_and_chance():
    sizer = trained(lambda n: 1 + 0.02 * n, 0.1)
    sizes = np.array([1, 4, 16, 32])
    assert np.allclose(sizer.cost.seconds(sizes), 0.03 * (1 + 0.02 * sizes), rtol=0.1)
    assert abs(sizer.calibration.chances(np.array([0.5]), np.array([1]))[0] - 0.1) < 0.05


def test_verifies_much_when_nodes_are_cheap_and_nothing_when_they_are_dear():
    assert len(trained(lambda n: 1 + 0.001 * n, 0.5).choose([chain(16, 0.5)])[0]) == 16
    assert len(trained(lambda n: 1 + 0.5 * n, 0.05).choose([chain(16, 0.5)])[0]) == 1


def test_a_step_after_one_token_is_seen():
    """Where the second token costs half a forward and the others little, weak drafts are left alone."""
    sizer = trained(lambda n: 1.0 if n == 1 else 1.5 + 0.005 * n, 0.1)
    assert len(sizer.choose([chain(4, 0.5)])[0]) == 1
    assert len(sizer.choose([chain(16, 0.5)])[0]) == 16


def test_stalls_do_not_matter():
    sizer = trained(lambda n: 1 + 0.02 * n, 0.5)
    before = sizer.cost.seconds(np.array([1, 12]))
    sizer.cost.observe(12, 30.0)
    assert np.allclose(sizer.cost.seconds(np.array([1, 12])), before, rtol=0.1)
    fresh = CostModel()
    fresh.observe(4, 9.0)  # the only sample of its class
    fresh.observe(30, 0.05)
    assert fresh.seconds(np.array([4]))[0] <= 0.05


def test_a_machine_that_slows_down_changes_no_ratio():
    """A neighbour comes and goes: one size is measured before that only, and all are known relative to each other."""
    cost, sizes = CostModel(), np.array([16, 48, 96])
    time = {16: 1.0, 48: 1.5, 96: 2.5}
    for size in (16, 48, 96):
        for _ in range(12):
            cost.observe(size, time[size])
    for size in (16, 96):
        for _ in range(12):
            cost.observe(size, 1.25 * time[size])
    seconds = cost.seconds(sizes)
    assert np.allclose(seconds / seconds[0], [1, 1.5, 2.5], rtol=0.1)
    assert np.allclose(seconds, 1.25 * np.array([1, 1.5, 2.5]), rtol=0.1), "those of the speed of the last forwards"
    restored = CostModel()
    restored.restore(cost.state())
    assert np.allclose(restored.seconds(sizes) / restored.seconds(sizes)[0], [1, 1.5, 2.5], rtol=0.1)


def test_a_size_that_becomes_dearer_by_itself_is_noticed():
    """Although it is measured in every other forward, half of what the speed is judged by."""
    cost = CostModel()
    for dear in (1.1, 9.0):
        for _ in range(20):
            cost.observe(8, 1.0), cost.observe(64, dear)
        few, many = cost.seconds(np.array([8, 64]))
        assert np.isclose(many / few, dear, rtol=0.2)


def test_sizes_beyond_the_largest_cost_what_the_measured_ones_say():
    cost = CostModel()
    for size in (16, 32):
        cost.observe(size, 1 + 0.015 * size)
    assert np.isclose(cost.seconds(np.array([128]))[0], 1 + 0.015 * 128)
    for size in (16, 32):
        for _ in range(9):
            cost.observe(size, 1.0)
    assert cost.seconds(np.array([128]))[0] > 1.5, "two equal measurements do not make nodes free"


def test_sizes_are_known_for_a_while():
    cost = CostModel()
    cost.observe(24, 1.0), cost.observe(20, 1.0)
    assert not cost.knows(24), "one of two may have been a stall"
    cost.observe(30, 1.0)
    assert cost.knows(24) and cost.knows(17) and not cost.knows(33) and not cost.knows(16)
    for _ in range(400):
        cost.observe(8, 1.0)
    assert not cost.knows(24) and cost.knows(8)


def test_before_any_measurement():
    sizes = CostModel().seconds(np.array([1, 2, 26]))
    assert sizes[0] == 1 and sizes[1] > 1 and sizes[2] == 2


def test_rows_without_a_draft_count():
    sizer = trained(lambda n: 1 + 0.04 * n, 0.5)
    alone = len(sizer.choose([chain(16, 0.5)])[0])
    crowded = len(sizer.choose([chain(16, 0.5), *[RowTree.root(1)] * 30])[0])
    assert crowded < alone


def test_late_nodes_of_a_score_are_worth_what_they_were():
    """Twelve nodes of one score, of which the first four are accepted often and the others hardly ever."""
    rng = np.random.default_rng(1)
    learned = Calibration()
    places, scores = np.arange(1, 13), np.full(12, 0.3)
    for _ in range(200):
        learned.observe(scores, places, rng.random(12) < np.where(places < 5, 0.5, 0.05))
    chances = learned.chances(scores, places)
    assert chances[:2].min() > 0.35 and chances[9:].max() < 0.15
    assert np.allclose(learned.chances(scores[:1], np.array([1000])), chances[-1])
    again = Calibration()
    again.restore(learned.state())
    assert np.array_equal(again.chances(scores, places), chances)


def test_without_drafts_what_was_learned_fades():
    learned, none = Calibration(), np.zeros(0)
    for _ in range(50):
        learned.observe(np.full(8, 0.5), np.arange(1, 9), np.zeros(8, bool))
    before = learned.chances(np.array([0.5]), np.array([1]))[0]
    for _ in range(300):
        learned.observe(none, none.astype(np.int64), none.astype(bool))
    after = learned.chances(np.array([0.5]), np.array([1]))[0]
    assert before < 0.05 and abs(after - 0.5) < 0.1


def test_what_is_certain_stays_a_chance():
    learned = Calibration()
    for _ in range(100):  # early nodes do better than their score says, and never more than always
        learned.observe(np.full(8, 0.9), np.arange(1, 9), np.arange(1, 9) < 3)
    assert learned.chances(np.array([0.9]), np.array([1]))[0] <= 1.0


class _Known(Calibration):
    def __init__(self, chance):
        super().__init__()
        self._chance = chance

    def chances(self, scores, places):
        return np.full(len(scores), self._chance)


def test_a_batch_waits_for_its_slowest_row():
    """Rare acceptances fall to one row or another, and the batch ends with the one that had fewest."""
    cost = CostModel()
    for size in (1, 2, 16, 32):
        for _ in range(5):
            cost.observe(size, 1 + 0.002 * size)
    trees = [chain(2, 0.5)] * 16  # a second node costs 0.2 % of a forward for one row, 3 % for sixteen
    assert best_size(_Known(0.06), trees[:1], cost)[0] == 2
    assert best_size(_Known(0.06), trees, cost)[0] == 1
    assert best_size(_Known(0.5), trees, cost)[0] == 2
    size, rate = best_size(_Known(0.06), [chain(1, 0.5)] * 16, cost)
    assert size == 1 and np.isclose(rate, 16 / cost.seconds(np.array([16]))[0])  # without drafts no row waits
