"""PagePool against whole lists of tokens: what every branch reads, what is copied, and that no page leaks."""

import random

import numpy as np
import pytest

from branchwise._host import PagePool


class Model:
    """A pool, pages with tokens in them, and beside it the tokens of every branch."""

    def __init__(self, page_size):
        self.pool = PagePool(page_size)
        self.slots = np.full((4, page_size), -1)
        self.texts = {}
        self.copied = 0

    def root(self):
        self.texts[branch := self.pool.root()] = []
        return branch

    def fork(self, branch, n):
        for new in self.pool.fork(branch, n):
            self.texts[new] = list(self.texts[branch])

    def prune(self, branches):
        self.pool.prune(branches)
        for branch in branches:
            self.texts.pop(branch, None)

    def resample(self, branches, ancestors):
        old = [self.texts[b] for b in branches]
        new = self.pool.resample(branches, ancestors)
        for branch in branches:
            self.texts.pop(branch, None)
        self.texts |= {b: list(old[a]) for b, a in zip(new, ancestors, strict=True)}

    def append(self, branches, tokens, kept):
        """Writes tokens behind each branch, then keeps the first few."""
        copies = self.pool.reserve(branches, len(tokens))
        while self.pool.size > len(self.slots):
            self.slots = np.concatenate([self.slots, np.full_like(self.slots, -1)])
        self.copied += len(copies)
        for source, to in copies:
            self.slots[to] = self.slots[source]
        size = self.pool.page_size
        table, lengths = self.pool.page_table(branches)
        for row, branch in enumerate(branches):
            for i, token in enumerate(tokens):
                at = int(lengths[row]) + i
                page = table[row, at // size]
                assert self.pool.references(page) == 1  # nobody else's text is written
                self.slots[page, at % size] = token + branch
            self.texts[branch] += [token + branch for token in tokens[:kept]]
            self.pool.set_length(branch, len(self.texts[branch]))

    def truncate(self, branch, n):
        del self.texts[branch][n:]
        self.pool.set_length(branch, n)

    def compact(self):
        self.slots = self.slots[self.pool.compact()] if self.pool.size else self.slots
        self.slots = np.concatenate([self.slots, np.full((1, self.pool.page_size), -1)])
        assert self.pool.num_free == 0

    def check(self):
        size = self.pool.page_size
        branches = self.pool.branches
        assert branches == sorted(self.texts)
        table, lengths = self.pool.page_table(branches)
        held = [[] for _ in range(self.pool.size)]
        for row, branch in enumerate(branches):
            text = self.texts[branch]
            assert lengths[row] == len(text)
            pages = table[row, : -(-len(text) // size)]
            assert (pages >= 0).all() and (table[row, len(pages) :] == -1).all()
            assert self.slots[pages].reshape(-1)[: len(text)].tolist() == text
            for page in pages:
                held[page].append(branch)
        assert [self.pool.references(page) for page in range(self.pool.size)] == [len(h) for h in held]
        assert self.pool.num_free == sum(not h for h in held)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_random_operations(page_size):
    """100,000 of them over the three sizes, checked in full now and then; at the end every page is free."""
    chance = random.Random(page_size)
    model = Model(page_size)
    model.root()
    for step in range(33_334):
        branches = list(model.texts)
        branch = chance.choice(branches)
        kind = chance.choices("fptrac", [3, 2, 2, 1, 8, 0.05])[0]
        if kind == "f" and len(branches) < 24:
            model.fork(branch, chance.randrange(4))
        elif kind == "p" and len(branches) > 4:
            model.prune(chance.sample(branches, chance.randrange(1, 4)))
        elif kind == "t":
            model.truncate(branch, chance.randrange(len(model.texts[branch]) + 1))
        elif kind == "r":
            some = chance.sample(branches, min(len(branches), 6))
            model.resample(some, [chance.randrange(len(some)) for _ in range(6)])
        elif kind == "a":
            tokens = [1000 * step + i for i in range(chance.randrange(1, 9))]
            if len(model.texts[branch]) < 200:
                model.append(chance.sample(branches, min(len(branches), 3)), tokens, chance.randrange(len(tokens) + 1))
        elif kind == "c":
            model.compact()
        if step % 50 == 0:
            model.check()
    model.check()
    model.prune(list(model.texts))
    assert model.pool.num_free == model.pool.size and model.pool.branches == []


def test_a_fork_copies_a_page_at_most():
    model = Model(16)
    root = model.root()
    model.append([root], list(range(40)), 40)
    model.fork(root, 3)
    assert model.copied == 0 and model.pool.size - model.pool.num_free == 3
    model.append([1, 2, 3], [7], 1)  # the root still holds the last page
    assert model.copied == 3 and model.pool.size - model.pool.num_free == 6
    model.prune([root])
    model.append([1], [8], 1)
    assert model.copied == 3
    model.check()


def test_a_fork_does_not_share_what_was_reserved():
    """A run that was broken off leaves reserved pages; they are nobody else's."""
    model = Model(4)
    root = model.root()
    model.append([root], list(range(8)), 8)
    model.pool.reserve([root], 6)
    model.fork(root, 2)
    assert model.pool.page_table([1])[0].shape == (1, 2)
    model.append([root, 1, 2], [7, 8, 9], 3)
    model.check()


def test_the_last_holder_of_a_page_does_not_copy_it():
    model = Model(16)
    root = model.root()
    model.append([root], list(range(40)), 40)
    model.resample([root], [0, 0, 0])
    model.append(list(model.texts), [7], 1)
    assert model.copied == 2
    model.check()


def test_resampling_that_only_permutes_copies_nothing():
    model = Model(4)
    for i in range(3):
        branch = model.root()
        model.append([branch], list(range(5 + i)), 5 + i)
    model.resample([0, 1, 2], [2, 0, 1])
    model.append(list(model.texts), [1], 1)
    assert model.copied == 0
    model.check()


def test_refusals():
    with pytest.raises(ValueError, match="page_size must be at least 1, got 0"):
        PagePool(0)
    pool = PagePool(4)
    root = pool.root()
    for call in (
        lambda: pool.fork(9, 1),
        lambda: pool.prune([root, 9]),
        lambda: pool.reserve([root, 9], 3),
        lambda: pool.resample([root, 9], [0]),
        lambda: pool.set_length(9, 0),
        lambda: pool.page_table([9]),
    ):
        with pytest.raises(ValueError, match="branch 9 does not exist"):
            call()
    assert pool.branches == [root] and pool.size == 0  # a refused call changes nothing
    with pytest.raises(ValueError, match="ancestors must lie between 0 and 0, got 1"):
        pool.resample([root], [0, 1])
    with pytest.raises(ValueError, match="length must lie between 0 and the 0 slots that branch 0 has, got 1"):
        pool.set_length(root, 1)
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        pool.fork(root, -1)
    with pytest.raises(ValueError, match="slots must be at least 0, got -1"):
        pool.reserve([root], -1)
    with pytest.raises(ValueError, match="page must lie between 0 and -1, got 0"):
        pool.references(0)
