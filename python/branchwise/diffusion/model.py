"""A small masked-diffusion language model: Qwen3's layers under a mask that looks both ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM


class MaskedDiffusionConfig(Qwen3Config):
    """Qwen3's options and those of the diffusion.

    Args:
        mask_token_id: stands where a token is not known yet; never said.
        attention: "block_causal" (a token sees its own block and those before it; SDAR, TraDo) or "full" (every token
            sees every other; LLaDA, Dream).
        block_size: tokens per block, counted from the first token of the text.
    """

    model_type = "branchwise_masked_diffusion"

    def __init__(
        self, mask_token_id: int = 1, attention: str = "block_causal", block_size: int = 8, **options: Any
    ) -> None:
        if attention not in ("block_causal", "full"):
            raise ValueError(f"attention must be 'block_causal' or 'full', got {attention!r}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.mask_token_id, self.attention, self.block_size = mask_token_id, attention, block_size
        super().__init__(**options)


class MaskedDiffusionLM(Qwen3ForCausalLM):
    """Predicts the tokens behind masks: logit row i is about token i.

    A forward without a 4-D ``attention_mask`` uses the configuration's pattern; left padding (a 2-D mask) moves the
    blocks of a row to its first token. ``generate`` decodes with :class:`branchwise.diffusion.FreeDave` unless it is
    given another ``custom_generate``.
    """

    config_class = MaskedDiffusionConfig
    config: MaskedDiffusionConfig

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        if "branchwise_plan" not in options and (attention_mask is None or attention_mask.dim() == 2):
            attention_mask = self._pattern(input_ids, attention_mask)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)

    def generate(self, *arguments: Any, custom_generate: Any = None, **options: Any) -> Any:
        if custom_generate is None:
            from .freedave import FreeDave

            custom_generate = FreeDave()
        return super().generate(*arguments, custom_generate=custom_generate, **options)

    def _pattern(self, input_ids: Tensor, padding: Tensor | None) -> Tensor:
        """bool[B, 1, T, T]; padding tokens see themselves."""
        B, T = input_ids.shape
        real = torch.ones(B, T, dtype=torch.bool) if padding is None else padding.bool()
        sees = block_pattern(T, T if self.config.attention == "full" else self.config.block_size)
        starts = T - real.sum(1)
        rows = torch.arange(T) - starts[:, None]  # negative: padding
        at = rows.clamp(min=0)
        sees = sees[at[:, :, None], at[:, None, :]] & real[:, :, None] & real[:, None, :]
        return (sees | torch.eye(T, dtype=torch.bool))[:, None]


def block_pattern(T: int, block_size: int) -> Tensor:
    """bool[T, T]: token i sees token j where j's block is not behind i's."""
    block = torch.arange(T) // block_size
    return block[:, None] >= block
