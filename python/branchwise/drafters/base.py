"""What a drafter is: it guesses, the target model decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..noise import Noise
from ..tree import DrawKind, RowTree


class Drafter(Protocol):
    """Proposes candidate trees for the rows of a batch.

    One object may serve many sessions, also from several threads; what belongs to a batch lives in the session.
    """

    draws: DrawKind

    def begin(self, prompts: Sequence[np.ndarray], eos: frozenset[int], noise: Noise) -> DraftSession:
        """Starts a batch.

        Args:
            prompts: i32 token ids per row, without padding.
            eos: ids never to be drafted.
            noise: for a drafter that draws, so that one seed gives one text; rows that finish leave it by themselves.
        """
        ...


class DraftSession(Protocol):
    """The rows of one ``generate`` call."""

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        """One tree per row with at most ``budgets[b]`` nodes, the root (last token) included; may be just the root.

        A drafter that draws decides on shape before it sees a token that is left out: what it drops must not depend on
        what was drawn, or the text is biased.
        """
        ...

    def observe(self, emitted: Sequence[Sequence[int]]) -> None:
        """Tokens that were emitted in each row since the last call."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """The other rows have finished."""
        ...

    def close(self) -> None:
        """The batch has ended, normally or not."""
        ...
