"""TokenTree: a batch of token trees, one guess about the future per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from . import ops


class DrawKind(Enum):
    """How the children of a node were chosen; an acceptance rule is exact only for some of these."""

    DETERMINISTIC = "deterministic"
    WITH_REPLACEMENT = "with_replacement"
    WITHOUT_REPLACEMENT = "without_replacement"


@dataclass
class RowTree:
    """The tree of one row: node 0 is the root (the last committed token), ``parents[i] < i``.

    ``scores`` estimate the probability that the path to a node is right; they never increase from parent to child
    and serve to choose a tree size, not to accept. Best-first drafters emit nodes in falling order of score, so any
    first n nodes are a tree of their own.
    """

    tokens: np.ndarray  # i32[n]
    parents: np.ndarray  # i32[n], parents[0] = -1
    scores: np.ndarray  # f32[n], scores[0] = 1

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if n == 0 or len(self.parents) != n or len(self.scores) != n:
            raise ValueError(
                f"tokens, parents and scores must have one equal length of at least 1, got {n}, "
                f"{len(self.parents)} and {len(self.scores)}"
            )
        if self.parents[0] != -1 or (self.parents[1:] < 0).any() or (self.parents >= np.arange(n)).any():
            raise ValueError(f"parents must be -1 for the root and else a node before, got {self.parents.tolist()}")

    @classmethod
    def root(cls, token: int) -> RowTree:
        return cls(np.array([token], np.int32), np.array([-1], np.int32), np.ones(1, np.float32))

    @classmethod
    def chain(cls, root: int, tokens: Sequence[int] | np.ndarray, scores: np.ndarray) -> RowTree:
        n = len(tokens)
        return cls(
            np.concatenate([[root], tokens]).astype(np.int32),
            np.arange(-1, n, dtype=np.int32),
            np.concatenate([[1.0], scores]).astype(np.float32),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, n: int) -> RowTree:
        return self if n >= len(self) else RowTree(self.tokens[:n], self.parents[:n], self.scores[:n])

    def path(self, node: int) -> list[int]:
        """Tokens after the root down to ``node``."""
        tokens: list[int] = []
        while node > 0:
            tokens.append(int(self.tokens[node]))
            node = int(self.parents[node])
        return tokens[::-1]


class TokenTree:
    """A batch of trees, padded to T nodes, with what the model and the verifier need.

    Attributes:
        rows: the trees, ragged.
        tokens: i64[B, T]; padding repeats the row's root.
        parents: i32[B, T]; -1 for roots and padding.
        tree_mask, positions, next_token, next_sibling: see :func:`branchwise.ops.build_tree`.
        is_chain: every row is one branch, so causal attention serves and no mask is needed.
    """

    def __init__(self, rows: Sequence[RowTree], seq_lens: Tensor) -> None:
        self.rows = list(rows)
        B, T = len(self.rows), max(len(row) for row in self.rows)
        tokens, parents = np.empty((B, T), np.int64), np.full((B, T), -1, np.int32)
        for b, row in enumerate(self.rows):
            tokens[b, : len(row)], tokens[b, len(row) :] = row.tokens, row.tokens[0]
            parents[b, : len(row)] = row.parents
        self.tokens, self.parents = torch.from_numpy(tokens), torch.from_numpy(parents)
        self.tree_mask, self.positions, self.next_token, self.next_sibling = ops.build_tree(self.parents, seq_lens)
        chain = np.arange(-1, T - 1)
        self.is_chain = all(np.array_equal(row.parents, chain[: len(row)]) for row in self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[0], self.tokens.shape[1]

    def child(self, row: int, node: int, token: int) -> int:
        """The child of ``node`` that holds ``token``, or -1."""
        tree = self.rows[row]
        hits = np.flatnonzero((tree.parents[node + 1 :] == node) & (tree.tokens[node + 1 :] == token))
        return int(hits[0]) + node + 1 if len(hits) else -1
