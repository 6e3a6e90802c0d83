"""A drafter that draws trees from a small model, recomputed from scratch every time: plain, for tests."""

from __future__ import annotations

import numpy as np
import torch

from branchwise.drafters import Needs
from branchwise.noise import Purpose
from branchwise.tree import DrawKind, RowTree

_LAWS = {}  # by model and text, for tests with many equal rows and few models


class ModelDrafter:
    """``width`` children per node, ``depth`` levels, drawn from ``model`` at ``temperature``, never EOS."""

    needs = Needs.NOTHING

    def __init__(self, model, draws, width=2, depth=2, temperature=1.0):
        self.model, self.draws, self.width, self.depth, self.temperature = model, draws, width, depth, temperature

    def begin(self, request):
        self.texts, self.noise = [p.tolist() for p in request.prompts], request.noise
        self.eos = sorted(request.eos)
        return self

    def propose(self, budgets):
        count = sum(self.width**level for level in range(1, self.depth + 1)) + 1
        lengths = torch.tensor([len(text) for text in self.texts])
        noise = self.noise.at_nodes(lengths, count, Purpose.DRAFT)[..., 1].double().numpy()
        return [self._tree(b, budget, noise[b]) for b, budget in enumerate(budgets)]

    def _law(self, text):
        key = (id(self.model), self.temperature, tuple(self.eos), *text)
        if key not in _LAWS:
            logits = self.model(torch.tensor([text])).logits[0, -1].float() / self.temperature
            logits[self.eos] = -torch.inf
            _LAWS[key] = logits.softmax(-1)
        return _LAWS[key]

    def _tree(self, b, budget, noise):
        tokens, parents, laws, paths = [self.texts[b][-1]], [-1], [], [self.texts[b]]
        index, level = [-1], [0]
        for node in range(budget):
            if node >= len(tokens) or level[node] == self.depth or len(tokens) + self.width > budget:
                break
            law = self._law(paths[node])
            index[node] = len(laws)
            laws.append(law)
            left = law.double().numpy().copy()
            for _ in range(self.width):
                token = int(np.searchsorted(np.cumsum(left) / left.sum(), noise[len(tokens)], side="right"))
                if self.draws is DrawKind.WITHOUT_REPLACEMENT:
                    left[token] = 0.0
                tokens.append(token)
                parents.append(node)
                index.append(-1)
                level.append(level[node] + 1)
                paths.append([*paths[node], token])
        draft = torch.stack(laws) if laws else None
        return RowTree(
            np.int32(tokens),
            np.int32(parents),
            np.ones(len(tokens), np.float32),
            draft,
            np.int32(index) if laws else None,
        )

    def observe(self, verified):
        for text, tokens in zip(self.texts, verified.emitted, strict=True):
            text += tokens

    def keep(self, rows):
        self.texts = [self.texts[row] for row in rows]

    def close(self):
        pass
