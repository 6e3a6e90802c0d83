"""Acceptance rules: which path of a tree is kept, and the token after it. Rules A and F of card tree-verify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .tree import DrawKind, TokenTree

Processor = Callable[[Tensor, Tensor], Tensor]  # (input_ids [1, n], scores [1, V]) -> scores [1, V]


@dataclass
class Accepted:
    """Outcome of a rule for a batch.

    Attributes:
        nodes: i32[B, T] node ids of the accepted path, root first, padded with -1.
        count: i32[B] nodes in it, the root included, so at least 1.
        bonus: i64[B] the token after the last accepted node; it is the next root.
    """

    nodes: Tensor
    count: Tensor
    bonus: Tensor

    def tokens(self, tree: TokenTree, row: int) -> list[int]:
        """What the row emits: accepted tokens, then the bonus."""
        path = self.nodes[row, 1 : int(self.count[row])].long()
        return [*tree.tokens[row, path].tolist(), int(self.bonus[row])]


class Target:
    """The target model's verdict at every node: logits, and the user's processors on each node's own text.

    Args:
        logits: [B, T, V] of the tree's nodes.
        texts: per row, i64[1, n + T + 1]: n tokens up to and including the root, then room for a path.
        lengths: n of each row.
        processors: per row, what plain ``generate`` would apply; empty for none.
        keep_scores: remember raw and processed scores of every emitted token in ``visited``.
    """

    def __init__(
        self,
        logits: Tensor,
        texts: Sequence[Tensor],
        lengths: Sequence[int],
        processors: Sequence[Sequence[Processor]],
        keep_scores: bool = False,
    ) -> None:
        self.logits = logits
        self._texts, self._lengths, self._processors = texts, lengths, processors
        self.visited: list[list[tuple[Tensor, Tensor]]] | None = [[] for _ in texts] if keep_scores else None
        self.needs_path = keep_scores or any(processors)

    def scores(self, row: int, node: int, path: Sequence[int]) -> Tensor:
        """Processed scores f32[1, V] after ``node``; ``path`` holds the tokens from below the root to the node."""
        n = self._lengths[row]
        self._texts[row][0, n : n + len(path)] = torch.tensor(path, dtype=torch.int64)
        raw = self.logits[row, node][None].to(torch.float32, copy=True)
        scores = raw.clone() if self.visited is not None else raw
        for process in self._processors[row]:
            scores = process(self._texts[row][:, : n + len(path)], scores)
        if self.visited is not None:
            self.visited[row].append((raw, scores))
        return scores


def _walk(tree: TokenTree, target: Target, choose: Callable[[Tensor], int]) -> Accepted:
    """From the root to the child that holds the choice, while there is one.

    Only visited nodes are processed, once each and in text order: the calls plain decoding makes.
    """
    B, T = tree.shape
    nodes = torch.full((B, T), -1, dtype=torch.int32)
    count, bonus = torch.ones(B, dtype=torch.int32), torch.empty(B, dtype=torch.int64)
    for row in range(B):
        node, path = 0, [0]
        tokens: list[int] = []
        while True:
            token = choose(target.scores(row, node, tokens))
            child = tree.child(row, node, token)
            if child < 0:
                break
            node = child
            path.append(node)
            tokens.append(token)
        nodes[row, : len(path)] = torch.tensor(path, dtype=torch.int32)
        count[row], bonus[row] = len(path), token
    return Accepted(nodes, count, bonus)


@dataclass(frozen=True)
class Rule:
    """An acceptance rule.

    Attributes:
        exact: the emitted text has exactly the target's distribution.
        accepts: the kinds of drafts for which that holds.
    """

    name: str
    exact: bool
    accepts: frozenset[DrawKind]
    apply: Callable[[TokenTree, Target], Accepted]

    def __call__(self, tree: TokenTree, target: Target) -> Accepted:
        return self.apply(tree, target)


def _greedy(tree: TokenTree, target: Target) -> Accepted:
    if target.needs_path:
        return _walk(tree, target, lambda scores: int(scores.argmax(-1)))
    choice = target.logits.argmax(-1)
    return Accepted(*ops.verify_greedy(tree.tokens, tree.next_token, tree.next_sibling, choice))


def _sample_and_match(tree: TokenTree, target: Target) -> Accepted:
    # The very calls of the plain sampler: with one row and one seed, also the very tokens.
    return _walk(tree, target, lambda scores: int(torch.multinomial(scores.softmax(-1), num_samples=1)))


#: Rule A: the argmax after every node; equals greedy decoding for any tree.
GREEDY = Rule("greedy", True, frozenset(DrawKind), _greedy)
#: Rule F: draw from the target at every visited node and descend while a child matches; exact for any tree whose
#: children were chosen without looking at the draws.
SAMPLE_AND_MATCH = Rule("sample_and_match", True, frozenset(DrawKind), _sample_and_match)

RULES = {rule.name: rule for rule in (GREEDY, SAMPLE_AND_MATCH)}
