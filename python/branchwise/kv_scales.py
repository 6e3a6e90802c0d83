"""What keys and values are divided by before they are rounded to e4m3."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import check_supported, use_attention
from .cache import KVStore
from .forward import StoredModel

# In powers of two: the largest value that was measured comes to lie in [32, 64), so that values of other texts may be
# seven times as large before they meet the largest of e4m3, 448, and 2000 times as small before they lose digits.
_LARGEST = 6


def measure_kv_scales(model: PreTrainedModel, tokens: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """Factors for a :class:`branchwise.KVStore` in float8_e4m3fn: one forward, largest magnitudes per layer and head.

    Args:
        model: a supported model.
        tokens: i64[n], a text of it; None: 256 tokens drawn evenly from the vocabulary, always the same ones, so that
            factors depend on the model alone.

    Returns:
        Per layer f32[Hkv] of keys and of values, powers of two.

    Raises:
        ValueError: an unsupported model, one whose layers share keys and values, or no tokens.
    """
    check_supported(model, on_cuda=True)
    config = model.config.get_text_config()
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"{type(model).__name__} has layers that share keys and values, which e4m3 does not support")
    if tokens is None:
        tokens = torch.randint(config.vocab_size, (256,), generator=torch.Generator().manual_seed(0))
    if tokens.dim() != 1 or len(tokens) == 0:
        raise ValueError(f"tokens must be one text of at least one token, got shape {tuple(tokens.shape)}")
    store = KVStore(1, len(tokens))
    with torch.no_grad(), use_attention(model):
        StoredModel(model, store).extend([tokens])
    used = ((cache[0, :, : len(tokens)] for cache in (layer.keys, layer.values)) for layer in store.layers)
    return [(_scale(keys), _scale(values)) for keys, values in used]


def _scale(values: Tensor) -> Tensor:
    """f32[Hkv] of [Hkv, n, D]; 1 where all are 0."""
    largest = values.abs().amax((1, 2)).float()
    return torch.where(largest > 0, torch.exp2(torch.frexp(largest).exponent.float() - _LARGEST), 1.0)
