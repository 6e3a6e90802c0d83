"""merge_drafts: the union of drafts, for random trees."""

import numpy as np
import pytest

from branchwise import _host
from branchwise.tree import FOREIGN


def random_draft(rng, size, fixed=1):
    parents = np.array([-1, *(int(rng.integers(0, i)) for i in range(1, size))], np.int32)
    tokens = np.array([7, *rng.integers(0, 4, size - 1)], np.int32)
    scores = np.ones(size, np.float32)
    for i in range(1, size):
        scores[i] = scores[parents[i]] * rng.random()
    return tokens, parents, scores, fixed, None


def path(tokens, parents, node):
    way = []
    while node > 0:
        way.append(int(tokens[node]))
        node = int(parents[node])
    return tuple(way[::-1])


@pytest.mark.parametrize("seed", range(50))
def test_random_drafts(seed):
    rng = np.random.default_rng(seed)
    drafts = [random_draft(rng, int(rng.integers(1, 20))) for _ in range(rng.integers(1, 4))]
    budget = int(rng.integers(1, 40))
    tokens, parents, scores, fixed, names = _host.merge_drafts(drafts, budget)
    n = len(tokens)
    assert fixed == 1 and names.shape == (len(drafts), n)
    assert parents[0] == -1 and all(0 <= parents[i] < i for i in range(1, n))
    paths = [path(tokens, parents, node) for node in range(n)]
    everything = {path(t, p, node) for t, p, *_ in drafts for node in range(len(t))}
    assert len(set(paths)) == n == min(budget, len(everything)) and set(paths) <= everything
    assert (np.diff(scores) <= 1e-6).all()
    for node in range(n):
        children = np.flatnonzero(parents == node)
        assert scores[children].sum() <= scores[node] + 1e-5
        for d, (t, p, *_) in enumerate(drafts):
            known = [i for i in range(len(t)) if path(t, p, i) == paths[node]]
            assert (names[d, node] in known) if known else names[d, node] == FOREIGN


def test_fixed_nodes_stay():
    rng = np.random.default_rng(0)
    first, second = random_draft(rng, 10, fixed=6), random_draft(rng, 10)
    tokens, parents, _, fixed, names = _host.merge_drafts([first, second], 2)
    kept = {path(tokens, parents, node) for node in range(len(tokens))}
    assert len(tokens) == fixed == len({path(*first[:2], node) for node in range(6)})
    assert kept == {path(*first[:2], node) for node in range(6)} and (names[0] >= 0).all()


def chain(tokens, scores):
    return np.int32([7, *tokens]), np.arange(-1, len(tokens), dtype=np.int32), np.float32([1, *scores]), 1, None


def test_chances_are_averaged_where_drafts_say_something():
    forked = np.int32([7, 1, 2, 3]), np.int32([-1, 0, 1, 1]), np.float32([1, 0.6, 0.36, 0.24]), 1, None
    tokens, _, scores, _, _ = _host.merge_drafts([forked, chain([1], [0.9]), chain([4], [0.3])], 9)
    assert tokens.tolist() == [7, 1, 2, 3, 4]
    # Sure of 0.6, 0.9 and 0.3 in all, which are their weights; halfway from their mean to the surest.
    of_1, of_4 = ((0.6 * 0.6 + 0.9 * 0.9) / 1.8 + 0.9) / 2, (0.3 * 0.3 / 1.8 + 0.3) / 2
    assert np.allclose(scores[[1, 4]], [of_1, min(of_4, 1 - of_1)])
    # Behind token 1, one draft alone says what follows: that others are surer of its parent takes nothing from it.
    assert np.allclose(scores[2:4] / scores[1], [0.6, 0.4])


def test_what_is_no_number_is_no_chance():
    for bad in (np.nan, -1.0, np.inf):
        drafts = [chain([1, 2, 3], [0.5, bad, bad]), chain([4, 5], [bad, 0.2]), chain([1], [0.25])]
        tokens, _, scores, _, _ = _host.merge_drafts(drafts, 9)
        assert sorted(tokens.tolist()) == [1, 2, 3, 4, 5, 7]
        assert ((scores >= 0) & (scores <= 1)).all() and (np.diff(scores) <= 0).all()


def test_factors_by_the_drafts_that_have_a_node():
    drafts = [chain([1, 2], [0.5, 0.25]), chain([3], [0.25]), chain([1, 4], [0.5, 0.125])]
    plain = _host.merge_drafts(drafts, 9)
    factors = np.ones(8, np.float32)
    assert all(np.array_equal(a, b) for a, b in zip(plain, _host.merge_drafts(drafts, 9, factors), strict=True))
    factors[0b101], factors[0b001], factors[0b010], factors[0b100] = 1.5, 4.0, 0.5, 0.0
    tokens, parents, scores, _, names = _host.merge_drafts(drafts, 9, factors)
    # Behind token 1, token 2 had 5/12 of a chance: four times as much is no more than certain.
    assert tokens.tolist() == [7, 1, 2, 3, 4] and parents.tolist() == [-1, 0, 1, 0, 1]
    assert np.allclose(scores, [1, 1.5 * 0.45, 1.5 * 0.45, 0.5 * 0.15, 0.0])
    assert ((names != FOREIGN) == [[1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 1, 0, 0, 1]]).all()
    assert _host.merge_drafts(drafts, 3, factors)[0].tolist() == [7, 1, 2]


def test_bad_drafts():
    one = np.zeros(1, np.int32), np.full(1, -1, np.int32), np.ones(1, np.float32), 1, None
    with pytest.raises(ValueError, match="drafts must hold at least one draft"):
        _host.merge_drafts([], 3)
    with pytest.raises(ValueError, match="must have one equal length of at least 1"):
        _host.merge_drafts([(one[0], one[1], np.ones(2, np.float32), 1, None)], 3)
    with pytest.raises(ValueError, match="ids must have one entry per node"):
        _host.merge_drafts([(*one[:4], np.zeros(2, np.int32))], 3)
    wrong = np.zeros(2, np.int32), np.array([-1, 5], np.int32), np.ones(2, np.float32), 1, None
    with pytest.raises(ValueError, match=r"parents\[1\] of draft 0 must be an earlier node, got 5"):
        _host.merge_drafts([wrong], 3)
    with pytest.raises(ValueError, match=r"factors must have 2\^drafts entries, for at most 16 drafts, got 3 for 2"):
        _host.merge_drafts([one, one], 3, np.ones(3, np.float32))
    with pytest.raises(ValueError, match="for at most 16 drafts, got 131072 for 17"):
        _host.merge_drafts([one] * 17, 3, np.ones(1 << 17, np.float32))
