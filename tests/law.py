"""Exact laws of the acceptance rules: every draft, every coin and every draw, with its probability."""

from dataclasses import dataclass, field
from itertools import product

import numpy as np

from branchwise.ops.verify_reference import Tree

V, DEPTH = 3, 2


@dataclass
class Branches:
    """A Chance that follows a script of choices, then takes the first ones and notes where it could have gone.

    Each coin is an interval of [0, 1) that decisions narrow, so that one coin may be looked at several times.
    """

    script: tuple = ()
    choices: list = field(default_factory=list)
    coins: dict = field(default_factory=dict)  # (node, 0 accept or 1 draw) -> (low, high)
    untried: list = field(default_factory=list)

    def _choose(self, coin, options):
        """Options: (value, low, high), disjoint and in order."""
        low, high = self.coins.get(coin, (0.0, 1.0))
        options = [(value, max(low, a), min(high, b)) for value, a, b in options]
        options = [option for option in options if option[2] > option[1]]
        at = len(self.choices)
        if at < len(self.script):
            choice = self.script[at]
        else:
            choice = 0
            self.untried += [(*self.choices, other) for other in range(1, len(options))]
        self.choices.append(choice)
        value, *self.coins[coin] = options[choice]
        return value

    def accept(self, node, probability):
        return self._choose((node, 0), [(True, 0.0, probability), (False, probability, 1.0)])

    def draw(self, node, weights):
        edges = np.concatenate([[0.0], np.cumsum(weights)]) / weights.sum()
        edges[edges > 1 - 1e-15] = 1.0
        return self._choose((node, 1), [(t, edges[t], edges[t + 1]) for t in range(len(weights)) if weights[t] > 0])

    @property
    def probability(self):
        return float(np.prod([high - low for low, high in self.coins.values()]))


def branches(rule, tree):
    """All (verdict, branch) of a rule on a tree."""
    todo, found = [()], []
    while todo:
        branch = Branches(todo.pop())
        found.append((rule(tree, branch), branch))
        todo += branch.untried
    return found


class Model:
    """A target p(x | text) and a draft q(x | text) for all texts of up to DEPTH tokens."""

    def __init__(self, rng, concentration=1.0):
        texts = [text for n in range(DEPTH + 1) for text in product(range(V), repeat=n)]
        self.p = {text: rng.dirichlet(np.full(V, concentration)) for text in texts}
        self.q = {text: rng.dirichlet(np.full(V, concentration)) for text in texts}

    def tree(self, texts):
        """The token tree whose nodes are these texts, root first, parents before children, siblings in order."""
        tokens = [text[-1] if text else 0 for text, _ in texts]
        parents = [parent for _, parent in texts]
        laws = [text for text, _ in texts]
        return Tree(tokens, parents, [self.p[text] for text in laws], [self.q[text] for text in laws])

    def joint(self):
        """The target's law of texts of DEPTH + 1 tokens."""
        texts = product(range(V), repeat=DEPTH + 1)
        return {text: np.prod([self.p[text[:i]][text[i]] for i in range(len(text))]) for text in texts}

    def drafts(self, children, draw):
        """All trees of DEPTH levels, ``children`` drawn below every node, with their probabilities."""

        def grow(text, level):
            """Lists of (path of the subtree's nodes) in preorder with relative parents, and probability."""
            if level == DEPTH:
                return [([(text, None)], 1.0)]
            result = []
            for tokens, probability in draw(self.q[text], children):
                below = [grow((*text, token), level + 1) for token in tokens]
                for combination in product(*below):
                    nodes, weight = [(text, None)], probability
                    for sub, w in combination:
                        offset = len(nodes)
                        nodes += [(t, 0 if p is None else p + offset) for t, p in sub]
                        weight *= w
                    result.append((nodes, weight))
            return result

        for nodes, probability in grow((), 0):
            yield self.tree([(t, -1 if p is None else p) for t, p in nodes]), probability


def with_replacement(q, k):
    return [(tokens, float(np.prod([q[t] for t in tokens]))) for tokens in product(range(V), repeat=k)]


def without_replacement(q, k):
    found = []
    for tokens in product(range(V), repeat=k):
        if len(set(tokens)) == k:
            left, probability = q.copy(), 1.0
            for token in tokens:
                probability *= left[token] / left.sum()
                left[token] = 0.0
            found.append((tokens, probability))
    return found


def likeliest(q, k):
    """Deterministic: the k likeliest, best first."""
    return [(tuple(np.argsort(-q)[:k].tolist()), 1.0)]


def law_of_round(rule, model, drafts):
    """Law of DEPTH + 1 tokens: one round of drafting and verification, then plain sampling."""
    law = dict.fromkeys(product(range(V), repeat=DEPTH + 1), 0.0)
    for tree, drafted in drafts:
        for (path, bonus), branch in branches(rule, tree):
            text = (*(tree.tokens[node] for node in path[1:]), bonus)
            weight = drafted * branch.probability
            for rest in product(range(V), repeat=DEPTH + 1 - len(text)):
                whole = text + rest
                law[whole] += weight * np.prod([model.p[whole[:i]][whole[i]] for i in range(len(text), len(whole))])
    return law


def total_variation(a, b):
    return 0.5 * sum(abs(a[key] - b[key]) for key in a)


def expected_accepted(rule, drafts):
    return sum(
        drafted * branch.probability * (len(path) - 1)
        for tree, drafted in drafts
        for (path, _), branch in branches(rule, tree)
    )
