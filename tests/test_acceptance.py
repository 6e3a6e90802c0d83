"""Acceptance rules by exact enumeration: the emitted text must have exactly the target's law."""

from itertools import product

import numpy as np
import pytest
import torch

from branchwise import RowTree, TokenTree
from branchwise.acceptance import GREEDY, RULES, SAMPLE_AND_MATCH, Target, _walk

V, DEPTH = 3, 2


def target_law(rng):
    """p(x | prefix) for every prefix of up to DEPTH tokens."""
    return {prefix: rng.dirichlet(np.ones(V)) for n in range(DEPTH + 1) for prefix in product(range(V), repeat=n)}


def joint(law):
    """Probability of every text of DEPTH tokens."""
    return {text: law[()][text[0]] * law[text[:1]][text[1]] for text in product(range(V), repeat=DEPTH)}


def random_tree(rng):
    """Up to two children per node, two levels."""
    tokens, parents = [0], [-1]
    for level in range(DEPTH):
        for parent in [i for i in range(len(tokens)) if (parents[i] >= 0) == (level > 0)]:
            for token in rng.permutation(V)[: rng.integers(0, 3)]:
                tokens.append(int(token))
                parents.append(parent)
    row = RowTree(np.array(tokens, np.int32), np.array(parents, np.int32), np.ones(len(tokens), np.float32))
    return TokenTree([row], torch.zeros(1, dtype=torch.int32))


class Enumerator:
    """Stands in for the random draw: replays a given sequence of draws and multiplies their probabilities."""

    def __init__(self, draws):
        self.draws, self.probability, self.used = list(draws), 1.0, 0

    def __call__(self, scores):
        token = self.draws[self.used]
        self.used += 1
        self.probability *= float(scores.double().softmax(-1)[0, token])
        return token


def target_of(tree, law):
    row = tree.rows[0]
    logits = torch.stack([torch.tensor(np.log(law[tuple(row.path(i))[:DEPTH]])) for i in range(len(row))])[None]
    return Target(logits, [torch.zeros(1, 20, dtype=torch.int64)], [1], [[]])


def law_of_walk(tree, law):
    """Law of the first DEPTH tokens that one round of sample-and-match and then plain sampling emit."""
    result = dict.fromkeys(product(range(V), repeat=DEPTH), 0.0)
    seen = set()
    for draws in product(range(V), repeat=DEPTH + 1):
        draw = Enumerator(draws)
        accepted = _walk(tree, target_of(tree, law), draw)
        if draws[: draw.used] in seen:
            continue
        seen.add(draws[: draw.used])
        text = tuple(accepted.tokens(tree, 0))
        if len(text) >= DEPTH:
            result[text[:DEPTH]] += draw.probability
        else:
            for token in range(V):
                result[(*text, token)] += draw.probability * law[text][token]
    return result


def total_variation(a, b):
    return 0.5 * sum(abs(a[key] - b[key]) for key in a)


@pytest.mark.parametrize("seed", range(30))
def test_sample_and_match_is_exact(seed):
    rng = np.random.default_rng(seed)
    law, tree = target_law(rng), random_tree(rng)
    # Logits pass through float32, as in real decoding; the enumeration itself is float64.
    assert total_variation(law_of_walk(tree, law), joint(law)) < 1e-6


def test_longest_of_independent_paths_is_not_exact():
    """Positive control: drawing one continuation per branch and keeping the longest match (Medusa's nucleus mode)."""
    law = {prefix: np.array([0.5, 0.5, 0.0]) for n in range(3) for prefix in product(range(V), repeat=n)}
    # Root with children a and b, each verified with a draw of its own; the first accepted child wins.
    p_a = 0.5 + 0.5 * 0.5 * 0.5  # child a drawn, or neither child drawn and the bonus says a
    wrong = {text: (p_a if text[0] == 0 else 1 - p_a) * law[text[:1]][text[1]] for text in product(range(V), repeat=2)}
    assert total_variation(wrong, joint(law)) > 0.05


def test_greedy_follows_the_argmax_with_and_without_processors():
    rng = np.random.default_rng(0)
    for _ in range(50):
        law, tree = target_law(rng), random_tree(rng)
        plain = target_of(tree, law)
        walked = target_of(tree, law)
        walked.needs_path = True
        fast, slow = GREEDY(tree, plain), GREEDY(tree, walked)
        text = tuple(fast.tokens(tree, 0))
        assert torch.equal(fast.nodes, slow.nodes) and torch.equal(fast.bonus, slow.bonus)
        assert all(law[text[:i]].argmax() == text[i] for i in range(min(len(text), DEPTH + 1)))


def test_processors_see_each_nodes_own_text():
    row = RowTree(np.array([9, 1, 2, 3], np.int32), np.array([-1, 0, 1, 2], np.int32), np.ones(4, np.float32))
    tree = TokenTree([row], torch.tensor([1], dtype=torch.int32))
    texts = []

    def spy(ids, scores):
        texts.append(ids[0].tolist())
        return scores

    logits = torch.full((1, 4, 10), -5.0)
    for node, token in enumerate((1, 2, 7, 0)):
        logits[0, node, token] = 5.0
    buffer = torch.tensor([[8, 9, 0, 0, 0, 0, 0]])
    accepted = GREEDY(tree, Target(logits, [buffer], [2], [[spy]]))
    assert texts == [[8, 9], [8, 9, 1], [8, 9, 1, 2]]
    assert accepted.tokens(tree, 0) == [1, 2, 7] and int(accepted.count[0]) == 3


def test_registry():
    assert set(RULES) == {"greedy", "sample_and_match"} and SAMPLE_AND_MATCH.exact and GREEDY.exact
