"""How trees grow from logits: best-first (EAGLE-2) or in a fixed shape, from the likeliest tokens or drawn ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..tree import RowTree

Shape = tuple[Sequence[int], Sequence[int]]  # parents and ranks among siblings, level by level


class Expander(Protocol):
    """A model that scores the nodes of growing trees, one row each. Nodes are numbered in the order in which they are
    expanded, from 0, the root left out."""

    def root(self) -> Tensor:
        """Logits [B, V] after the roots."""
        ...

    def expand(self, tokens: Tensor, depths: Tensor, ancestors: Tensor) -> Tensor:
        """Logits [B, k, V] after k more nodes per row.

        Args:
            tokens, depths: i64[B, k]; a node below the root has depth 1.
            ancestors: bool[B, N, N] of all nodes so far, these k the last: ``[b, i, j]``: i descends from j, or is j.
        """
        ...


class _Growth:
    """The nodes of a batch while they grow: [B, M] arrays, node 0 the root. ``slots`` counts expanded nodes."""

    def __init__(self, expander: Expander, roots: Sequence[int]) -> None:
        B = len(roots)
        self._expander = expander
        self._rows = torch.arange(B)[:, None]
        self.tokens = torch.tensor(roots)[:, None]
        self.parents = torch.full((B, 1), -1)
        self.log_scores = torch.zeros(B, 1, dtype=torch.float64)
        self.depths = torch.zeros(B, 1, dtype=torch.int64)
        self.slots = torch.full((B, 1), -1)
        self._ancestors = torch.zeros(B, 0, 0, dtype=torch.bool)

    def add(self, parents: Tensor, tokens: Tensor, log_scores: Tensor) -> Tensor:
        """Adds [B, k] nodes; returns their numbers."""
        first, k = self.tokens.shape[1], tokens.shape[1]
        depths = self.depths[self._rows, parents] + 1
        for name, new in (
            ("tokens", tokens),
            ("parents", parents),
            ("log_scores", log_scores),
            ("depths", depths),
            ("slots", torch.full_like(tokens, -1)),
        ):
            setattr(self, name, torch.cat([getattr(self, name), new], 1))
        return torch.arange(first, first + k).expand(len(self._rows), -1)

    def expand(self, nodes: Tensor) -> Tensor:
        """Logits [B, k, V] after nodes [B, k] whose parents were expanded before."""
        B, k = nodes.shape
        N = self._ancestors.shape[1]
        parent_slots = self.slots[self._rows, self.parents[self._rows, nodes]]
        grown = torch.zeros(B, N + k, N + k, dtype=torch.bool)
        grown[:, :N, :N] = self._ancestors
        below_root = (parent_slots < 0)[..., None]
        if N:
            grown[:, N:, :N] = self._ancestors[self._rows, parent_slots.clamp(0)].masked_fill(below_root, False)
        own = torch.arange(N, N + k)
        grown[:, own, own] = True
        self._ancestors = grown
        self.slots[self._rows, nodes] = own
        return self._expander.expand(self.tokens[self._rows, nodes], self.depths[self._rows, nodes], grown)

    def trees(self, budgets: Sequence[int]) -> list[RowTree]:
        """The likeliest nodes of each row, best first; ``ids`` holds their slots."""
        return [self._row(b, budget) for b, budget in enumerate(budgets)]

    def _row(self, b: int, budget: int) -> RowTree:
        log_scores = self.log_scores[b].numpy()
        # Ties go to the older node, so parents, which are never less likely, come before children.
        order = np.argsort(-log_scores, kind="stable")[: max(budget, 1)]
        order = order[log_scores[order] > -np.inf]
        place = np.full(len(log_scores), -1, np.int32)
        place[order] = np.arange(len(order))
        parents = self.parents[b].numpy()[order]
        return RowTree(
            tokens=self.tokens[b].numpy()[order].astype(np.int32),
            parents=np.where(parents >= 0, place[parents], -1).astype(np.int32),
            scores=np.exp(log_scores[order]).astype(np.float32),
            ids=self.slots[b].numpy()[order].astype(np.int32),
        )


def grow_best_first(
    expander: Expander,
    roots: Sequence[int],
    budgets: Sequence[int],
    eos: Tensor,
    *,
    width: int,
    depth: int,
    min_score: float,
) -> list[RowTree]:
    """EAGLE-2's tree: of each level the ``width`` likeliest paths are expanded, ``width`` children each; in the end
    the likeliest nodes of all stay (card fspad, "EAGLE-2 dynamic tree").

    Growth stops early where the paths in hand are together less likely than ``min_score`` in every row.

    Returns:
        One tree per row of at most ``budgets[b]`` nodes.
    """
    growth = _Growth(expander, roots)
    values, tokens = _likeliest(expander.root(), eos, width)
    frontier = growth.add(torch.zeros_like(tokens), tokens, values)
    rows = torch.arange(len(roots))[:, None]
    for _ in range(min(depth, max(budgets) - 1) - 1):
        if growth.log_scores[rows, frontier].exp().sum(1).max() < min_score:
            break
        values, tokens = _likeliest(growth.expand(frontier), eos, width)
        values = values + growth.log_scores[rows, frontier][..., None]
        parents = frontier[..., None].expand_as(tokens)
        nodes = growth.add(parents.flatten(1), tokens.flatten(1), values.flatten(1))
        frontier = nodes.gather(1, values.flatten(1).topk(frontier.shape[1]).indices)
    return growth.trees(budgets)


def grow_chain(
    expander: Expander, roots: Sequence[int], budgets: Sequence[int], eos: Tensor, *, depth: int, confidence: float
) -> list[RowTree]:
    """The likeliest token again and again, as long as its probability is at least ``confidence`` and it ends no text:
    what comes then is for the larger model to say (card bild, small phase).

    Returns:
        One chain per row of at most ``depth`` nodes below the root and ``budgets[b]`` in all.
    """
    growth = _Growth(expander, roots)
    last = torch.zeros(len(roots), 1, dtype=torch.int64)
    going = torch.ones(len(roots), 1, dtype=torch.bool)
    for level in range(min(depth, max(budgets) - 1)):
        logits = expander.root()[:, None] if level == 0 else growth.expand(last)
        tokens, log_probs = (x[:, 0] for x in ops.top_tokens(logits, 1))
        going = going & (log_probs.exp() >= confidence) & ~torch.isin(tokens.long(), eos)
        if not bool(going.any()):
            break
        before = growth.log_scores.gather(1, last)
        # A row that has stopped has no more nodes; what is computed for it is not used.
        values = torch.where(going, before + log_probs.double(), -torch.inf)
        last = growth.add(last, tokens.long().clamp(0), values)
    return growth.trees(budgets)


def grow_shape(
    expander: Expander,
    roots: Sequence[int],
    budgets: Sequence[int],
    eos: Tensor,
    shape: Shape,
    *,
    uniforms: Tensor | None = None,
    warp: Callable[[Tensor], Tensor] | None = None,
) -> list[RowTree]:
    """A tree of a shape that was fixed before any token was seen.

    Args:
        expander, roots, budgets, eos: as above; rows whose budget is smaller than the shape get their root alone.
        shape: of every row's tree.
        uniforms: f64[B, n], n nodes of the shape: children are drawn without replacement; None: the likeliest tokens.
        warp: logits [n, V] to the logits that are drawn from.

    Returns:
        One tree per row; drawn ones with the distributions that they were drawn from.
    """
    growth = _Growth(expander, roots)
    B, (parents, _) = len(roots), shape
    number = [0] * len(parents)  # of every node of the shape: its number in growth, the same in all rows
    expanded: list[int] = []
    tables: list[Tensor] = []  # what the children of expanded nodes are drawn from
    children: dict[int, list[int]] = {}
    for node in range(1, len(parents)):
        children.setdefault(parents[node], []).append(node)
    level = [0]
    while inner := [node for node in level if node in children]:
        at = torch.tensor([number[node] for node in inner]).expand(B, -1)
        logits = expander.root()[:, None] if level == [0] else growth.expand(at)
        log_probs = _log_probs(logits if warp is None else warp(logits.flatten(0, 1)).view(logits.shape), eos)
        probs = log_probs.exp() / log_probs.exp().sum(-1, keepdim=True)
        left = probs.clone()
        for i, node in enumerate(inner):
            for child in children[node]:
                if uniforms is None:
                    token = left[:, i].argmax(-1, keepdim=True)
                else:
                    token = _draw(left[:, i], uniforms[:, child])
                # Where nothing is left to draw, this child and what is below it do not exist.
                exists = left[:, i].gather(1, token) > 0
                value = growth.log_scores[:, number[node], None] + log_probs[:, i].gather(1, token)
                value = torch.where(exists, value, -torch.inf)
                number[child] = int(growth.add(at[:, i, None], token, value)[0, 0])
                left[:, i] = left[:, i].scatter(1, token, 0.0)
        tables.append(probs.float())
        expanded += [number[node] for node in inner]
        level = [child for node in inner for child in children[node]]
    if uniforms is None:
        return growth.trees(budgets)
    return _drawn(growth, budgets, expanded, tables) if tables else [RowTree.root(root) for root in roots]


def _drawn(growth: _Growth, budgets: Sequence[int], expanded: list[int], tables: list[Tensor]) -> list[RowTree]:
    # The order of siblings is that of their draws, and nothing is left out for its score.
    table = torch.cat(tables, 1)  # [B, expanded nodes, V]
    (B, R), count = table.shape[:2], growth.tokens.shape[1]
    flat = table.flatten(0, 1)
    inner = np.full(count, -1, np.int32)
    inner[expanded] = np.arange(R)
    trees = []
    for b in range(B):
        if budgets[b] < count:
            trees.append(RowTree.root(int(growth.tokens[b, 0])))
            continue
        whole = RowTree(
            tokens=growth.tokens[b].numpy().astype(np.int32),
            parents=growth.parents[b].numpy().astype(np.int32),
            scores=growth.log_scores[b].exp().numpy().astype(np.float32),
            draft=flat,
            draft_index=np.where(inner >= 0, inner + b * R, -1).astype(np.int32),
            ids=growth.slots[b].numpy().astype(np.int32),
        )
        trees.append(whole.only(growth.log_scores[b].numpy() > -np.inf))
    return trees


def _likeliest(logits: Tensor, eos: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities f64[..., count] and tokens of the likeliest, EOS left out."""
    tokens, log_probs = ops.top_tokens(logits, min(count, logits.shape[-1]), eos)
    return log_probs.double(), tokens.long().clamp(0)


def _log_probs(logits: Tensor, eos: Tensor) -> Tensor:
    log_probs = logits.double().log_softmax(-1)
    return log_probs.index_fill(-1, eos, -torch.inf) if len(eos) else log_probs


def _draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """An index i64[B, 1] with chance in proportion to f64[B, V] weights; one of weight 0 only where all are 0."""
    sums = weights.cumsum(-1)
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1, keepdim=True)
    found = torch.searchsorted(sums, (uniforms * sums[:, -1])[:, None], right=True)
    return torch.minimum(found, last)
