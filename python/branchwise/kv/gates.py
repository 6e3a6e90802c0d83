"""Gates for :class:`branchwise.kv.HeadwiseKV` without training (card rlkv; the estimator of NVIDIA's kvpress)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layers import decoder_layers
from .projections import LayerProjections


@torch.no_grad()
def estimate_gates(model: PreTrainedModel, text: Tensor, positions: int = 500) -> Tensor:
    """f32[layers, Hkv] gates, larger for heads whose attention reaches far back; seconds instead of training.

    The mean query and the mean key of each head over a text, before RoPE, are put at ``positions`` places; the gate is
    the
    mean of the cumulative attention of the last place, averaged over the query heads of a KV head: 1 if all mass lies
    at the first place, near 0 if it lies at the last. What a head finds by content (sinks among it) is not modelled.

    Args:
        model: see :class:`branchwise.kv.projections.LayerProjections`.
        text: i64[n] or i64[B, n] token ids.
        positions: places.

    Raises:
        ValueError: a layer without the modules, or a text or ``positions`` without a token.
    """
    if text.numel() < 1 or positions < 1:
        raise ValueError(f"text and positions must not be empty, got shape {tuple(text.shape)} and {positions}")
    layers = decoder_layers(model)
    means: list[tuple[Tensor, Tensor]] = []
    hooks = []

    def note(projections: LayerProjections) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            query, key = projections(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            means.append((query.float().mean((0, 2)), key.float().mean((0, 2))))

        return hook

    projections = [LayerProjections(model, index) for index in range(len(layers))]
    try:
        for each in projections:
            hooks.append(each.attention.register_forward_pre_hook(note(each), with_kwargs=True))
        model.base_model(text if text.dim() == 2 else text[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    places, gates = torch.arange(positions)[None], []
    for each, (query, key) in zip(projections, means, strict=True):
        q = each.rotate(query[None, :, None], places[:, -1:])
        k = each.rotate(key[None, :, None].expand(-1, -1, positions, -1), places)
        k = k.repeat_interleave(len(query) // len(key), 1)
        row = (q @ k.mT * each.head_dim**-0.5).softmax(-1)[0, :, 0]  # [Hq, positions]
        gates.append(row.cumsum(-1).mean(-1).view(len(key), -1).mean(-1))
    return torch.stack(gates)
