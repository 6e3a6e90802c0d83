"""The C++ token trie against a model made of dictionaries."""

import threading
from collections import Counter

import numpy as np
import pytest

from branchwise import _host

EOS = 9


def make(**options):
    defaults = {
        "branch_length": 4,
        "query_length": 2,
        "output_weight": 0.5,
        "max_nodes": 65536,
        "max_output_nodes": 512,
        "squeeze_after": 1024,
    }
    return _host.TokenTrie(eos=[EOS], **{**defaults, **options})


def ids(*tokens):
    return np.array(tokens, np.int32)


def count_runs(text, longest):
    """Occurrences of every run of 2 to `longest` + 1 tokens without EOS."""
    runs = Counter()
    for i in range(len(text)):
        for j in range(i + 2, min(len(text), i + longest + 1) + 1):
            if EOS in text[i:j]:
                break
            runs[tuple(text[i:j])] += 1
    return runs


@pytest.mark.parametrize("seed", range(5))
def test_counters_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    trie = make()
    depth = 4 + 2 - 1
    outputs = Counter()
    for _ in range(6):
        prompt = rng.choice([1, 2, 3, EOS], 30, p=[0.4, 0.3, 0.25, 0.05]).astype(np.int32)
        output = rng.choice([1, 2, 3, EOS], 40, p=[0.4, 0.3, 0.25, 0.05]).astype(np.int32)
        request = trie.begin(prompt)
        for part in np.split(output, [7, 8, 20]):
            trie.observe(request, part)
        outputs += count_runs(output.tolist(), depth)
        prompt_runs = count_runs(prompt.tolist(), depth)
        for run in set(outputs) | set(prompt_runs) | {(1, 1, 1, 1, 1, 1), (3, 2, 3, 2)}:
            assert trie.counts(request, list(run)) == (prompt_runs[run], outputs[run])
        trie.end(request)
    assert trie.num_nodes == len(outputs)


def check_draft(trie, request, budget, context, branch_length=4):
    tokens, parents, scores = trie.propose(request, budget)
    assert tokens[0] == context[-1] and parents[0] == -1 and scores[0] == 1
    assert 1 <= len(tokens) <= max(budget, 1)
    assert EOS not in tokens[1:]
    depth, seen = [0], set()
    for i in range(1, len(tokens)):
        assert 0 <= parents[i] < i
        depth.append(depth[parents[i]] + 1)
        assert (parents[i], tokens[i]) not in seen, "duplicate siblings"
        seen.add((parents[i], tokens[i]))
        assert 0 < scores[i] <= scores[parents[i]] + 1e-6
        assert scores[i] <= scores[i - 1] + 1e-6, "not best first"
    assert max(depth) <= branch_length
    return tokens, parents


@pytest.mark.parametrize("seed", range(20))
def test_drafts_are_trees_of_seen_runs(seed):
    rng = np.random.default_rng(seed)
    trie = make()
    text = rng.integers(1, 6, 60).astype(np.int32)
    request = trie.begin(text[:30])
    trie.observe(request, text[30:])
    for budget in (1, 2, 7, 64):
        tokens, parents = check_draft(trie, request, budget, text)
        for node in range(1, len(tokens)):
            path = []
            while node > 0:
                path.append(int(tokens[node]))
                node = parents[node]
            run = [int(text[-1]), *path[::-1]][:6]
            assert sum(trie.counts(request, run)) > 0


def test_longest_match_and_most_frequent_first():
    trie = make()
    #                      1 2 is followed by 5 once; 7 2 by 6 twice
    request = trie.begin(ids(7, 2, 6, 0, 7, 2, 6, 0, 1, 2, 5, 0, 1, 2))
    tokens, _ = check_draft(trie, request, 3, [2])
    assert tokens[1] == 5  # the longer match wins over the more frequent one
    trie.observe(request, ids(0, 3, 2))
    tokens, _ = check_draft(trie, request, 2, [2])
    assert tokens[1] == 6  # only one token matches: the more frequent continuation


def test_both_counters_are_read():
    trie = make(output_weight=0.9)
    first = trie.begin(ids(1, 2, 3))
    trie.observe(first, ids(5, 6, 8))
    trie.end(first)
    second = trie.begin(ids(5, 6, 4, 0, 5, 6))
    tokens, parents, _ = trie.propose(second, 8)
    children = [int(t) for t, p in zip(tokens, parents, strict=True) if p == 0]
    assert children == [8, 4]  # output count times 0.9 beats prompt count times 0.1


def test_prompts_stay_private_and_are_forgotten():
    trie = make()
    secret = trie.begin(ids(1, 2, 3, 4))
    other = trie.begin(ids(7, 1, 2))
    assert len(trie.propose(other, 8)[0]) == 1
    assert trie.counts(other, [1, 2, 3]) == (0, 0)
    trie.end(secret)
    assert trie.num_nodes == 0
    with pytest.raises(ValueError, match="request must be one that began and has not ended, got 0"):
        trie.propose(secret, 8)


def test_squeeze_halves_counts_and_drops_rare_runs():
    trie = make(max_output_nodes=1, squeeze_after=1)
    request = trie.begin(ids(0))
    trie.observe(request, ids(1, 2, EOS, 1, 2, EOS, 1, 2, 3, EOS))
    assert trie.counts(request, [1, 2])[1] == 3 and trie.counts(request, [1, 2, 3])[1] == 1
    trie.end(request)
    assert trie.counts(-1, [1, 2])[1] == 1.5
    assert trie.counts(-1, [1, 2, 3])[1] == 0
    assert trie.num_nodes == 2  # 1 2, and 2 3, whose tree was below the limit


def test_size_is_bounded_while_a_request_runs():
    trie = make(max_nodes=50)
    request = trie.begin(ids(0))
    rng = np.random.default_rng(0)
    for _ in range(200):
        trie.observe(request, rng.integers(10, 14, 50).astype(np.int32))
    assert trie.num_nodes <= 4 * 51
    check_draft(trie, request, 16, [trie.propose(request, 1)[0][0]])


def test_threads():
    trie = make()
    failures = []

    def work(seed):
        try:
            rng = np.random.default_rng(seed)
            for _ in range(30):
                text = rng.integers(1, 7, 50).astype(np.int32)
                request = trie.begin(text)
                for token in text:
                    trie.observe(request, ids(token))
                    trie.propose(request, 16)
                trie.end(request)
        except Exception as error:  # reported by the main thread
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    total = Counter()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        for _ in range(30):
            total += count_runs(rng.integers(1, 7, 50).tolist(), 1)
    assert all(trie.counts(-1, list(run))[1] == n for run, n in total.items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"branch_length": 0}, "branch_length must be at least 1, got 0"),
        ({"query_length": -3}, "query_length must be at least 1, got -3"),
        ({"output_weight": 1.5}, "output_weight must lie between 0 and 1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
    with pytest.raises(ValueError, match="prompt must be one-dimensional"):
        make().begin(np.zeros((2, 2), np.int32))
