"""An adversarial drafter: random trees that sometimes contain what the target will say."""

from __future__ import annotations

import numpy as np

from branchwise.drafters import Needs
from branchwise.tree import DrawKind, RowTree


class RandomTrees:
    """Random shapes and tokens; with probability ``luck`` a child is the true next token of ``truth``.

    ``truth``: per row, the tokens that plain decoding emits, so that deep paths get accepted, too.
    """

    draws, needs = DrawKind.DETERMINISTIC, Needs.NOTHING

    def __init__(self, truth, seed=0, luck=0.7, vocabulary=128, forbid=()):
        self.truth, self.rng, self.luck = truth, np.random.default_rng(seed), luck
        self.vocabulary, self.forbid = vocabulary, forbid

    def begin(self, request):
        self.last = [int(p[-1]) for p in request.prompts]
        self.done = [0] * len(self.last)
        self.rows = list(range(len(self.last)))
        self.proposed = 0
        return self

    def propose(self, budgets):
        return [self._tree(i, budget) for i, budget in enumerate(budgets)]

    def _tree(self, i, budget):
        truth = self.truth[self.rows[i]][self.done[i] :]
        n = int(self.rng.integers(1, budget + 1))
        tokens, parents, depth, on_path = [self.last[i]], [-1], [0], [True]
        for node in range(1, n):
            parent = int(self.rng.integers(max(0, node - 4), node))
            right = on_path[parent] and depth[parent] < len(truth) and self.rng.random() < self.luck
            token = int(truth[depth[parent]]) if right else int(self.rng.integers(0, self.vocabulary))
            siblings = [tokens[j] for j in range(1, node) if parents[j] == parent]
            if token in siblings:
                token = next(t for t in range(self.vocabulary) if t not in siblings)
                right = False
            tokens.append(token)
            parents.append(parent)
            depth.append(depth[parent] + 1)
            on_path.append(right)
        self.proposed += n - 1
        scores = np.ones(n, np.float32)
        for node in range(1, n):
            scores[node] = scores[parents[node]] * 0.9
        return RowTree(np.array(tokens, np.int32), np.array(parents, np.int32), scores)

    def observe(self, verified):
        for i, tokens in enumerate(verified.emitted):
            self.done[i] += len(tokens)
            if tokens:
                self.last[i] = tokens[-1]

    def keep(self, rows):
        self.last, self.done, self.rows = ([x[r] for r in rows] for x in (self.last, self.done, self.rows))

    def close(self):
        pass
