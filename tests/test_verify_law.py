"""Exact rules follow the target's law, by enumeration of every draft and coin; wrong ones, planted here, do not.

The rules enumerated are those of ops/verify_reference.py. The ops are then held to the same branches: with coins from
both ends of every interval they must reach the same verdict, so their law is the same up to what fp32 moves the ends.
"""

from functools import partial

import numpy as np
import pytest
import torch

from branchwise.ops import verify_reference as reference
from law import (
    Model,
    branches,
    expected_accepted,
    law_of_round,
    likeliest,
    total_variation,
    with_replacement,
    without_replacement,
)
from verify_cases import RULES, pack

#: rule: (children per node, how they are drawn)
EXACT = {
    "match": (2, likeliest),
    "each_child": (2, likeliest),
    "one_coin": (2, likeliest),
    "chain": (1, with_replacement),
    "with_replacement": (2, with_replacement),
    "without_replacement": (2, without_replacement),
    "block": (1, with_replacement),
    "traversal_with": (2, with_replacement),
    "traversal_without": (2, without_replacement),
}
#: Further drafts that a rule is exact for.
ALSO = [
    ("match", 2, with_replacement),
    ("match", 2, without_replacement),
    ("each_child", 2, without_replacement),
    ("one_coin", 2, with_replacement),
    ("each_child", 3, likeliest),
    ("without_replacement", 3, without_replacement),
    ("traversal_without", 1, without_replacement),
    # Passing over children that were drawn before leaves draws without replacement, if fewer.
    ("without_replacement", 2, with_replacement),
    ("traversal_without", 2, with_replacement),
]


@pytest.mark.parametrize(("rule", "children", "draw"), [*((rule, *how) for rule, how in EXACT.items()), *ALSO])
@pytest.mark.parametrize("seed", range(3))
def test_exact_rules_follow_the_target(rule, children, draw, seed):
    model = Model(np.random.default_rng(seed), concentration=(1.0, 0.5, 3.0)[seed])
    law = law_of_round(RULES[rule][2], model, model.drafts(children, draw))
    assert abs(sum(law.values()) - 1) < 1e-12
    assert total_variation(law, model.joint()) <= 1e-12


def test_expected_acceptance():
    """Orders known from theory: block >= chain, and traversal >= multi-draft, on any model."""
    for seed in range(4):
        model = Model(np.random.default_rng(seed))
        mean = {
            rule: expected_accepted(RULES[rule][2], model.drafts(*EXACT[rule]))
            for rule in EXACT
            if rule != "traversal_with" or seed == 0
        }
        assert mean["block"] >= mean["chain"] - 1e-12
        assert mean["traversal_without"] >= mean["without_replacement"] - 1e-12
        assert mean["match"] == pytest.approx(mean["each_child"]) and mean["match"] == pytest.approx(mean["one_coin"])


# Planted wrong rules.


def unprocessed_draft(tree, chance):
    """Verifies with another q than drafts were drawn from (transformers issue 47932)."""
    flat = [None if q is None else (q**0.5) / (q**0.5).sum() for q in tree.q]
    other = reference.Tree(tree.tokens, [-1] * len(tree.tokens), tree.p, flat)
    other.children = tree.children
    return reference.multi_draft(other, chance, replacement=False)


def bonus_from_the_target(tree, chance):
    """After a rejection, draws from p instead of the residual."""
    path, _ = reference.multi_draft(tree, chance, replacement=True)
    end = path[-1]
    chance.coins.pop((end, 1), None)
    return path, chance.draw(end, tree.p[end])


def keeps_rejected_children(tree, chance):
    """Rule E without taking the rejected token out."""
    node, path = 0, [0]
    while True:
        hit = next((c for c in tree.children[node] if chance.accept(c, tree.p[node][tree.tokens[c]])), None)
        if hit is None:
            return path, chance.draw(node, tree.p[node])
        node = hit
        path.append(node)


def longest_of_independent_paths(tree, chance):
    """A token drawn per node, and the longest path of matches kept (Medusa's and REST's nucleus mode)."""
    drawn = [chance.draw(node, p) for node, p in enumerate(tree.p)]
    best = [0]

    def visit(path):
        nonlocal best
        best = max(best, path, key=len)
        for child in tree.children[path[-1]]:
            # One draw per path: siblings' subtrees look at coins of their own.
            if chance.accept(child, tree.p[path[-1]][tree.tokens[child]]):
                visit([*path, child])

    visit([0])
    return best, drawn[best[-1]]


def ratio_of_normalisers(tree, chance, replacement):
    """Traversal that updates a node's acceptance by the ratio of the two normalisers, as one public port does."""

    def visit(node, accepted):
        target, draft = tree.p[node], tree.q[node]
        for child in tree.children[node]:
            token = tree.tokens[child]
            found = visit(child, min(1.0, accepted * target[token] / draft[token])) if draft[token] > 0 else None
            if found is not None:
                return [node, *found[0]], found[1]
            left = 1.0 - draft[token]
            target, draft, mass = reference._reject(target, draft, accepted, token, replacement)
            accepted = min(1.0, mass / left) if node else 1.0
        if node == 0 or chance.accept(node, accepted):
            return [node], chance.draw(node, target)
        return None

    return visit(0, 1.0)


WRONG = {
    "multi_draft on top-k children": (RULES["with_replacement"][2], 2, likeliest),
    "with-replacement rule on draws without": (RULES["with_replacement"][2], 2, without_replacement),
    "another draft distribution": (unprocessed_draft, 2, without_replacement),
    "bonus from the target": (bonus_from_the_target, 1, with_replacement),
    "rejected children kept": (keeps_rejected_children, 2, likeliest),
    "longest of independent paths": (longest_of_independent_paths, 1, likeliest),
    "ratio of normalisers": (partial(ratio_of_normalisers, replacement=False), 2, without_replacement),
    "greedy": (RULES["greedy"][2], 2, likeliest),
    "typical": (RULES["typical"][2], 2, likeliest),
    "thresholds": (RULES["thresholds"][2], 2, likeliest),
}


@pytest.mark.parametrize("name", WRONG)
def test_planted_wrong_rules_are_caught(name):
    rule, children, draw = WRONG[name]
    worst = 0.0
    for seed in range(6):
        model = Model(np.random.default_rng(seed), concentration=0.5)
        law = law_of_round(rule, model, model.drafts(children, draw))
        worst = max(worst, total_variation(law, model.joint()))
    assert worst > 0.05, worst


# The ops on the enumerated branches.


def coins(branch, T, where):
    """Uniforms [T, 2] within the branch's intervals: their middle, or close to one end."""
    u = np.full((T, 2), 0.5)
    for (node, slot), (low, high) in branch.coins.items():
        near = 2e-5 if high - low > 1e-4 else (high - low) / 2
        u[node, slot] = {"middle": (low + high) / 2, "low": low + near, "high": high - near}[where]
    return u


@pytest.mark.parametrize("rule", EXACT)
def test_ops_take_the_enumerated_branches(rule):
    model = Model(np.random.default_rng(7))
    rows, p, q, u, expected = [], [], [], [], []
    for tree, _ in list(model.drafts(*EXACT[rule]))[:150]:
        parents = [-1] * len(tree.tokens)
        for node, children in enumerate(tree.children):
            for child in children:
                parents[child] = node
        for verdict, branch in branches(RULES[rule][2], tree):
            for where in ("middle", "low", "high"):
                if any(high - low < 1e-6 for low, high in branch.coins.values()):
                    continue
                rows.append((tree.tokens, parents))
                p.append(np.stack(tree.p))
                q.append(np.stack(tree.q))
                u.append(coins(branch, len(tree.tokens), where))
                expected.append(verdict)
    as_f32 = lambda x: torch.tensor(np.stack(x), dtype=torch.float32)  # noqa: E731
    batch = pack(rows, as_f32(np.log(p)), as_f32(q), as_f32(u))
    accepted, count, bonus = batch.run(rule)
    for b, (path, token) in enumerate(expected):
        assert (accepted[b, : count[b]].tolist(), int(bonus[b])) == (path, token), (b, u[b])
    assert len(expected) > 15
