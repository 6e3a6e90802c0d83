"""What SpecKV and SpecPC share: a small model that looks ahead."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention import LayerCall, check_supported, use_attention
from ..cache import KVStore
from ..forward import StoredModel
from .base import KVSession
from .evicting import EvictingSession, Keep, window_mass


def check_draft(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """Refuses a draft model that cannot read the target's tokens.

    Raises:
        ValueError: an unsupported architecture, or another vocabulary.
    """
    check_supported(draft)
    sizes = [model.config.get_text_config().vocab_size for model in (draft, target)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the draft model must have the target's vocabulary of {sizes[1]} tokens, got {sizes[0]}")


def look_ahead(
    draft: PreTrainedModel, prompts: Sequence[Tensor], count: int, session: KVSession | None = None
) -> list[Tensor]:
    """Greedy continuations i64[<= count] of ragged prompts, each up to and without an end-of-sequence token.

    ``session``: watches or steers the draft's own layers while it reads and writes.
    """
    longest = max(len(prompt) for prompt in prompts)
    store = KVStore(len(prompts), longest + count + 1) if session is None else session.store
    target = StoredModel(draft, store, kv=session)
    ends = draft.generation_config.eos_token_id
    stops = set(ends) if isinstance(ends, list) else {ends}
    texts: list[list[int]] = [[] for _ in prompts]
    open_rows = [True] * len(prompts)
    with use_attention(draft), torch.no_grad():
        logits = target.extend(list(prompts))
        for step in range(count):
            tokens = logits[:, -1].argmax(-1)
            for row, token in enumerate(tokens.tolist()):
                open_rows[row] = open_rows[row] and token not in stops
                if open_rows[row]:
                    texts[row].append(token)
            if not any(open_rows) or step + 1 == count:
                break
            logits = target.forward(tokens[:, None], store.seq_lens[:, None].long())
            store.advance(torch.ones(len(prompts), dtype=torch.int32))
    return [torch.tensor(text, dtype=torch.int64) for text in texts]


class WindowScores(EvictingSession):
    """Watches the last queries of a text that is read; keeps everything.

    ``scores``: f32[B, S], the largest probability that a query, weighted, gives a token, over heads and layers.
    """

    def __init__(self, model: PreTrainedModel, store: KVStore, weights: Sequence[Tensor], first_layer: int) -> None:
        super().__init__(model, store, max(len(row) for row in weights), 16)
        self._weights, self._first = weights, first_layer
        self.scores: Tensor | None = None

    def keep_of_prompt(self, call: LayerCall, lengths: Tensor, queries: Tensor | None) -> Keep | None:
        assert queries is not None
        if call.layer >= self._first:
            W = queries.shape[2]
            rows = [torch.nn.functional.pad(row, (W - len(row), 0))[-W:] for row in self._weights]
            mass = window_mass(call, lengths, queries, "max", torch.stack(rows)).amax(1)
            self.scores = mass if self.scores is None else torch.maximum(self.scores, mass)
        return None
