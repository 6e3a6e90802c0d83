"""The C++ suffix drafts against a search by hand through all texts."""

import threading

import numpy as np
import pytest

from branchwise import _host

EOS = 9
ORDERS = (8, 4, 2, 1)
OPTIONS = {"max_match": 12, "occurrences": 10**6, "growth": 2.0, "output_weight": 0.5, "min_score": 0.02}
OPTIONS["capacity"] = 10**6


def make(**options):
    return _host.SuffixDrafts(eos=[EOS], **{**OPTIONS, **options})


def ids(*tokens):
    return np.array(tokens, np.int32)


def paths(draft):
    """Score by path."""
    tokens, parents, scores = (x.tolist() for x in draft)
    found = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        found.append((*found[parent], token))
    assert len(set(found)) == len(found)
    return dict(zip(found, scores, strict=True))


def agreement(context, text, last):
    n = 0
    while n < min(len(context), OPTIONS["max_match"], last + 1) and text[last - n] == context[-1 - n]:
        n += 1
    return n


def by_hand(context, own, outputs):
    """Votes of every occurrence in ``own`` and in ``outputs``, spread over paths."""
    found = []
    for text, weight in [(own, 1.0), *((text, OPTIONS["output_weight"]) for text in outputs)]:
        for last in range(len(text) - 1):
            length = agreement(context, text, last)
            if length:
                found.append((text, last + 1, length, weight * 2.0 ** min(length, 16)))
    scores = {(): 1.0}

    def expand(path, occurrences):
        total = 4.0 + sum(votes for *_, votes in occurrences)
        says = {}
        for text, at, length, votes in occurrences:
            says.setdefault(text[at] if at < len(text) else None, []).append((text, at + 1, length + 1, votes))
        for token, group in says.items():
            score = scores[path] * sum(votes for *_, votes in group) / total * 0.95
            if token is None or token == EOS or score < OPTIONS["min_score"]:
                continue
            scores[(*path, token)] = score
            expand((*path, token), [(t, a, n, v * 2 if n <= 16 else v) for t, a, n, v in group])

    expand((), found)
    return scores


@pytest.mark.parametrize("seed", range(30))
def test_drafts_equal_a_search_by_hand(seed):
    rng = np.random.default_rng(seed)
    letters = rng.integers(2, 6)
    draw = lambda n: rng.choice([*range(letters), EOS], n, p=[*[0.95 / letters] * letters, 0.05]).astype(np.int32)  # noqa: E731
    store, outputs = make(), []
    for _ in range(4):
        prompt = draw(rng.integers(1, 40))
        request, own = store.begin(prompt), prompt.tolist()
        for _ in range(4):
            said = draw(rng.integers(0, 12))
            store.observe(request, said)
            own += said.tolist()
            actual, expected = paths(store.propose(request, 100000)), by_hand(own, own, outputs)
            assert actual.keys() == expected.keys()
            assert all(actual[path] == pytest.approx(expected[path], rel=1e-4) for path in expected)
        store.end(request)
        if len(own) > len(prompt):
            outputs.append(own[len(prompt) :])
    flat = [token for text in outputs for token in [*text, -1]]
    assert store.outputs().tolist() == flat


def test_trees_are_best_first():
    rng = np.random.default_rng(0)
    store = make(min_score=0.0)
    request = store.begin(rng.integers(0, 4, 300).astype(np.int32))
    whole = store.propose(request, 64)
    scores = whole[2]
    assert len(scores) == 64 and (np.diff(scores[1:]) <= 1e-7).all()
    assert (scores[1:] <= scores[whole[1][1:]]).all() and (whole[1][1:] < np.arange(1, 64)).all()
    for n in (1, 2, 30):
        for part, all_of_it in zip(store.propose(request, n), whole, strict=True):
            assert np.array_equal(part, all_of_it[:n])


def test_old_outputs_are_overwritten():
    store = make(capacity=50)
    for start in range(0, 400, 10):
        request = store.begin(ids(1000))
        store.observe(request, np.arange(start, start + 10, dtype=np.int32))
        store.end(request)
    kept = store.outputs()
    assert len(kept) == 50 and kept[-1] == -1 and kept.max() == 399 and kept[kept >= 0].min() >= 350
    old, new = store.begin(ids(5)), store.begin(ids(395))
    assert len(store.propose(old, 8)[0]) == 1
    assert store.propose(new, 3)[0].tolist() == [395, 396, 397]


def test_a_random_life_in_a_small_memory():
    """Whatever was overwritten, drafts are runs that occurred."""
    rng = np.random.default_rng(3)
    store, seen = make(capacity=97, output_weight=1.0), set()
    for _ in range(300):
        request = store.begin(rng.integers(0, 5, rng.integers(1, 20)).astype(np.int32))
        said = rng.integers(0, 5, rng.integers(0, 40)).astype(np.int32)
        store.observe(request, said)
        tokens, parents, _ = store.propose(request, 32)
        assert (parents[1:] >= 0).all() and (tokens >= 0).all() and (tokens < 5).all()
        store.end(request)
        seen.update(said.tolist())
        assert len(store.outputs()) <= 97


def test_requests_are_private_until_they_end():
    store = make()
    a, b = store.begin(ids(1, 2, 3)), store.begin(ids(7, 1, 2))
    assert store.propose(b, 8)[0].tolist() == [2]
    store.observe(a, ids(1, 2, 5))
    assert store.propose(b, 8)[0].tolist() == [2]
    store.end(a)
    assert store.propose(b, 8)[0].tolist() == [2, 5]  # what was said, not what was asked
    with pytest.raises(ValueError, match="request must be one that began and has not ended, got 0"):
        store.propose(a, 8)


def test_threads():
    store = make(capacity=5000)
    errors = []

    def work(seed):
        try:
            rng = np.random.default_rng(seed)
            for _ in range(50):
                request = store.begin(rng.integers(0, 6, 30).astype(np.int32))
                for _ in range(5):
                    tokens, parents, _ = store.propose(request, 16)
                    assert len(tokens) == len(parents) <= 16
                    store.observe(request, rng.integers(0, 6, 4).astype(np.int32))
                store.end(request)
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_match", 0, "max_match must be at least 1, got 0"),
        ("occurrences", 0, "occurrences must be at least 1"),
        ("growth", 0.5, "growth must be at least 1, got 0.5"),
        ("output_weight", -1.0, "output_weight must be at least 0, got -1"),
        ("min_score", float("nan"), "min_score must be at least 0, got nan"),
        ("capacity", 0, "capacity must be at least 1, got 0"),
    ],
)
def test_refuses_options(option, value, message):
    with pytest.raises(ValueError, match=message):
        make(**{option: value})


def test_refuses_an_empty_prompt():
    with pytest.raises(ValueError, match="prompt must hold at least one token, got 0"):
        make().begin(ids())
    with pytest.raises(ValueError, match="tokens must be one-dimensional, got 2 dimensions"):
        make().add_outputs(np.zeros((2, 2), np.int32))
