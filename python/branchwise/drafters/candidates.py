"""Any candidate generator of transformers as a chain drafter."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import (
    AssistedCandidateGeneratorDifferentTokenizers,
    CandidateGenerator,
)

from ..tree import DrawKind, RowTree
from .base import DraftRequest, Needs, Verified


class Candidates:
    """Chains from transformers' candidate generators (assistant models, prompt lookup, your own), in batches, too.

    Logits that a generator hands over are not used, as some versions hand over others than they drew from:
    verification is by sample-and-match, which is exact whatever was proposed.

    Args:
        make: from a row's text so far, i64[1, n] without padding, the generator of that row; called when it is first
            needed.

    Raises:
        ValueError: when called: a generator returned something else than its input and tokens behind it.
    """

    draws, needs = DrawKind.DETERMINISTIC, Needs.NOTHING

    def __init__(self, make: Callable[[Tensor], CandidateGenerator]) -> None:
        self.make = make

    @classmethod
    def translated(cls, model: PreTrainedModel, tokenizer: Any, target_tokenizer: Any) -> Candidates:
        """Chains of a draft model with another tokenizer, by transformers' universal assisted generation: its tokens
        are decoded to text and encoded with the target's tokenizer. The draft model must not be the target itself.

        Args:
            model: the draft model.
            tokenizer, target_tokenizer: the draft model's and the target's.
        """

        def make(ids: Tensor) -> CandidateGenerator:
            config = copy.deepcopy(model.generation_config)
            config.update(max_length=1 << 30, min_length=0, do_sample=False)
            kwargs = {"attention_mask": torch.ones_like(ids)}
            return AssistedCandidateGeneratorDifferentTokenizers(
                ids, model, target_tokenizer, tokenizer, config, kwargs
            )

        return cls(make)

    def begin(self, request: DraftRequest) -> CandidatesSession:
        return CandidatesSession(self.make, request.prompts, request.eos)


class CandidatesSession:
    def __init__(
        self, make: Callable[[Tensor], CandidateGenerator], prompts: Sequence[np.ndarray], eos: frozenset[int]
    ) -> None:
        self._make, self._eos = make, np.array(sorted(eos), np.int32)
        self._texts = [torch.from_numpy(np.asarray(prompt, np.int64))[None] for prompt in prompts]
        self._generators: list[CandidateGenerator | None] = [None] * len(self._texts)
        self._proposed = [0] * len(self._texts)

    def propose(self, budgets: Sequence[int]) -> list[RowTree]:
        return [self._row(i, budget) for i, budget in enumerate(budgets)]

    def _row(self, i: int, budget: int) -> RowTree:
        text, self._proposed[i] = self._texts[i], 0
        root = int(text[0, -1])
        if budget < 2:
            return RowTree.root(root)
        generator = self._generators[i] = self._generators[i] or self._make(text)
        candidates, _ = generator.get_candidates(text)
        n = text.shape[1]
        if candidates.shape[0] != 1 or not torch.equal(candidates[:, :n], text):
            raise ValueError(
                f"{type(generator).__name__}.get_candidates must return its input and tokens behind it, "
                f"got shape {tuple(candidates.shape)} for {tuple(text.shape)}"
            )
        draft = candidates[0, n : n + budget - 1].numpy().astype(np.int32)
        self._proposed[i] = len(draft)
        stop = np.flatnonzero(np.isin(draft, self._eos))
        draft = draft[: stop[0]] if len(stop) else draft
        return RowTree.chain(root, draft, 0.8 ** np.arange(1, len(draft) + 1))

    def observe(self, verified: Verified) -> None:
        for i, tokens in enumerate(verified.emitted):
            if not tokens:
                continue
            self._texts[i] = torch.cat([self._texts[i], torch.tensor([list(tokens)])], 1)
            generator = self._generators[i]
            if generator is not None and self._proposed[i]:
                # What generators read of the scores is how many there are.
                scores = torch.empty(1, self._proposed[i] + 1, 0)
                matches = min(len(tokens) - 1, self._proposed[i])
                generator.update_candidate_strategy(self._texts[i], scores, matches)

    def keep(self, rows: Sequence[int]) -> None:
        for name in ("_texts", "_generators", "_proposed"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])

    def close(self) -> None:
        self.keep([])
