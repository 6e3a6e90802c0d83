"""SpecKV: a draft of the answer says which slots of the prompt the answer will need (card speckv-specpc)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..attention import LayerCall
from ..cache import KVStore
from ..forward import StoredModel
from .base import check_budget, check_range, resolve_budget
from .draft_ahead import check_draft, look_ahead
from .evicting import EvictingSession, Keep, window_mass
from .snapkv import pool


class SpecKV:
    """SnapKV whose window is the prompt's last tokens and a draft model's answer (Galim et al. 2025, arXiv 2506.08373).

    The draft's answer is only looked at: the target forgets it again, and computes its prompt's last token anew. Exact
    for prompts of at most ``budget`` tokens. Holds ``2 D b Hkv (budget + 1)`` bytes per layer and row after the prompt,
    rounded up to whole pages per head. The target reads prompt and answer with full attention; the paper's sparse
    prompt attention above 4096 tokens is not part of it.

    Args:
        draft: a smaller model with the target's vocabulary, or the target itself.
        budget: tokens kept per head, or a ratio of the prompt.
        lookahead: tokens that the draft answers with at most.
        window: last tokens of the prompt whose attention counts, beside the answer.
        kernel: odd width of the largest-of pooling over positions.
        page_size: slots allocated together per head.

    Raises:
        ValueError: an option outside its range; on use, a draft with another vocabulary, or an unsupported model.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        budget: int | float = 1024,
        lookahead: int = 32,
        window: int = 64,
        kernel: int = 7,
        page_size: int = 16,
    ) -> None:
        check_range("lookahead", lookahead, 0)
        check_range("window", window, 1)
        check_budget("budget", budget, window + 1)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {kernel}")
        self.draft, self.budget, self.lookahead, self.window = draft, budget, lookahead, window
        self.kernel, self.page_size = kernel, page_size

    def begin(self, model: PreTrainedModel, store: KVStore) -> SpecKVSession:
        check_draft(self.draft, model)
        return SpecKVSession(model, store, self)


class SpecKVSession(EvictingSession):
    def __init__(self, model: PreTrainedModel, store: KVStore, options: SpecKV) -> None:
        super().__init__(model, store, options.window + options.lookahead + 1, options.page_size)
        self.options = options
        self._ahead: Tensor | None = None  # i32[B], tokens of each row's answer, while it is looked at
        self._budgets = torch.empty(0)

    def prefill(self, target: StoredModel, prompts: Sequence[Tensor]) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
        self._budgets = resolve_budget(self.options.budget, lengths)
        if bool((lengths <= self._budgets).all()):
            return target.extend(prompts)
        answers = look_ahead(self.options.draft, prompts, self.options.lookahead)
        self._ahead = torch.tensor([len(answer) for answer in answers], dtype=torch.int32)
        target.extend([torch.cat(pair) for pair in zip(prompts, answers, strict=True)])
        # Forget the answer and the prompt's last token, and compute that one again.
        drop, self._ahead = self._ahead + 1, None
        for index in range(len(self.store.layers)):
            layer = self.store.layers[index]
            if layer.page_table is not None:
                layer.truncate(layer.lens - drop[:, None])
        self.store.set_lengths(lengths - 1)
        return target.extend([prompt[-1:] for prompt in prompts])

    def keep_of_prompt(self, call: LayerCall, lengths: Tensor, queries: Tensor | None) -> Keep | None:
        if self._ahead is None:
            return None
        assert queries is not None
        W, own = queries.shape[2], self.options.window + self._ahead + 1  # [B], the row's window
        weights = (torch.arange(W) >= W - own[:, None]).float()
        scores = pool(window_mass(call, lengths, queries, "max", weights), self.options.kernel, "max")
        before = (lengths - own).clamp(min=0)
        kept = torch.minimum(self._budgets + self._ahead + 1, lengths.long())
        budgets = (kept - own).clamp(min=0)
        budgets = torch.where(kept == lengths, before.long(), budgets)[:, None, None]
        indices, counts = ops.select_pages(
            scores[:, None].contiguous(),
            lengths[:, None],
            before[:, None],
            budgets.expand(-1, 1, scores.shape[1]).int().contiguous(),
        )
        return indices[:, 0].contiguous(), counts[:, 0].contiguous()
