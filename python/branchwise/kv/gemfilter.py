"""GemFilter: an early layer picks the prompt's tokens, and the model starts again from those (card promptdistill)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import KVStore
from ..forward import StoredModel
from .base import check_budget, check_range, resolve_budget
from .prompt_layers import LayerwiseSession, best_positions


class GemFilter:
    """Reads the prompt with the first layers, keeps the tokens that its last one matches best, and reads the shorter
    prompt with all layers, at positions from 0 on (Shi et al. 2024, arXiv 2409.17422).

    Exact for prompts of at most ``budget`` tokens. Costs ``(layer + 1) / layers`` of a full prompt and a prompt of
    ``budget`` tokens; holds ``2 L D b Hkv budget`` bytes per row instead of ``2 L D b Hkv S``.

    Args:
        budget: tokens kept, or a ratio of the prompt.
        layer: whose products of queries and keys choose, from 0.
        kernel: odd width of the average over positions; 1: none.

    Raises:
        ValueError: an option outside its range; on use, a model with no layer ``layer``, or whose layers share keys.
    """

    def __init__(self, budget: int | float = 1024, layer: int = 13, kernel: int = 5) -> None:
        check_budget("budget", budget)
        check_range("layer", layer, 0)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and positive, got {kernel}")
        self.budget, self.layer, self.kernel = budget, layer, kernel

    def begin(self, model: PreTrainedModel, store: KVStore) -> GemFilterSession:
        layers = model.config.get_text_config().num_hidden_layers
        if self.layer >= layers:
            raise ValueError(f"layer must be below the model's {layers} layers, got {self.layer}")
        return GemFilterSession(model, store, self)


class GemFilterSession(LayerwiseSession):
    """``kept``: positions of the prompt's tokens that were kept, i64 per row."""

    def __init__(self, model: PreTrainedModel, store: KVStore, options: GemFilter) -> None:
        super().__init__(model, store)
        self.options = options
        self.kept: list[Tensor] = []

    def prefill(self, target: StoredModel, prompts: Sequence[Tensor]) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
        budgets = resolve_budget(self.options.budget, lengths)
        if bool((lengths <= budgets).all()):
            return target.extend(prompts)
        self.read(target, prompts, self.options.layer)
        scores = self.last_products(self.options.layer, lengths)
        self.kept = best_positions(scores, lengths, budgets, self.options.kernel)
        self.kept = [  # a short prompt stays whole
            kept if length > budget else torch.arange(int(length))
            for kept, length, budget in zip(self.kept, lengths, budgets, strict=True)
        ]
        self.store.clear()
        return target.extend([prompt[kept] for prompt, kept in zip(prompts, self.kept, strict=True)])
