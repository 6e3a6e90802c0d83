"""TokenTree: a batch of token trees, one guess about the future per row."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import ops
from .devices import to_device

FOREIGN = -2  # in RowTree.ids as a drafter sees it: the node is another drafter's


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

    A drafter that draws hands over the distributions that it really drew from. The order of siblings is the order of
    drawing.
    """

    tokens: np.ndarray  # i32[n]
    parents: np.ndarray  # i32[n], parents[0] = -1
    scores: np.ndarray  # f32[n], scores[0] = 1
    draft: Tensor | None = None  # f32[R, V]; rows of a batch may share one
    draft_index: np.ndarray | None = None  # i32[n]: row of draft that a node's children were drawn from, or -1
    ids: np.ndarray | None = None  # i32[n], the drafter's own names for the nodes: they stay when nodes are left out
    fixed: int = 1  # nodes that must be verified whatever it costs: a drafter learns from what the target says there

    def __post_init__(self) -> None:
        n = len(self.tokens)
        if n == 0 or len(self.parents) != n or len(self.scores) != n:
            raise ValueError(
                f"tokens, parents and scores must have one equal length of at least 1, got {n}, "
                f"{len(self.parents)} and {len(self.scores)}"
            )
        # As unsigned numbers, negative ones are large: one comparison sees both errors.
        above = np.asarray(self.parents[1:], np.int32).view(np.uint32)
        if self.parents[0] != -1 or (n > 1 and (above > np.arange(n - 1, dtype=np.uint32)).any()):
            raise ValueError(f"parents must be -1 for the root and else a node before, got {self.parents.tolist()}")
        if (self.draft is None) != (self.draft_index is None):
            raise ValueError("draft and draft_index must be given together")
        for name in ("draft_index", "ids"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise ValueError(f"{name} must have one entry per node, {n}, got {len(value)}")

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

    @classmethod
    def alike(cls, tokens: np.ndarray, parents: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> list[RowTree]:
        """Trees of one shape, for i32[B, n] tokens."""
        one = cls(tokens[0], parents, scores, ids=ids)
        return [one._with({"tokens": row}) for row in tokens]

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, n: int) -> RowTree:
        """Its first n nodes, or the fixed ones if those are more."""
        n = max(n, self.fixed)
        if n >= len(self):
            return self
        names = ("tokens", "parents", "scores", "draft_index", "ids")
        parts = {name: getattr(self, name) for name in names}
        return self._with({name: None if value is None else value[:n] for name, value in parts.items()})

    def named(self, ids: np.ndarray) -> RowTree:
        """With other ``ids``, and no more nodes fixed than the root."""
        return self._with({"ids": ids, "fixed": 1})

    def _with(self, changes: dict[str, Any]) -> RowTree:
        # Was checked as a whole; trees are made by the thousand.
        other = object.__new__(RowTree)
        other.__dict__ = self.__dict__ | changes
        return other

    def only(self, keep: np.ndarray) -> RowTree:
        """Without the nodes where bool[n] ``keep`` is False; a node's parent must be kept with it.

        Raises:
            ValueError: the root is not kept.
        """
        if not keep[0]:
            raise ValueError(f"keep must hold the root, got {keep.tolist()}")
        parents = (np.cumsum(keep, dtype=np.int32) - 1)[self.parents[keep]]
        parents[0] = -1
        parts = {name: getattr(self, name) for name in ("tokens", "scores", "draft_index", "ids")}
        kept = {name: None if value is None else value[keep] for name, value in parts.items()}
        return self._with(kept | {"parents": parents, "fixed": int(keep[: self.fixed].sum())})

    def up_to_depth(self, limit: int) -> RowTree:
        """Without the nodes more than ``limit`` levels below the root."""
        if len(self) - 1 <= limit:
            return self
        depth = np.zeros(len(self), np.int64)
        for node in range(1, len(self)):
            depth[node] = depth[self.parents[node]] + 1
        return self.only(depth <= max(limit, 0))

    def path(self, node: int) -> list[int]:
        """Tokens after the root down to ``node``."""
        tokens: list[int] = []
        while node > 0:
            tokens.append(int(self.tokens[node]))
            node = int(self.parents[node])
        return tokens[::-1]


class Links(NamedTuple):
    """What acceptance rules read of a batch of trees, on the device of the logits; shapes as in :class:`TokenTree`."""

    tokens: Tensor
    next_token: Tensor
    next_sibling: Tensor
    draft: Tensor | None = None
    draft_index: Tensor | None = None
    draws: DrawKind = DrawKind.DETERMINISTIC

    @property
    def walk(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens, self.next_token, self.next_sibling


class TokenTree:
    """A batch of trees, padded to T nodes, with what the model and the verifier need.

    Attributes:
        rows: the trees, ragged.
        tokens: i64[B, T]; padding repeats the row's root.
        parents: i32[B, T]; -1 for roots and padding.
        tree_mask, positions, next_token, next_sibling: see :func:`branchwise.ops.build_tree`.
        is_chain: every row is one branch, so causal attention serves and no mask is needed.
        draws: how siblings were drawn.
        draft, draft_index: f32[R, V] and i32[B, T], the rows' own put together; None if no row has any.
    """

    def __init__(
        self,
        rows: Sequence[RowTree],
        seq_lens: Tensor,
        draws: DrawKind = DrawKind.DETERMINISTIC,
        width: int = 1,
    ) -> None:
        """``width``: the least number of nodes to pad to."""
        self._rows: list[RowTree] | Callable[[], list[RowTree]] = list(rows)
        self.draws = draws
        lengths = np.array([len(row) for row in rows])
        B, T = len(rows), max(width, int(lengths.max()))
        real = np.arange(T) < lengths[:, None]
        all_tokens = np.concatenate([row.tokens for row in rows])
        tokens = np.repeat(all_tokens[np.cumsum(lengths) - lengths].astype(np.int64), T).reshape(B, T)
        parents = np.full((B, T), -1, np.int32)
        tokens[real], parents[real] = all_tokens, np.concatenate([row.parents for row in rows])
        self.tokens, self.parents = torch.from_numpy(tokens), torch.from_numpy(parents)
        self.tree_mask, self.positions, self.next_token, self.next_sibling = ops.build_tree(self.parents, seq_lens)
        self.is_chain = bool(((parents == np.arange(-1, T - 1)) | ~real).all())
        self.draft, self.draft_index = self._drafts()

    @property
    def rows(self) -> list[RowTree]:
        if callable(self._rows):
            self._rows = self._rows()
        return self._rows

    def named(self, ids: Callable[[], Iterable[np.ndarray]]) -> TokenTree:
        """With other ``ids`` in every row, see :meth:`RowTree.named`; asked for when rows are read, which many drafters
        never do."""
        other = copy.copy(self)
        other._rows = lambda: [row.named(own) for row, own in zip(self.rows, ids(), strict=True)]
        return other

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[0], self.tokens.shape[1]

    def links(self, device: torch.device) -> Links:
        """What acceptance rules read, on a device."""
        return Links(
            self.tokens.to(device),
            self.next_token.to(device),
            self.next_sibling.to(device),
            to_device(self.draft, device),
            to_device(self.draft_index, device),
            self.draws,
        )

    def _drafts(self) -> tuple[Tensor | None, Tensor | None]:
        if all(row.draft is None for row in self.rows):
            return None, None
        tables: list[Tensor] = []
        first_row: dict[int, int] = {}  # of a table; rows that share one do not copy it
        index = np.full(self.shape, -1, np.int32)
        for b, row in enumerate(self.rows):
            if row.draft is None or row.draft_index is None:
                continue
            if id(row.draft) not in first_row:
                first_row[id(row.draft)] = sum(len(table) for table in tables)
                tables.append(row.draft)
            index[b, : len(row)] = np.where(row.draft_index >= 0, row.draft_index + first_row[id(row.draft)], -1)
        return tables[0] if len(tables) == 1 else torch.cat(tables), torch.from_numpy(index)
