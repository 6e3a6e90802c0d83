"""Queries and keys of a layer, from the model's own modules, outside of its forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layers import decoder_layers


class LayerProjections:
    """Queries and keys as one layer makes them.

    Args:
        model: a model whose attention has ``q_proj`` and ``k_proj`` (Llama, Qwen, Mistral, SmolLM, Gemma 2, ...).
        layer: its index.

    Raises:
        ValueError: the layer has no such projections or no ``input_layernorm``, or the model no rotary embedding.
    """

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        block: Any = decoder_layers(model)[layer]
        attention = getattr(block, "self_attn", None)
        rotary: Any = getattr(model.base_model, "rotary_emb", None)
        parts = (getattr(attention, "q_proj", None), getattr(attention, "k_proj", None), rotary)
        if attention is None or None in parts or not hasattr(block, "input_layernorm"):
            raise ValueError(
                f"layer {layer} of {type(model).__name__} has no q_proj, k_proj, input_layernorm and rotary_emb"
            )
        self.attention, self.norm, self.rotary = attention, block.input_layernorm, rotary
        self.head_dim: int = attention.head_dim
        # Models whose layers differ in their angles (Gemma 3) ask which are wanted.
        self._kind = (
            (model.config.get_text_config().layer_types[layer],)
            if "layer_type" in inspect.signature(rotary.forward).parameters
            else ()
        )

    def __call__(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, Hq, T, D] and keys [B, Hkv, T, D] before RoPE, of what enters the attention, [B, T, H]."""
        B, T, _ = states.shape
        made = []
        for name in ("q", "k"):
            x = getattr(self.attention, f"{name}_proj")(states).view(B, T, -1, self.head_dim)
            norm = getattr(self.attention, f"{name}_norm", None)
            made.append((x if norm is None else norm(x)).transpose(1, 2))
        return made[0], made[1]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """[B, H, T, D] at i64[B, T] positions."""
        cos, sin = self.rotary(x, positions, *self._kind)
        R = cos.shape[-1]
        part, rest = x[..., :R], x[..., R:]
        turned = torch.cat([-part[..., R // 2 :], part[..., : R // 2]], dim=-1)
        return torch.cat([part * cos[:, None] + turned * sin[:, None], rest], dim=-1).to(x.dtype)
