"""The controllers: choices that pay, learn, and change no text."""

import copy
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch

import branchwise as bw
import tiny
from branchwise import cli
from branchwise.decoding import Auto, Bandit
from branchwise.decoding.auto import unique_names
from branchwise.decoding.bandit import Elastic, Strategy
from branchwise.decoding.profile import Profile
from branchwise.decoding.sources import Sources
from branchwise.decoding.tree_size import CostModel, Record, cost_model
from branchwise.drafters import (
    BY_NAME,
    DraftRequest,
    EarlyExit,
    Jacobi,
    Lookahead,
    Model,
    Suffix,
    TokenRecycling,
    Trie,
    Verified,
)
from branchwise.drafters.beg_mab import BegMab
from random_drafter import RandomTrees
from test_sampling import run

N = 40

CONTROLLERS = {
    "auto": lambda m: Auto(),
    "auto with everything": lambda m: Auto(
        Suffix(), Trie(), TokenRecycling(), Lookahead(window=3), Jacobi(), Model(copy.deepcopy(m), min_score=0.0)
    ),
    "bandit": lambda m: Bandit(epsilon=0.5),
    "bandit by batch size": lambda m: Bandit(
        Suffix(), TokenRecycling(), nodes=(16, 4, 1), thresholds=(1, 2, 4), epsilon=0.5, elastic=(3, 2)
    ),
    "bandit with a model": lambda m: Bandit(Suffix(), Model(copy.deepcopy(m), min_score=0.0), epsilon=0.5),
}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_texts_are_the_targets(controller, name, monkeypatch):
    """Also when choices differ from round to round."""
    model = tiny.model(name)
    spec = bw.TreeSpeculation(CONTROLLERS[controller](model), seed=4)
    for seed, batch in ((3, 1), (7, 5)):
        ids, mask = tiny.prompts(batch, seed)
        plain = run(model, ids, mask, None, do_sample=False, top_k=None, max_new_tokens=N)
        sampled = run(model, ids, mask, bw.PositionKeyedSampler(4), max_new_tokens=N, temperature=0.7)
        for _ in range(2):
            assert torch.equal(plain, run(model, ids, mask, spec, do_sample=False, top_k=None, max_new_tokens=N))
            assert torch.equal(sampled, run(model, ids, mask, spec, max_new_tokens=N, temperature=0.7))
    # On a busy machine it may be that no draft pays; with costs that nobody measures, some do.
    monkeypatch.setattr("branchwise.decoding.tree_size._COSTS", WeakKeyDictionary())
    monkeypatch.setattr(CostModel, "observe", lambda self, tokens, seconds: None)
    spec = bw.TreeSpeculation(CONTROLLERS[controller](model), seed=4)
    drafted = 0
    for seed, batch in ((3, 1), (7, 5)):
        for _ in range(2):
            run(model, *tiny.prompts(batch, seed), spec, do_sample=False, top_k=None, max_new_tokens=N)
            drafted += spec.stats.drafted
    assert drafted > 0


class Timed:
    """A model whose forward costs what it is told, by the number of tokens; nothing is waited for."""

    def __init__(self, spec, cost, monkeypatch):
        monkeypatch.setattr(type(cost), "observe", lambda self, tokens, seconds: None)
        monkeypatch.setattr(type(cost), "seconds", lambda self, tokens: spec(np.asarray(tokens, float)))


def chosen_sizes(drafter, cost_of, monkeypatch, new_tokens=200, truth=None):
    model = tiny.model("llama")
    Timed(cost_of, cost_model(model), monkeypatch)
    ids, mask = tiny.prompts(1, 3)
    plain = run(model, ids, mask, None, do_sample=False, top_k=None, max_new_tokens=new_tokens, eos_token_id=[])
    truth = [plain[0, ids.shape[1] :].tolist()]
    auto = Auto(*drafter(truth))
    spec = bw.TreeSpeculation(auto)
    run(model, ids, mask, spec, do_sample=False, top_k=None, max_new_tokens=new_tokens, eos_token_id=[])
    return spec.stats, auto


def test_verifies_what_pays(monkeypatch):
    """Lucky drafts: many nodes where nodes are cheap, none where they are dear."""
    cheap, _ = chosen_sizes(lambda t: [RandomTrees(t, luck=0.9)], lambda n: 1 + 0.001 * n, monkeypatch)
    dear, _ = chosen_sizes(lambda t: [RandomTrees(t, luck=0.9)], lambda n: n, monkeypatch)
    assert cheap.tokens_per_forward > 2 > 1.5 > dear.tokens_per_forward
    assert dear.drafted < dear.forwards / 2


def test_a_costly_drafter_that_brings_nothing_is_left_alone_and_tried_again(monkeypatch):
    class Costly(RandomTrees):
        calls = 0

        def propose(self, budgets):
            Costly.calls += 1
            return super().propose(budgets)

    def learn_costly(self, seconds):
        self.seconds = 0.5  # half a forward

    monkeypatch.setattr(Record, "spend", learn_costly)
    _, auto = chosen_sizes(lambda t: [Costly(t, luck=0.0)], lambda n: 1 + 0.01 * n, monkeypatch, 300)
    # A trial of six rounds, which cost three forwards; some more until what its scores promise has been seen to be
    # wrong; then after 4, 8, 16, 32, 64 and 128 more.
    assert 6 < Costly.calls < 50
    record = auto.records["Costly"]
    assert record.gain < 0 and record.wait >= 32


def test_a_drafter_that_begins_to_pay_is_noticed():
    record = Record()
    rounds = []
    for time in range(2000):
        record.idle += 1
        if record.wanted():
            rounds.append(time)
            record.spend(0.1)
            record.learn(1, 1.0 if time < 500 else 1.5, 1.0, 1.0)
    assert len([t for t in rounds if 100 <= t < 500]) < 10
    first = next(t for t in rounds if t >= 500)
    assert first < 500 + 256 and rounds[-1] == 1999 and len([t for t in rounds if t >= first]) > 2000 - first - 2


def test_learns_who_is_right_with_whom():
    rng = np.random.default_rng(0)
    sources, chance = Sources(3), np.array([0, 0.2, 0.5, 0.9, 0.5, 0.5, 0.5, 0.5])
    for _ in range(200):
        sets = rng.integers(1, 4, 8)
        sources.observe(sets, np.full(8, 0.5), rng.random(8) < chance[sets])
    assert np.allclose(sources.factors([0, 1])[1:], [0.4, 1.0, 1.8], atol=0.2)
    factors = sources.factors([0, 1, 2])
    assert (factors[4:] == 1).all() and np.array_equal(factors[:4], sources.factors([0, 1]))
    # Of the drafters 2 and 1, in this order, the second set is the one that has seen nodes.
    assert sources.factors([2, 1]).tolist() == [1, 1, factors[2], 1]


def test_who_stands_alone_and_is_wrong_comes_last(monkeypatch):
    """Of two drafters that promise the same, the second is right: its nodes are the ones that are verified."""

    class Wrong(RandomTrees): ...

    monkeypatch.setattr(Record, "learn", lambda self, rows, *_: self.skip(rows))  # neither is left alone

    def drafted():
        two = lambda truth: [Wrong(truth, luck=0.0), RandomTrees(truth, luck=0.9)]  # noqa: E731
        stats, auto = chosen_sizes(two, lambda n: 1 + 0.1 * n, monkeypatch)  # so dear that few are verified
        return [auto.records[name].drafted for name in ("RandomTrees", "Wrong")], stats.tokens_per_forward

    (right, wrong), tokens = drafted()
    monkeypatch.setattr(Sources, "observe", lambda *_: None)
    (right_before, wrong_before), tokens_before = drafted()
    assert right / wrong > 2 * right_before / wrong_before and tokens > tokens_before


def test_a_round_without_drafts_makes_what_was_learned_fade():
    auto = Auto(Suffix())
    session = auto.begin(DraftRequest([np.int32([1, 2, 3])]))
    auto.calibration.hits[:], auto.calibration.tries[:] = 5.0, 100.0
    tree = bw.TokenTree(session.propose([1]), torch.zeros(1, dtype=torch.int32))
    session.observe(Verified([[4]], tree, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)))
    assert (auto.calibration.tries < 100).all() and (auto.calibration.hits < 5).all()


def test_bandit_finds_the_best_arm_and_follows_a_change():
    arms = [Strategy(0, n) for n in (1, 4, 8, 16)]
    bandit = BegMab([arms], [1], window=100)
    rng = np.random.default_rng(0)
    best = {False: 2, True: 0}
    late = {False: [], True: []}
    for step in range(4000):
        swapped = step >= 2000
        arm = bandit.select(3)
        mean = 10.0 if arm == arms[best[swapped]] else 8.0
        bandit.record(3, arm, 1, 1 / rng.normal(mean, 0.5))
        if step % 2000 > 500:
            late[swapped].append(arm == arms[best[swapped]])
    assert np.mean(late[False]) > 0.85 and np.mean(late[True]) > 0.85


def test_every_batch_size_has_one_group():
    groups = [[Strategy(0, 32)], [Strategy(0, 16), Strategy(1, 16)], [Strategy(0, 1)]]
    bandit = BegMab(groups, [1, 5, 21])
    for size in range(1, 257):
        assert bandit.group(size) == groups[0 if size < 5 else 1 if size < 21 else 2]
        assert bandit.select(size) in bandit.group(size)


def test_activation_is_elastic():
    """The card's schedule: 64, 40, nine rounds of 30, 33, then ten of 30."""
    elastic = Elastic(32, 10)
    schedule = [64, 40, *[30] * 9, 33, *[30] * 10]
    assert [elastic.active(rows) for rows in schedule] == [False] * 21 + [True]
    assert elastic.active(50)


def test_names():
    assert ("auto", *sorted(BY_NAME)) == cli.DRAFTERS  # which loads no drafter to print its help
    assert unique_names([Suffix(), Trie(), Suffix()]) == ["Suffix", "Trie", "Suffix 3"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Auto(EarlyExit(1)), "leave the target alone, got EarlyExit"),
        (lambda: Auto(*(Trie() for _ in range(13))), "drafters must be at most 12, got 13"),
        (lambda: Bandit(nodes=()), r"nodes must be at least 1, got \[\]"),
        (lambda: Bandit(thresholds=(1, 2)), r"thresholds must be one per group, 4, got \[1, 2\]"),
        (lambda: Bandit(nodes=(1, 4), thresholds=(2, 3)), r"thresholds must ascend from 1, got \[2, 3\]"),
        (lambda: Bandit(epsilon=2.0), "epsilon must lie between 0 and 1, got 2.0"),
        (lambda: Bandit(elastic=(0, 1)), "threshold and patience must be at least 1, got 0 and 1"),
        (lambda: BegMab([[]], [1]), "groups must hold at least one arm each"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_profile_brings_back_what_was_learned(tmp_path):
    model = tiny.model("llama")
    ids, mask = tiny.prompts(2, 3)
    path = tmp_path / "profile.json"
    first = Auto(profile=path, task="letters")  # no such file yet
    spec = bw.TreeSpeculation(first)
    for _ in range(3):
        run(model, ids, mask, spec, do_sample=False, top_k=None, max_new_tokens=N)
    first.save(path, model)
    again = Auto(profile=path, task="letters")
    again.begin(DraftRequest([np.int32([1, 2])], target=model))
    assert again.records == first.records
    assert np.array_equal(again.calibration.tries, first.calibration.tries) and again.calibration.tries.sum() > 0
    assert np.array_equal(again.sources.factors([0, 1, 2]), first.sources.factors([0, 1, 2]))
    assert (first.sources.factors([0, 1, 2]) != 1).any()
    mine, theirs = (auto.drafters[list(auto.records).index("TokenRecycling")].ranks for auto in (again, first))
    assert mine.state() == theirs.state() and sum(mine.state()["tries"]) > 0
    other = Auto(profile=path, task="digits")
    other.begin(DraftRequest([np.int32([1, 2])], target=model))
    assert other.calibration.tries.sum() == 0  # another task, and nothing is known for all
    general = Auto()
    general.save(path, model)
    assert Profile(path).find(model, "digits") is not None
    assert Profile(path).find(model, "letters")["records"]["Suffix"]["asked"] == first.records["Suffix"].asked
    assert Profile(path).find(tiny.model("qwen3"), "letters") is None


def test_what_is_no_profile_is_refused(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="path must name a profile written by branchwise tune"):
        Auto(profile=path)
    path.write_text('{"version": 99, "entries": {}}')
    with pytest.raises(ValueError, match="has version 99"):
        Auto(profile=path)


def test_costs_are_restored_where_none_were_measured():
    old, new = CostModel(), CostModel()
    for _ in range(3):
        old.observe(1, 0.03)
        old.observe(8, 0.04)
    new.observe(1, 0.01)
    new.restore(old.state())
    assert new.seconds(np.array([1]))[0] == 0.01 and new.seconds(np.array([8]))[0] == 0.04
