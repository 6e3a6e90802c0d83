"""Prompt lookup: copy what followed the last n-gram earlier in the same text (card suffix-decoding, algorithm D)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..tree import DrawKind, RowTree
from .base import DraftRequest, Needs, Verified


class PromptLookup:
    """One chain per row from an n-gram match in the row's own prompt and output (Saxena 2023).

    Args:
        max_ngram: longest suffix to look for; shorter ones are tried down to 1.
        num_tokens: longest chain.
        match: "last" takes the most recent match, "first" the leftmost one, as transformers does.

    Raises:
        ValueError: a length below 1, or another ``match``.
    """

    draws, needs = DrawKind.DETERMINISTIC, Needs.NOTHING

    def __init__(self, max_ngram: int = 3, num_tokens: int = 10, match: Literal["first", "last"] = "last") -> None:
        if max_ngram < 1 or num_tokens < 1:
            raise ValueError(f"max_ngram and num_tokens must be at least 1, got {max_ngram} and {num_tokens}")
        if match not in ("first", "last"):
            raise ValueError(f"match must be 'first' or 'last', got {match!r}")
        self.max_ngram, self.num_tokens, self.match = max_ngram, num_tokens, match

    def begin(self, request: DraftRequest) -> PromptLookupSession:
        return PromptLookupSession(self, request.prompts, request.eos)


class PromptLookupSession:
    def __init__(self, options: PromptLookup, prompts: Sequence[np.ndarray], eos: frozenset[int]) -> None:
        self._options, self._eos = options, np.array(sorted(eos), np.int32)
        self._texts = [np.asarray(prompt, np.int32) for prompt in prompts]

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        return [self._row(text, budget) for text, budget in zip(self._texts, budgets, strict=True)]

    def _row(self, text: np.ndarray, budget: int) -> RowTree:
        length = min(self._options.num_tokens, budget - 1)
        for n in range(min(self._options.max_ngram, len(text) - 1), 0, -1):
            if length < 1:
                break
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], n)  # a match must have a continuation
            starts = np.flatnonzero((windows == text[-n:]).all(axis=1))
            if len(starts) == 0:
                continue
            start = int(starts[0 if self._options.match == "first" else -1]) + n
            draft = text[start : start + length]
            stop = np.flatnonzero(np.isin(draft, self._eos))
            draft = draft[: stop[0]] if len(stop) else draft
            if len(draft):
                trust = 1 - 0.5**n  # a longer match is right more often
                return RowTree.chain(int(text[-1]), draft, trust * 0.95 ** np.arange(len(draft)))
        return RowTree.root(int(text[-1]))

    def observe(self, verified: Verified) -> None:
        self._texts = [
            np.concatenate([text, np.asarray(tokens, np.int32)])
            for text, tokens in zip(self._texts, verified.emitted, strict=True)
        ]

    def keep(self, rows: Sequence[int]) -> None:
        self._texts = [self._texts[row] for row in rows]

    def close(self) -> None:
        self._texts = []
