"""No drafts: plain decoding, one token per forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tree import DrawKind, RowTree
from .base import DraftRequest, Needs, Verified


class NoDrafts:
    """Proposes nothing. With it, a tree decoder is a plain one, with the same KV policies, seeds and rules."""

    draws, needs = DrawKind.DETERMINISTIC, Needs.NOTHING

    def begin(self, request: DraftRequest) -> NoDraftsSession:
        return NoDraftsSession(request.prompts)


class NoDraftsSession:
    def __init__(self, prompts: Sequence[np.ndarray]) -> None:
        self._last = [int(prompt[-1]) for prompt in prompts]

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        return [RowTree.root(token) for token in self._last]

    def observe(self, verified: Verified) -> None:
        self._last = [
            tokens[-1] if len(tokens) else last for last, tokens in zip(self._last, verified.emitted, strict=True)
        ]

    def keep(self, rows: Sequence[int]) -> None:
        self._last = [self._last[row] for row in rows]

    def close(self) -> None:
        pass
