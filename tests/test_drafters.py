"""The Python side of the drafters."""

import numpy as np
import pytest

from branchwise.drafters import DraftRequest, PromptLookup, Suffix, Trie, Verified, make_drafter


def ids(*tokens):
    return np.array(tokens, np.int32)


def propose(drafter, prompt, budget=16, eos=()):
    (tree,) = drafter.begin(DraftRequest([ids(*prompt)], frozenset(eos))).propose([budget])
    return tree


def test_prompt_lookup_copies_after_the_longest_match():
    tree = propose(PromptLookup(), [1, 2, 3, 4, 9, 9, 2, 3, 7, 8, 1, 2, 3])
    assert tree.tokens.tolist() == [3, 4, 9, 9, 2, 3, 7, 8, 1, 2, 3]  # three tokens match, at the start
    assert tree.parents.tolist() == list(range(-1, 10))


def test_prompt_lookup_takes_the_last_or_the_first_match():
    text = [2, 5, 2, 6, 2]
    assert propose(PromptLookup(), text).tokens[1] == 6
    assert propose(PromptLookup(match="first"), text).tokens[1] == 5


def test_prompt_lookup_stops_at_eos_and_budget():
    text = [2, 5, 6, 7, 1, 2]
    assert propose(PromptLookup(), text, eos=[7]).tokens.tolist() == [2, 5, 6]
    assert propose(PromptLookup(), text, budget=3).tokens.tolist() == [2, 5, 6]
    assert propose(PromptLookup(num_tokens=1), text).tokens.tolist() == [2, 5]
    assert propose(PromptLookup(), [1, 2, 3]).tokens.tolist() == [3]
    assert propose(PromptLookup(), [4]).tokens.tolist() == [4]


def test_prompt_lookup_sees_its_own_output():
    session = PromptLookup().begin(DraftRequest([ids(1), ids(5, 6)]))
    session.observe(Verified([[2, 3, 1], []]))
    trees = session.propose([8, 8])
    assert trees[0].tokens.tolist() == [1, 2, 3, 1] and trees[1].tokens.tolist() == [6]
    session.keep([1])
    assert [t.tokens.tolist() for t in session.propose([8])] == [[6]]


@pytest.mark.parametrize("kind", [Trie, Suffix])
def test_rows_are_independent_and_outputs_are_shared(kind):
    trie = kind()
    session = trie.begin(DraftRequest([ids(1, 2, 3, 1, 2), ids(7, 8)]))
    trees = session.propose([8, 8])
    assert trees[0].tokens.tolist()[:4] == [2, 3, 1, 2] and len(trees[1]) == 1
    session.observe(Verified([[3], [4, 5, 6]]))
    session.keep([1])
    assert session.propose([8])[0].tokens.tolist() == [6]
    session.close()
    assert propose(trie, [4]).tokens.tolist() == [4, 5, 6]  # what was said is remembered
    assert propose(trie, [1]).tokens.tolist() == [1]  # what was asked is not
    assert propose(kind(), [4]).tokens.tolist() == [4]  # nor is anything in another object
    assert propose(trie, [4], eos=[99]).tokens.tolist() == [4]  # nor under other EOS tokens


def test_suffix_saves_and_loads_past_outputs(tmp_path):
    suffix = Suffix()
    for eos in ((), (7, 9)):
        session = suffix.begin(DraftRequest([ids(1), ids(2)], frozenset(eos)))
        session.observe(Verified([[3, 4, 5], [3, 6, 8 + len(eos)]]))
        session.close()
    path = tmp_path / "outputs"
    suffix.save(path)
    other = Suffix()
    other.load(path)
    for eos in ((), (7, 9)):
        for text in ([3], [4], [1, 3, 6]):
            a, b = propose(suffix, text, eos=eos), propose(other, text, eos=eos)
            assert a.tokens.tolist() == b.tokens.tolist() and len(a) > 1
    path.write_bytes(b"not a file of arrays")
    with pytest.raises(ValueError, match=r"path must name a file written by Suffix.save, got"):
        other.load(path)


def test_names_and_refusals():
    assert isinstance(make_drafter("suffix"), Suffix)
    assert isinstance(make_drafter("trie"), Trie) and isinstance(make_drafter("prompt_lookup"), PromptLookup)
    with pytest.raises(ValueError, match="suffix, token_recycling, trie, got 'magic'"):
        make_drafter("magic")
    with pytest.raises(ValueError, match="max_ngram and num_tokens must be at least 1, got 0 and 10"):
        PromptLookup(max_ngram=0)
    with pytest.raises(ValueError, match="match must be 'first' or 'last', got 'best'"):
        PromptLookup(match="best")
    with pytest.raises(ValueError, match="branch_length must be at least 1"):
        Trie(branch_length=0)
