"""The session of drafters whose drafts are looked up in a C++ store of past tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import _host
from ..tree import RowTree
from .base import Verified


class StoreSession:
    def __init__(self, store: _host.TokenTrie | _host.SuffixDrafts, prompts: Sequence[np.ndarray]) -> None:
        self._store = store
        self._requests = [store.begin(prompt) for prompt in prompts]

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        return [
            RowTree(*self._store.propose(request, budget))
            for request, budget in zip(self._requests, budgets, strict=True)
        ]

    def observe(self, verified: Verified) -> None:
        for request, tokens in zip(self._requests, verified.emitted, strict=True):
            self._store.observe(request, np.asarray(tokens, np.int32))

    def keep(self, rows: Sequence[int]) -> None:
        kept = [self._requests[row] for row in rows]
        for request in set(self._requests) - set(kept):
            self._store.end(request)
        self._requests = kept

    def close(self) -> None:
        self.keep([])
