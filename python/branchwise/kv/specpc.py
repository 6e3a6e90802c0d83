"""SpecPC: a draft model's attention says which tokens of the prompt the target reads (card speckv-specpc)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import KVStore
from ..forward import StoredModel
from .base import KVSession, check_budget, check_range, resolve_budget
from .draft_ahead import WindowScores, check_draft, look_ahead


class SpecPC:
    """Shortens the prompt before the target sees it, to the tokens that a draft model attends to while it reads the
    prompt's end and begins to answer, and their neighbours (Galim et al. 2025, arXiv 2506.08373).

    The target reads ``budget`` tokens, at positions from 0 on. Exact for prompts of at most ``budget`` tokens. Costs
    the draft model's pass over the prompt and a target prompt of ``budget`` tokens; holds ``2 L D b Hkv budget`` bytes
    per row.

    Args:
        draft: a smaller model with the target's vocabulary.
        budget: prompt tokens that the target reads, or a ratio.
        window: last tokens of the prompt whose attention counts, the later the more; all of them are read.
        lookahead: tokens of an answer whose attention counts in full.
        kernel: positions over which the largest score spreads.
        neighbours: positions that come with a chosen one, itself included; None: ``kernel``.
        first_layer: the draft's layers from here on count.

    Raises:
        ValueError: an option outside its range; on use, a draft with another vocabulary or without the layer.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        budget: int | float = 1024,
        window: int = 64,
        lookahead: int = 1,
        kernel: int = 64,
        neighbours: int | None = None,
        first_layer: int = 0,
    ) -> None:
        check_budget("budget", budget)
        check_range("window", window, 1)
        check_range("lookahead", lookahead, 0)
        check_range("kernel", kernel, 1)
        check_range("first_layer", first_layer, 0, draft.config.get_text_config().num_hidden_layers - 1)
        if neighbours is not None:
            check_range("neighbours", neighbours, 1)
        self.draft, self.budget, self.window, self.lookahead = draft, budget, window, lookahead
        self.kernel, self.first_layer = kernel, first_layer
        self.neighbours = kernel if neighbours is None else neighbours

    def begin(self, model: PreTrainedModel, store: KVStore) -> SpecPCSession:
        check_draft(self.draft, model)
        return SpecPCSession(model, store, self)


class SpecPCSession(KVSession):
    """``kept``: positions of the prompt's tokens that the target read, i64 per row."""

    def __init__(self, model: PreTrainedModel, store: KVStore, options: SpecPC) -> None:
        super().__init__(model, store)
        self.options = options
        self.kept: list[Tensor] = []

    def prefill(self, target: StoredModel, prompts: Sequence[Tensor]) -> Tensor:
        options = self.options
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
        budgets = resolve_budget(options.budget, lengths)
        if bool((lengths <= budgets).all()):
            return target.extend(prompts)
        answers = look_ahead(options.draft, prompts, options.lookahead)
        scores = self._scores(prompts, answers)
        self.kept = [
            choose_tokens(row[: int(n)], int(budget), options.window, options.kernel, options.neighbours)
            for row, n, budget in zip(scores, lengths, budgets, strict=True)
        ]
        return target.extend([prompt[kept] for prompt, kept in zip(prompts, self.kept, strict=True)])

    def _scores(self, prompts: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
        texts = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
        weights = [
            torch.cat([torch.linspace(0, 1, self.options.window), torch.ones(len(answer))]) for answer in answers
        ]
        store = KVStore(len(texts), max(len(text) for text in texts))
        watch = WindowScores(self.options.draft, store, weights, self.options.first_layer)
        look_ahead(self.options.draft, texts, 0, watch)
        assert watch.scores is not None
        return watch.scores


def choose_tokens(scores: Tensor, budget: int, window: int, kernel: int, neighbours: int) -> Tensor:
    """Ascending positions, ``min(budget, n)`` of them, from f32[n] scores: the last ``window``, then the best ones
    after pooling, each with its neighbours, nearest first."""
    n = len(scores)
    padded = torch.nn.functional.pad(scores, ((kernel - 1) // 2, kernel // 2))
    pooled = torch.nn.functional.max_pool1d(padded[None, None], kernel, stride=1)[0, 0]
    order = torch.sort(pooled, descending=True, stable=True).indices[:budget].tolist()
    steps = sorted(range(-((neighbours - 1) // 2), neighbours // 2 + 1), key=lambda step: (abs(step), step))
    chosen = dict.fromkeys(range(max(0, n - window), n))  # in order of first occurrence
    for position in order:
        if len(chosen) >= budget:
            break
        for step in steps:
            chosen.setdefault(min(max(position + step, 0), n - 1))
    return torch.tensor(sorted(list(chosen)[: min(budget, n)]))
