"""Guesses about a text's next states, what they learn from, and how many of them pay."""

from itertools import product

import numpy as np
import pytest

from branchwise.decoding.tree_size import CostModel
from branchwise.diffusion import FreeDave
from branchwise.diffusion.chances import ChainChances, Chances, Neighbours, mix
from branchwise.diffusion.guesses import Guesser
from branchwise.diffusion.pace import Pace

CHOICES = [[10 + 4 * i, 11 + 4 * i, 12 + 4 * i, 13 + 4 * i] for i in range(6)]
SAID = [[0.6, 0.2, 0.1, 0.05], [0.5, 0.3, 0.1, 0.05], [0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]] + [[0.3] * 4] * 2


def guesser(neighbours=None, masked=(1, 2, 3), scores=None, blocks=(0, 0, 0, 0, 1, 1), table=None):
    scores = [row[0] for row in SAID] if scores is None else scores
    neighbours = neighbours or Neighbours()
    return Guesser(masked, blocks, scores, CHOICES, SAID, table or Chances(), neighbours)


def test_the_likeliest_states_come_first_and_sum_up():
    """All states of a block, by exhaustion over orders and tokens: chances are products of the table's shares."""
    table = Chances()
    g = guesser(table=table)
    first = g.first(0, 10)
    found = g.grow(first, 10**6, 0.0)
    assert [guess.chance for guess in found] == sorted((guess.chance for guess in found), reverse=True)

    def share(entry, i):
        return entry[i] / sum(entry)

    expected = {}
    scores = dict(zip(range(6), [row[0] for row in SAID], strict=True))

    def walk(added, chance):
        if added:
            key = frozenset(added.items())
            expected[key] = max(expected.get(key, 0.0), chance)
        left = sorted({1, 2, 3} - set(added), key=lambda i: (-scores[i], i))
        if not left:
            return
        lead = scores[left[1]] / scores[left[0]] if len(left) > 1 else 0.0
        depth = len(added) + 1
        for rank, token in product(range(len(left)), range(3)):
            at = left[rank]
            p = share(table.of_ranks(depth, lead), rank) * share(table.of_tokens(depth, SAID[at][0]), token)
            walk({**added, at: CHOICES[at][token]}, chance * p)

    walk({}, 1.0)
    assert {frozenset(guess.added.items()): pytest.approx(guess.chance) for guess in found} == expected
    few = g.grow(first, 7, 0.0)
    assert [guess.added for guess in few] == [guess.added for guess in found[:7]]
    assert all(guess.chance >= 0.1 for guess in g.grow(first, 100, 0.1))


def test_steps_stay_in_their_block_and_where_the_model_was_asked():
    g = guesser(masked=(3, 4, 5))
    first = g.first(2, 18)
    assert g.left(first) == [3]
    after = g.grow(first, 1, 0.0)[0]
    assert list(after.added) == [3] and g.left(after) == [4, 5]
    unasked = guesser(masked=(3, 4, 5), scores=[0.5] * 5 + [-np.inf])
    assert unasked.left(unasked.grow(unasked.first(2, 18), 1, 0.0)[0]) == []


def test_two_opinions_are_their_geometric_mean():
    score, tokens, chances = mix([5, 6], [0.7, 0.2], [6, 7], [0.9, 0.1])
    weights = {5: (0.73 * 0.03) ** 0.5, 6: (0.23 * 0.93) ** 0.5, 7: (0.03 * 0.13) ** 0.5}
    whole = sum(weights.values())
    assert tokens == [6, 5, 7] and score == chances[0]
    assert chances == pytest.approx([weights[t] / whole for t in tokens])


def test_a_token_changes_what_is_believed_beside_it():
    neighbours = Neighbours()
    neighbours.observe(0, 99, [14, 50], [0.1, 0.9])  # behind token 99: 50
    neighbours.observe(1, 99, [40, 41], [0.8, 0.2])  # before it: 40
    g = guesser(neighbours, masked=(0, 2, 3))
    first = g.first(1, 99)
    assert first.beliefs[2][1][0] == 50 and first.beliefs[0][1][0] == 40 and set(first.beliefs) == {0, 2}
    # Beliefs say which position is the surest, too.
    expected = sorted((0, 2, 3), key=lambda i: -(first.beliefs[i][0] if i in first.beliefs else SAID[i][0]))
    assert g.left(first) == expected != g.left(guesser(masked=(0, 2, 3)).first(1, 99))
    assert any(guess.added.get(2) == 50 for guess in g.grow(first, 8, 0.0))
    other = Guesser((0, 2, 3), [0] * 6, [0.6, 0, 0.7, 0.4], CHOICES, SAID, Chances(), neighbours, probable=False)
    assert other.first(1, 99).beliefs[2][0] == 0.7, "scores of other kinds stay"


def test_neighbours_count_only_where_they_help():
    neighbours = Neighbours()
    neighbours.observe(0, 99, [14, 50], [0.1, 0.9])
    g = guesser(neighbours, masked=(2,))
    for _ in range(3):
        g.observe(g.first(1, 99), 2, 18)  # what the model had said
    assert neighbours.hits[0] > neighbours.hits[1] and not neighbours.help
    assert g.grow(g.first(1, 99), 1, 0.0)[0].added == {2: 18}
    for _ in range(4):
        g.observe(g.first(1, 99), 2, 50)
    assert neighbours.help and g.grow(g.first(1, 99), 1, 0.0)[0].added == {2: 50}


def test_neighbours_are_bounded():
    neighbours = Neighbours()
    for token in [*range(9000), 5000, 9000]:
        neighbours.observe(0, token, [token], [1.0])
    assert neighbours.beside(0, 0) is None and neighbours.beside(0, 9000) == ([9000], [1.0])
    assert neighbours.beside(0, 5000) is not None and neighbours.beside(1, 5000) is None
    assert sum(neighbours.beside(0, token) is not None for token in range(9001)) == 8192


def test_as_many_states_as_pay():
    """The most steps per second, by exhaustion; unknown sizes are tried."""
    cost = CostModel()
    pace = Pace(cost)
    pace.rows = 2
    chances = [0.6, 0.5, 0.3, 0.2, 0.05, 0.04, 0.03]
    assert pace.states(chances, 8, 8) == 8, "that size is not known"
    for size in (16, 32, 48, 80, 144) * 4:
        pace.observe(size, 1.0 + 0.004 * size)
    for before in (0, 8, 40):
        sizes = 2 * (before + 8 * np.arange(1, 9))
        rates = np.cumsum([1.0, *chances]) / cost.seconds(sizes)
        assert pace.states(chances, before, 8) == 1 + int(rates.argmax())
    assert 1 < pace.states(chances, 0, 8) < 8
    assert pace.states(chances[:1], 0, 8) == 2
    assert pace.states([], 0, 8) == 1


def test_pace_follows_what_forwards_cost():
    cost = CostModel()
    pace, chances = Pace(cost), [0.5] * 7
    for _ in range(20):
        pace.observe(8, 1.0), pace.observe(64, 1.1)
    assert pace.states(chances, 0, 8) == 8
    for _ in range(20):
        pace.observe(8, 1.0), pace.observe(64, 9.0)
    assert pace.states(chances, 0, 8) < 4


def test_chances_of_a_chain():
    chain = ChainChances()
    before = chain.reached(3)
    assert before == pytest.approx([0.6, 0.36, 0.216])
    for _ in range(1000):
        chain.observe(3, 1)  # the first was right, the second wrong, the third not reached
    after = chain.reached(4)
    assert after[0] > 0.99 and after[1] < 0.01
    assert after[2] / after[1] == pytest.approx(0.6), "what was not reached says nothing"


@pytest.mark.parametrize("least", [-0.1, 1.5])
def test_least_chance_is_a_probability(least):
    with pytest.raises(ValueError, match=rf"least_chance must lie in \[0, 1\], got {least}"):
        FreeDave(least_chance=least)
