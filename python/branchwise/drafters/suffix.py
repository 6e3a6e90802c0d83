"""Suffix drafter: everything that followed the same tokens before votes for what comes next, in C++."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from .. import _host
from ..tree import DrawKind
from .base import DraftRequest, Needs
from .store import StoreSession


class Suffix:
    """Drafts from earlier occurrences of the context's suffixes (card suffix-decoding; Oliaro et al. 2024, arXiv
    2411.04975).

    Occurrences in the request's own text, which is private to it, and in past outputs, which this object keeps. Each
    votes with ``growth`` to the power of the number of tokens that agree; the tree is grown best-first by shares of
    votes. Found by hash chains over runs of 8, 4, 2 and 1 tokens instead of a suffix tree: appending a token takes
    constant time, and old outputs are forgotten by being overwritten. Thread-safe.

    Args:
        max_match: longest agreement that is measured, in tokens.
        occurrences: most recent ones that are looked at, per indexed run length.
        growth: votes per token of agreement, up to 16 tokens.
        output_weight: votes of an occurrence in past outputs, relative to one in the own text; 0 ignores them.
        min_score: least estimated probability of a drafted path.
        capacity: tokens of past outputs that are kept.

    Raises:
        ValueError: a length or limit below 1, a weight or score below 0.
    """

    draws, needs = DrawKind.DETERMINISTIC, Needs.NOTHING

    def __init__(
        self,
        max_match: int = 32,
        occurrences: int = 64,
        growth: float = 2.0,
        output_weight: float = 1.0,
        min_score: float = 0.01,
        capacity: int = 1 << 18,
    ) -> None:
        self._options: dict[str, Any] = {
            "max_match": max_match,
            "occurrences": occurrences,
            "growth": growth,
            "output_weight": output_weight,
            "min_score": min_score,
            "capacity": capacity,
        }
        _host.SuffixDrafts(eos=[], **self._options)  # checks the options now rather than on first use
        self._stores: dict[frozenset[int], _host.SuffixDrafts] = {}
        self._lock = threading.Lock()

    def _store(self, eos: frozenset[int]) -> _host.SuffixDrafts:
        # Models with other EOS tokens must not read each other's texts.
        with self._lock:
            if eos not in self._stores:
                self._stores[eos] = _host.SuffixDrafts(eos=sorted(eos), **self._options)
            return self._stores[eos]

    def begin(self, request: DraftRequest) -> StoreSession:
        return StoreSession(self._store(request.eos), request.prompts)

    def save(self, path: str | Path) -> None:
        """Writes the past outputs to a file of numpy's .npz format, to that very path."""
        arrays = {"_".join(map(str, sorted(eos))) or "none": store.outputs() for eos, store in self._stores.items()}
        with Path(path).open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    def load(self, path: str | Path) -> None:
        """Adds the past outputs of a file that :meth:`save` wrote.

        Raises:
            ValueError: the file is not such a file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                saved = {
                    frozenset(() if key == "none" else map(int, key.split("_"))): file[key].astype(np.int32)
                    for key in file.files
                }
        except (ValueError, EOFError) as error:
            raise ValueError(f"path must name a file written by Suffix.save, got {path}") from error
        for eos, tokens in saved.items():
            self._store(eos).add_outputs(tokens)
