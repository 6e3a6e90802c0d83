"""What a drafter is: it guesses, the target model decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..tree import DrawKind, RowTree


class Drafter(Protocol):
    """Proposes candidate trees for the rows of a batch.

    One object may serve many sessions, also from several threads; what belongs to a batch lives in the session.
    """

    draws: DrawKind

    def begin(self, prompts: Sequence[np.ndarray], eos: frozenset[int]) -> DraftSession:
        """Starts a batch. ``prompts``: i32 token ids per row, without padding; ``eos``: ids never to be drafted."""
        ...


class DraftSession(Protocol):
    """The rows of one ``generate`` call."""

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        """One tree per row with at most ``budgets[b]`` nodes, the root (last token) included; may be just the root."""
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
