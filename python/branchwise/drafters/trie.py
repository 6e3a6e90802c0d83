"""Trie drafter: branches that followed the same tokens in this prompt or in earlier outputs."""

from __future__ import annotations

import threading
from typing import Any

from .. import _host
from ..tree import DrawKind
from .base import DraftRequest, Needs
from .store import StoreSession


class Trie:
    """Drafts retrieved from a trie of token runs, in C++ (card lookahead-trie; Zhao et al. 2023, arXiv 2312.12728).

    Two counters per run: occurrences in the request's own prompt, private to the request and forgotten with it, and
    occurrences in any output, kept in this object. Sharing the object shares what was learned, and nothing else does.
    Thread-safe. Memory is bounded: rare runs are dropped and counts halved when a tree of the trie grows too large.

    Args:
        branch_length: longest branch, in tokens.
        query_length: longest context suffix that is looked up; shorter ones fill what is left of the budget.
        output_weight: w in ``(1 - w) * prompt_count + w * output_count``, the weight of a candidate.
        max_nodes: nodes below one first token that cause a squeeze at once.
        max_output_nodes: nodes below one first token that a squeeze leaves alone.
        squeeze_after: first tokens touched before finished requests cause a squeeze.

    Raises:
        ValueError: a length or limit below 1, or ``output_weight`` outside [0, 1].
    """

    draws, needs = DrawKind.DETERMINISTIC, Needs.NOTHING

    def __init__(
        self,
        branch_length: int = 12,
        query_length: int = 5,
        output_weight: float = 0.5,
        max_nodes: int = 65536,
        max_output_nodes: int = 512,
        squeeze_after: int = 1024,
    ) -> None:
        self._options: dict[str, Any] = {
            "branch_length": branch_length,
            "query_length": query_length,
            "output_weight": output_weight,
            "max_nodes": max_nodes,
            "max_output_nodes": max_output_nodes,
            "squeeze_after": squeeze_after,
        }
        _host.TokenTrie(eos=[], **self._options)  # checks the options now rather than on first use
        self._tries: dict[frozenset[int], _host.TokenTrie] = {}
        self._lock = threading.Lock()

    def begin(self, request: DraftRequest) -> StoreSession:
        # Runs end at EOS, so models with other EOS tokens must not read each other's runs.
        with self._lock:
            if request.eos not in self._tries:
                self._tries[request.eos] = _host.TokenTrie(eos=sorted(request.eos), **self._options)
            trie = self._tries[request.eos]
        return StoreSession(trie, request.prompts)
