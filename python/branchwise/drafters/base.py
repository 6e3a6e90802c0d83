"""What a drafter is: it guesses, the target model decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from functools import cached_property
from typing import Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import KVStore
from ..noise import Noise
from ..tree import DrawKind, RowTree, TokenTree


class Needs(Flag):
    """What a drafter reads of the target's forwards; what nobody needs is not kept."""

    NOTHING = 0
    LOGITS = auto()
    HIDDEN_STATES = auto()


@dataclass(frozen=True)
class DraftRequest:
    """What a ``generate`` call tells its drafter.

    Attributes:
        prompts: i32 token ids per row, without padding.
        eos: ids that a drafter never proposes.
        noise: for a drafter that draws, so that one seed gives one text; rows that finish leave it by themselves.
        sampling: False: greedy decoding, where drawing drafts would only make them worse.
        warpers: ``(ids, scores [n, V]) -> scores``, what the user asked for that depends on scores alone (temperature,
            top-k, top-p, ...): a drafter that draws from warped scores is accepted more often.
        target, store: the target and its KV store, for a drafter that computes with them; no store under a KV policy.
        deterministic: of forwards on that store, see :class:`branchwise.forward.StoredModel`.
    """

    prompts: Sequence[np.ndarray]
    eos: frozenset[int] = frozenset()
    noise: Noise | None = None
    sampling: bool = False
    warpers: Sequence[Callable[[Tensor, Tensor], Tensor]] = ()
    target: PreTrainedModel | None = None
    store: KVStore | None = None
    deterministic: bool = False


@dataclass(frozen=True)
class Verified:
    """What became of a proposal. Row b stands for the b-th row that is still in the batch.

    Attributes:
        emitted: tokens that became text since the last call, per row; empty for a row that has finished.
        tree: the trees that were verified, which may be smaller than those proposed; roots after the prompt.
        nodes, count: i32[B, T] and i32[B]: ids of the nodes on the accepted path, root first, and how many were kept.
        logits: [B, T, V] at the nodes, unprocessed; with :attr:`Needs.LOGITS`.
        hidden_states: [B, T, H] at the nodes, after the final norm; with :attr:`Needs.HIDDEN_STATES`.
    """

    emitted: Sequence[Sequence[int]]
    tree: TokenTree | None = None
    nodes: Tensor | None = None
    count: Tensor | None = None
    logits: Tensor | None = field(default=None, repr=False)
    hidden_states: Tensor | None = field(default=None, repr=False)

    def path(self, row: int) -> list[int]:
        """Ids of the nodes of a row that were kept, root first; of a finished row, none."""
        return self.paths[row]

    @cached_property
    def paths(self) -> list[list[int]]:
        """:meth:`path` of every row."""
        if self.nodes is None or self.count is None:
            return [[0] for _ in self.emitted]
        return [nodes[:n] for nodes, n in zip(self.nodes.tolist(), self.count.tolist(), strict=True)]


class Drafter(Protocol):
    """Proposes candidate trees for the rows of a batch.

    One object may serve many sessions, also from several threads; what belongs to a batch lives in the session.
    """

    draws: DrawKind  # how it draws siblings when sampling
    needs: Needs

    def begin(self, request: DraftRequest) -> DraftSession:
        """Starts a batch."""
        ...


class DraftSession(Protocol):
    """The rows of one ``generate`` call."""

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        """One tree per row with at most ``budgets[b]`` nodes, the root (last token) included; may be just the root.

        A drafter that draws decides on shape before it sees a token that is left out: what it drops must not depend on
        what was drawn, or the text is biased.
        """
        ...

    def observe(self, verified: Verified) -> None:
        """What the target said since the last call, beginning with the prompt's."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """The other rows have finished."""
        ...

    def close(self) -> None:
        """The batch has ended, normally or not."""
        ...
